"""Training in stages: a curriculum says what a step reads, in a run folder that can be resumed.

The folder is that of any run (`longspan.train.run`): recipe.json, log.jsonl, tokenizer.json, checkpoints/, model/. What
a step reads is a function of the seed, the step and the stage reached, so a resumed run of fixed `steps` goes on bit
for bit.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from longspan.config import check_least, check_shares
from longspan.contract.maps import device_and_dtype
from longspan.train.config import RunConfig
from longspan.train.distributed import Group
from longspan.train.loop import TrainingLoop
from longspan.train.progress import Display
from longspan.train.step import DivergedError, Optimization


@dataclass(frozen=True, kw_only=True)
class CurriculumConfig(RunConfig):
    """Fields that the `[train]` tables of all curricula share; more of them in `RunConfig`.

    Attributes:
        tokens: of a batch, about: its rows follow from their length.
        accuracy: of the last `window` batches at a stage that ends it.
        window: batches.
        patience: steps after which a stage ends in any case; 0 = never.
        frontier: share of the batches at the stage reached; the others are of any before it.
        constant: share of the run at the largest rate; it then falls linearly to `min_lr_ratio` of it.
    """

    tokens: int = 32_000
    accuracy: float = 0.93
    window: int = 10
    patience: int = 0
    frontier: float = 0.5
    warmup: int = 50
    constant: float = 0.6
    min_lr_ratio: float = 0.05
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.01
    checkpoint_every: int = 200
    device: str = "cpu"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, "train", {"tokens": 1, "window": 1, "patience": 0})
        check_shares(self, "train", ("accuracy", "frontier", "constant", "min_lr_ratio"))

    def rate(self, step: int, seconds: float) -> float:
        """What `lr` is multiplied with in step `step` (from 0)."""
        done = self.fraction_done(step, seconds)
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
        """Count a step, and end the stage where it is learnt or has lasted too long: whether a new one begins.

        Args:
            right: accuracy of its batch; None = the batch was not of this stage.
            wanted: accuracy over the last `window` batches of the stage that ends it.
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
        return {key: value for key, value in vars(self).items() if key not in ("config", "full")}

    def load_state_dict(self, data: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        vars(self).update(data)


@dataclass(frozen=True)
class Outcome:
    """Of a step: the loss on the answers (a mean over rows), the share of right ones, rows and tokens of the batch, and
    whether a new stage begins.
    """

    loss: float
    right: float
    rows: int
    tokens: int
    moved: bool
    units = 0

    @property
    def sums(self) -> dict[str, float]:
        """What a line of the log adds up."""
        return {"loss": self.loss * self.rows, "right": self.right * self.rows, "rows": self.rows}


class CurriculumTrainer(TrainingLoop):
    """Trains a model along a curriculum, in one process; a subclass says what a step reads and what is asked of it.
    Arguments as of the base; the task knows the longest text that is trained on.
    """

    config: CurriculumConfig
    stages: Stages

    def __init__(self, model: Any, task: Any, config: CurriculumConfig, folder: Path, *, display: Display) -> None:
        super().__init__(model, task, config, folder, group=Group(), display=display)
        self.stages = self.data = self.first_stage()
        self.optimization = Optimization(model, config, self.group)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return device_and_dtype(self.model).device

    def first_stage(self) -> Stages:
        """The curriculum, at its start."""
        raise NotImplementedError

    def read(self) -> Outcome:
        """Draw the batch of this step, add its gradient, and tell the curriculum."""
        raise NotImplementedError

    def _train(self, rate: float) -> Outcome:
        step = self.position.step
        self.optimization.begin()
        outcome = self.read()
        if not math.isfinite(outcome.loss):
            raise DivergedError(f"the loss of step {step + 1} is {outcome.loss}")
        self.optimization.update(step, rate)
        return outcome

    def _line_is_due(self, outcome: Outcome) -> bool:
        return outcome.moved

    def _figures(self, outcome: Outcome) -> dict[str, Any]:
        pending = self.position.pending
        means = {"loss": pending["loss"] / pending["rows"], "accuracy": pending["right"] / pending["rows"]}
        return means | self.stages.columns() | {"new_stage": outcome.moved}

    def _shown(self) -> dict[str, Any]:
        return {"stage": self.stages.words}
