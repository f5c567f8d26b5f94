"""Training in stages: a curriculum says what a step reads, in a run folder that can be resumed.

The folder is that of any run (`longspan.train.run`): recipe.json, log.jsonl, tokenizer.json, checkpoints/, model/. What
a step reads is a function of the seed, the step and the stage reached, so a resumed run of fixed `steps` goes on bit
for bit.
"""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from longspan.config import check_least, check_shares
from longspan.process import resident_bytes
from longspan.train import checkpoint as checkpoints
from longspan.train.checkpoint import Checkpoint, Position, load_optimizer, optimizer_tensors
from longspan.train.distributed import Group
from longspan.train.log import Log
from longspan.train.progress import Silent
from longspan.train.signals import on_interrupt
from longspan.train.step import DivergedError

_AT_LEAST_ONE = ("tokens", "window", "log_every", "keep")
_NOT_NEGATIVE = ("patience", "lr", "warmup", "weight_decay", "clip", "seed", "checkpoint_every", "threads")
_SHARES = ("accuracy", "frontier", "constant", "min_lr_ratio")


@dataclass(frozen=True, kw_only=True)
class StagedConfig:
    """Fields that the `[train]` tables of all curricula share.

    Attributes:
        steps: optimiser steps; None = no limit where `minutes` is given, else 1000.
        minutes: of training, saving not counted; the schedule follows steps or time, whichever is further on.
        tokens: of a batch, about: its rows follow from their length.
        accuracy: of the last `window` batches at a stage that ends it.
        window: batches.
        patience: steps after which a stage ends in any case; 0 = never.
        frontier: share of the batches at the stage reached; the others are of any before it.
        lr: largest learning rate.
        warmup: steps of linear warm-up.
        constant: share of the run at the largest rate; it then falls linearly to `min_lr_ratio` of it.
        min_lr_ratio: see `constant`.
        betas, weight_decay: of AdamW.
        clip: largest norm of the gradient; 0 = no clipping.
        seed: of everything random.
        log_every, checkpoint_every: in steps; 0 checkpoints at the end only.
        keep: checkpoints that stay.
        threads: CPU threads; 0 = as torch chooses.
        device: as torch calls it; "auto" = CUDA where there is one.
    """

    steps: int | None = None
    minutes: float | None = None
    tokens: int = 32_000
    accuracy: float = 0.93
    window: int = 10
    patience: int = 0
    frontier: float = 0.5
    lr: float = 1e-3
    warmup: int = 50
    constant: float = 0.6
    min_lr_ratio: float = 0.05
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.01
    clip: float = 1.0
    seed: int = 0
    log_every: int = 10
    checkpoint_every: int = 200
    keep: int = 2
    threads: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        check_least(self, "train", dict.fromkeys(_AT_LEAST_ONE, 1) | dict.fromkeys(_NOT_NEGATIVE, 0))
        check_shares(self, "train", _SHARES)

    def progress(self, step: int, seconds: float) -> float:
        """How much of the run is over, 0 to 1."""
        limit = 1000 if self.steps is None and self.minutes is None else self.steps
        by_steps = 0.0 if limit is None else step / max(limit, 1)
        by_time = 0.0 if self.minutes is None else seconds / max(60 * self.minutes, 1e-9)
        return min(max(by_steps, by_time), 1.0)

    def rate(self, step: int, seconds: float) -> float:
        """What `lr` is multiplied with in step `step` (from 0)."""
        done = self.progress(step, seconds)
        falling = 1.0 if done < self.constant else max((1 - done) / max(1 - self.constant, 1e-9), self.min_lr_ratio)
        return min(1.0, (step + 1) / max(self.warmup, 1)) * falling

    @property
    def ends(self) -> str:
        """When a run is over, in words."""
        parts = [f"{self.steps} steps"] if self.steps is not None else []
        parts += [f"{self.minutes:g} minutes"] if self.minutes is not None else []
        return " or ".join(parts) or "1000 steps"


