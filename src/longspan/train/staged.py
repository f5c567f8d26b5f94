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
from torch import Tensor

from longspan.config import check_least, check_shares
from longspan.mixers.maps import place_of
from longspan.process import resident_bytes
from longspan.train.checkpoint import Checkpoint
from longspan.train.config import Limits
from longspan.train.distributed import Group
from longspan.train.log import Log
from longspan.train.loop import TrainingLoop
from longspan.train.progress import Silent
from longspan.train.schedule import fraction_done
from longspan.train.step import DivergedError, Optimization

_AT_LEAST_ONE = ("tokens", "window", "log_every", "keep")
_NOT_NEGATIVE = ("patience", "lr", "warmup", "weight_decay", "clip", "seed", "checkpoint_every", "threads")
_SHARES = ("accuracy", "frontier", "constant", "min_lr_ratio")


@dataclass(frozen=True, kw_only=True)
class StagedConfig(Limits):
    """Fields that the `[train]` tables of all curricula share.

    Attributes:
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

    def rate(self, step: int, seconds: float) -> float:
        """What `lr` is multiplied with in step `step` (from 0)."""
        done = fraction_done(self, step, seconds)
        falling = 1.0 if done < self.constant else max((1 - done) / max(1 - self.constant, 1e-9), self.min_lr_ratio)
        return min(1.0, (step + 1) / max(self.warmup, 1)) * falling


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


class StagedTrainer(TrainingLoop):
    """Trains a model along a curriculum, in one process; a subclass says what a step reads and what is asked of it.

    Args:
        model: on the CPU or a GPU.
        task: prepared; it knows the longest text that is trained on.
        config: of the run.
        folder: of the run.
        display: what is shown.
    """

    stages: Stages

    def __init__(self, model: Any, task: Any, config: StagedConfig, folder: Path, *, display: Silent) -> None:
        super().__init__(model, task, config, folder, group=Group(), display=display)
        self.stages = self.first_stage()
        self.optimization = Optimization(model, config, self.group)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return place_of(self.model).device

    def first_stage(self) -> Stages:
        """The curriculum, at its start."""
        raise NotImplementedError

    def read(self) -> Outcome:
        """Draw the batch of this step, add its gradient, and tell the curriculum."""
        raise NotImplementedError

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint whose model this trainer was made with."""
        super().restore(checkpoint)
        self.stages.load_state_dict(checkpoint.position.lanes)
        self.optimization.load_tensors(checkpoint.tensors)

    def _step(self, log: Log | None) -> None:
        started = time.perf_counter()
        config, position = self.config, self.position
        self.optimization.begin()
        outcome = self.read()
        rate = config.rate(position.step, position.seconds)
        try:
            if not math.isfinite(outcome.loss):
                raise DivergedError(f"the loss of step {position.step + 1} is {outcome.loss}")
            self.optimization.update(position.step, rate)
        except DivergedError as error:
            raise DivergedError(f"{error}; {self._advice()}") from None
        position.step += 1
        seconds = time.perf_counter() - started
        position.seconds += seconds
        position.tokens += outcome.tokens
        self._count(
            loss=outcome.loss * outcome.rows,
            right=outcome.right * outcome.rows,
            rows=outcome.rows,
            seconds=seconds,
            tokens=outcome.tokens,
        )
        if position.step % config.log_every == 0 or outcome.moved:
            self._log(log, rate, outcome.moved)

    def _log(self, log: Log | None, rate: float, moved: bool) -> None:
        position, pending = self.position, self.position.pending
        line = {
            "step": position.step,
            "loss": pending["loss"] / pending["rows"],
            "accuracy": pending["right"] / pending["rows"],
            **self.stages.columns(),
            "new_stage": moved,
            "lr": self.config.lr * rate,
            "tokens": position.tokens,
            "tokens_per_second": pending["tokens"] / max(pending["seconds"], 1e-9),
            "seconds": position.seconds,
            "memory": resident_bytes(),
        }
        position.pending = {}
        self._write(log, line, stage=self.stages.words)

    def _data_state(self) -> dict[str, Any]:
        return self.stages.state_dict()

    def _tensors(self) -> dict[str, Tensor]:
        return self.optimization.tensors()
