"""Training a recurrent classifier on a memory task, along a curriculum, in a run folder that can be resumed.

The folder is that of any run (`longspan.train.run`): recipe.json, log.jsonl, tokenizer.json, checkpoints/, model/. What
a step reads is a function of the seed and the step, so a resumed run of fixed `steps` goes on bit for bit.
"""

import math
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from longspan.models import RecurrentClassifier, Trace
from longspan.tasks import MemoryTask
from longspan.train import checkpoint as checkpoints
from longspan.train.checkpoint import Checkpoint, Position, load_optimizer, optimizer_tensors
from longspan.train.curriculum import Curriculum, CurriculumConfig
from longspan.train.distributed import Group
from longspan.train.log import Log
from longspan.train.progress import Silent, resident_bytes
from longspan.train.signals import on_interrupt
from longspan.train.step import DivergedError


class Samples(NamedTuple):
    """A batch of samples of one length.

    Attributes:
        tokens: (rows, segments * size) int64.
        answers: (rows,) int64.
        none: (rows, segments) bool, no part of a fact stands in the segment.
        whole: (rows, segments) bool, all of a fact stands in it.
    """

    tokens: Tensor
    answers: Tensor
    none: Tensor
    whole: Tensor


def draw_samples(task: MemoryTask, segments: int, rows: int, size: int, seed: tuple[int, ...]) -> Samples:
    """Training samples of a seed."""
    drawn = [task.sample("train", segments, [*seed, row], size=size) for row in range(rows)]
    parts = [list(sample) for sample in drawn]
    tokens = np.stack([np.concatenate([part.tokens for part in sample]) for sample in parts])
    fact = torch.tensor([[part.fact for part in sample] for sample in parts])
    whole = torch.tensor([[part.whole for part in sample] for sample in parts])
    return Samples(torch.from_numpy(tokens), torch.tensor([sample.answer for sample in drawn]), ~fact, whole)


def gate_losses(traces: list[Trace], batch: Samples, config: CurriculumConfig) -> tuple[Tensor, Tensor]:
    """What is asked of the gates, the last segment's apart, as nothing is read after it.

    Returns:
        The mean of softplus(logit + margin) where no fact stands, and of softplus(evidence - largest logit) where a
        whole one does; zeros where there is nothing to ask, or no gate.
    """
    nothing = batch.answers.new_zeros((), dtype=torch.float32)
    logits = [trace.logits for trace in traces if trace.logits is not None]
    if len(logits) < 2:
        return nothing, nothing
    found = torch.stack(logits[:-1], 1)
    none, whole = batch.none[:, :-1], batch.whole[:, :-1]
    closed = F.softplus(found[none] + config.gate_margin).mean() if bool(none.any()) else nothing
    opened = F.softplus(config.gate_evidence - found[whole].amax(-1)).mean() if bool(whole.any()) else nothing
    return closed, opened