@dataclass
class Stages:
    """Where a run is in its curriculum; plain data, so that it can be saved. A subclass says what the stages are.

    Attributes:
        config: of the run.
        full: tokens in the end, of whatever grows.
        since: steps since this stage began.
        at_stage: accuracy of the last batches of this stage.
    """

    config: Any
    full: int
    since: int = 0
    at_stage: list[float] = field(default_factory=list)

    def further(self) -> bool:
        """Go to the next stage; False where this one is the last."""
        raise NotImplementedError

    def columns(self) -> dict[str, Any]:
        """What a line of the log says of the stage."""
        raise NotImplementedError

    @property
    def words(self) -> tuple[str, str]:
        """The stage as two short texts."""
        raise NotImplementedError

    def count(self, right: float | None, wanted: float) -> bool:
        """Count a step, and end the stage where it is learnt or has lasted too long.

        Args:
            right: accuracy of its batch; None = the batch was not of this stage.
            wanted: accuracy over the last `window` batches of the stage that ends it.

        Returns:
            Whether a new stage begins.
        """
        config = self.config
        self.since += 1
        if right is not None:
            self.at_stage = [*self.at_stage, right][-config.window :]
        good = len(self.at_stage) == config.window and math.fsum(self.at_stage) > wanted * config.window
        late = config.patience and self.since >= config.patience
        if not (good or late) or not self.further():
            return False
        self.at_stage, self.since = [], 0
        return True

    def state_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {each.name: getattr(self, each.name) for each in fields(self) if each.name not in ("config", "full")}

    def load_state_dict(self, data: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        for key, value in data.items():
            setattr(self, key, value)


@dataclass(frozen=True)
class Outcome:
    """Of a step.

    Attributes:
        loss: on the answers, a mean over rows.
        right: share of right answers.
        rows, tokens: of the batch.
        moved: a new stage begins.
    """

    loss: float
    right: float
    rows: int
    tokens: int
    moved: bool


class StagedTrainer:
    """Trains a model along a curriculum; a subclass says what a step reads and what is asked of the model.

    Args:
        model: on the CPU or a GPU.
        task: prepared.
        config: of the run.
        folder: of the run.
        stages: the curriculum, at its start.
        display: what is shown.
    """

    def __init__(
        self, model: Any, task: Any, config: StagedConfig, folder: Path, *, stages: Stages, display: Silent
    ) -> None:
        self.model, self.task, self.folder, self.display = model, task, folder, display
        self.stages, self._config = stages, config
        self.position = Position()
        groups = model.parameter_groups(lr=config.lr, weight_decay=config.weight_decay)
        self.base_rates = [group["lr"] for group in groups]
        self.optimizer = torch.optim.AdamW(groups, betas=config.betas, fused=True)
        self.generator = torch.Generator().manual_seed(config.seed + 2)
        torch.manual_seed((config.seed + 1) * 1_000_003)
        self._saved_step: int | None = None
        self._stop = False

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        where: torch.device = next(self.model.parameters()).device
        return where

    def read(self) -> Outcome:
        """Draw the batch of this step, add its gradient, and tell the curriculum."""
        raise NotImplementedError

    def title(self) -> str:
        """What is trained."""
        raise NotImplementedError

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint whose model this trainer was made with."""
        self.position = checkpoint.position
        self.stages.load_state_dict(checkpoint.position.lanes)
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
        begin = f"from step {self.position.step} " if self.position.step else ""
        parameters = f"{self.model.num_parameters():,} parameters"
        self.display.start(f"{self.folder}: {parameters}, {self.title()}, {begin}to {self._config.ends}")
        try:
            with on_interrupt(self._stop_soon):
                while self._config.progress(self.position.step, self.position.seconds) < 1 and not self._stop:
                    self._step(log)
                    every = self._config.checkpoint_every
                    if every and self.position.step % every == 0:
                        self._save(log)
                self._save(log)
        finally:
            self.display.stop()
            log.close()
        return self._stop

    def _step(self, log: Log) -> None:
        started = time.perf_counter()
        config, position = self._config, self.position
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        outcome = self.read()
        if not math.isfinite(outcome.loss):
            last = checkpoints.last_good(self.folder / "checkpoints")
            raise DivergedError(f"the loss of step {position.step + 1} is {outcome.loss}; {last}; try a lower train.lr")
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
        seconds = time.perf_counter() - started
        position.seconds += seconds
        position.tokens += outcome.tokens
        sums = {
            "loss": outcome.loss * outcome.rows,
            "right": outcome.right * outcome.rows,
            "rows": outcome.rows,
            "seconds": seconds,
            "tokens": outcome.tokens,
        }
        for name, value in sums.items():
            position.pending[name] = position.pending.get(name, 0.0) + value
        if position.step % config.log_every == 0 or outcome.moved:
            self._log(log, rate, outcome.moved)

    def _log(self, log: Log, rate: float, moved: bool) -> None:
        position, pending = self.position, self.position.pending
        line = {
            "step": position.step,
            "loss": pending["loss"] / pending["rows"],
            "accuracy": pending["right"] / pending["rows"],
            **self.stages.columns(),
            "new_stage": moved,
            "lr": self._config.lr * rate,
            "tokens": position.tokens,
            "tokens_per_second": pending["tokens"] / max(pending["seconds"], 1e-9),
            "seconds": position.seconds,
            "memory": resident_bytes(),
        }
        position.pending = {}
        log.write(line)
        fraction = self._config.progress(position.step, position.seconds)
        eta = position.seconds * (1 - fraction) / fraction if fraction else None
        shown = {"fraction": fraction, "eta": eta, "unit": self.task.unit, "stage": self.stages.words}
        self.display.step({**line, **shown})

    def _save(self, log: Log) -> None:
        if self._saved_step == self.position.step:
            return
        self.position.lanes = self.stages.state_dict()
        tensors = optimizer_tensors(self.optimizer, self.model)
        tensors |= {"random.after_step": self.generator.get_state(), "random.cpu.0": torch.get_rng_state()}
        log.sync()
        folder = self.folder / "checkpoints"
        checkpoints.save(folder, self.position, self.model, tensors, [], group=Group(), keep=self._config.keep)
        self._saved_step = self.position.step

    def _stop_soon(self) -> None:
        self._stop = True
        self.display.message("stopping after this step; again to stop at once, without saving")