class RecallTrainer:
    """Trains a classifier on a memory task in a run folder; `longspan.train.run` makes one from a recipe.

    Args:
        model: on the CPU or a GPU.
        task: prepared.
        config: of the run.
        folder: of the run.
        display: what is shown.
    """

    def __init__(
        self, model: RecurrentClassifier, task: MemoryTask, config: CurriculumConfig, folder: Path, *, display: Silent
    ) -> None:
        self.model, self.task, self.config, self.folder, self.display = model, task, config, folder, display
        self.position = Position()
        self.curriculum = Curriculum(config, task.config.segment_length)
        groups = model.parameter_groups(lr=config.lr, weight_decay=config.weight_decay)
        self.base_rates = [group["lr"] for group in groups]
        self.optimizer = torch.optim.AdamW(groups, betas=config.betas, fused=True)
        self.generator = torch.Generator().manual_seed(config.seed + 2)
        torch.manual_seed((config.seed + 1) * 1_000_003)
        self._saved_step: int | None = None
        self._stop = False

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint whose model this trainer was made with."""
        self.position = checkpoint.position
        self.curriculum.load_state_dict(checkpoint.position.lanes)
        load_optimizer(self.optimizer, self.model, checkpoint.tensors)
        self.generator.set_state(checkpoint.tensors["random.after_step"])
        torch.set_rng_state(checkpoint.tensors["random.cpu.0"])
        self._saved_step = self.position.step

    def fit(self) -> bool:
        """Train to the end of the schedule; True where Ctrl-C or SIGTERM ended it, with a checkpoint saved.

        Raises:
            DivergedError: the loss is no number any more.
            CheckpointError: a checkpoint could not be saved; the last good one stands.
        """
        log = Log(self.folder / "log.jsonl", step=self.position.step)
        self.display.start(self._title())
        try:
            with on_interrupt(self._stop_soon):
                while self.config.progress(self.position.step, self.position.seconds) < 1 and not self._stop:
                    self._step(log)
                    every = self.config.checkpoint_every
                    if every and self.position.step % every == 0:
                        self._save(log)
                self._save(log)
        finally:
            self.display.stop()
            log.close()
        return self._stop

    def _step(self, log: Log) -> None:
        started = time.perf_counter()
        config, position, curriculum = self.config, self.position, self.curriculum
        segments, rows = curriculum.draw(position.step)
        batch = draw_samples(self.task, segments, rows, curriculum.length, (config.seed, position.step))
        loss, accuracy = self._backward(batch, curriculum.length)
        if config.clip:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.clip)
        rate = config.rate(position.step, position.seconds)
        for group, base in zip(self.optimizer.param_groups, self.base_rates, strict=True):
            group["lr"] = base * rate
        self.optimizer.step()
        # torch's fused step writes weights without counting their versions, which tell caches that weights changed
        torch.autograd.graph.increment_version([p for p in self.model.parameters() if p.requires_grad])
        position.step += 1
        self.model.after_step(position.step, self.generator)
        moved = curriculum.add(segments, accuracy)
        seconds = time.perf_counter() - started
        position.seconds += seconds
        position.tokens += batch.tokens.numel()
        for name, value in (("loss", loss * rows), ("right", accuracy * rows), ("rows", rows), ("seconds", seconds)):
            position.pending[name] = position.pending.get(name, 0.0) + value
        position.pending["tokens"] = position.pending.get("tokens", 0.0) + batch.tokens.numel()
        if position.step % config.log_every == 0 or moved:
            self._log(log, rate, moved)

    def _backward(self, batch: Samples, size: int) -> tuple[float, float]:
        """Add the gradient of a batch; its loss on answers and its accuracy."""
        device = next(self.model.parameters()).device
        batch = Samples(*(each.to(device) for each in batch))
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        traces: list[Trace] = []
        penalties: list[Tensor] = []
        with self.model.recurrent.segments_of(size):
            logits, _ = self.model(batch.tokens, traces=traces, penalties=penalties)
            loss = F.cross_entropy(logits, batch.answers)
            closed, opened = gate_losses(traces, batch, self.config)
            total = loss + self.curriculum.penalty * closed + self.config.gate_open * opened
            if penalties:
                total = total + torch.stack(penalties).sum()
            total.backward()
        if not math.isfinite(float(total.detach())):
            last = checkpoints.last_good(self.folder / "checkpoints")
            raise DivergedError(
                f"the loss of step {self.position.step + 1} is {float(total)}; {last}; try a lower train.lr"
            )
        return float(loss.detach()), float((logits.argmax(1) == batch.answers).float().mean())

    def _log(self, log: Log, rate: float, moved: bool) -> None:
        position, pending, curriculum = self.position, self.position.pending, self.curriculum
        line = {
            "step": position.step,
            "loss": pending["loss"] / pending["rows"],
            "accuracy": pending["right"] / pending["rows"],
            "segments": curriculum.segments,
            "segment_length": curriculum.length,
            "new_stage": moved,
            "gate_penalty": curriculum.penalty,
            "lr": self.config.lr * rate,
            "tokens": position.tokens,
            "tokens_per_second": pending["tokens"] / max(pending["seconds"], 1e-9),
            "seconds": position.seconds,
            "memory": resident_bytes(),
        }
        position.pending = {}
        log.write(line)
        fraction = self.config.progress(position.step, position.seconds)
        eta = position.seconds * (1 - fraction) / fraction if fraction else None
        self.display.step({**line, "fraction": fraction, "eta": eta, "unit": self.task.unit})

    def _save(self, log: Log) -> None:
        if self._saved_step == self.position.step:
            return
        self.position.lanes = self.curriculum.state_dict()
        tensors = optimizer_tensors(self.optimizer, self.model)
        tensors |= {"random.after_step": self.generator.get_state(), "random.cpu.0": torch.get_rng_state()}
        log.sync()
        folder = self.folder / "checkpoints"
        checkpoints.save(folder, self.position, self.model, tensors, [], group=Group(), keep=self.config.keep)
        self._saved_step = self.position.step

    def _title(self) -> str:
        config, size = self.config, self.task.config.segment_length
        begin = f"from step {self.position.step} " if self.position.step else ""
        ends = [f"{config.steps} steps"] if config.steps is not None else []
        ends += [f"{config.minutes:g} minutes"] if config.minutes is not None else []
        return (
            f"{self.folder}: {self.model.num_parameters():,} parameters, {self.task.config.kind}, up to "
            f"{config.max_segments} segments of {size}, {begin}to {' or '.join(ends) or '1000 steps'}"
        )

    def _stop_soon(self) -> None:
        self._stop = True
        self.display.message("stopping after this step; again to stop at once, without saving")
