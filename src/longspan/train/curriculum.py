"""Training along a curriculum: base classes of the trainers whose data depends on the stage reached.

The folder is that of any run (`longspan.train.run`): recipe.json, log.jsonl, tokenizer.json, checkpoints/, model/. The
batch of a step depends only on the seed, the step and the stage, so a resumed run of fixed `steps` continues with
results identical bit for bit.
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
    """Fields that the `[train]` tables of all curricula share; see `RunConfig` for the others.

    Attributes:
        tokens: approximate number of tokens per batch, from which the number of rows follows.
        accuracy: a stage ends when the mean accuracy of its last `window` batches is above this.
        window: number of batches over which accuracy is averaged.
        patience: steps after which a stage ends in any case; 0: never.
        frontier: share of batches from the current stage; the others are from earlier stages.
    """

    tokens: int = 32_000
    accuracy: float = 0.93
    window: int = 10
    patience: int = 0
    frontier: float = 0.5
    warmup: int = 50
    constant: float | None = 0.6
    min_lr_ratio: float = 0.05
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.01
    checkpoint_every: int = 200
    device: str = "cpu"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, "train", {"tokens": 1, "window": 1, "patience": 0})
        check_shares(self, "train", ("accuracy", "frontier", "min_lr_ratio"))


@dataclass
class Stages:
    """Progress of a run in its curriculum, as plain data that can be saved; subclasses define the stages.

    Attributes:
        config: `[train]` table of the run.
        full: final value of the length that grows from stage to stage.
        since: steps since the current stage began.
        at_stage: accuracy of the last `window` batches of the current stage.
    """

    config: Any
    full: int
    since: int = 0
    at_stage: list[float] = field(default_factory=list)

    def further(self) -> bool:
        """Go to the next stage; return False in the last stage."""
        raise NotImplementedError

    def columns(self) -> dict[str, Any]:
        """Return the figures of the stage for a line of the log."""
        raise NotImplementedError

    @property
    def words(self) -> tuple[str, str]:
        """The stage as two short texts for the progress display."""
        raise NotImplementedError

    def count(self, right: float | None, threshold: float) -> bool:
        """Record a step and end the stage if it is learned or has lasted too long; return whether a new one begins.

        Args:
            right: accuracy of the batch; None: the batch was not of the current stage.
            threshold: mean accuracy over the last `window` batches above which the stage ends.
        """
        config = self.config
        self.since += 1
        if right is not None:
            self.at_stage = [*self.at_stage, right][-config.window :]
        is_learned = len(self.at_stage) == config.window and math.fsum(self.at_stage) > threshold * config.window
        is_late = config.patience and self.since >= config.patience
        if not (is_learned or is_late) or not self.further():
            return False
        self.at_stage, self.since = [], 0
        return True

    def state_dict(self) -> dict[str, Any]:
        """Return the progress as plain data for a checkpoint."""
        return {key: value for key, value in vars(self).items() if key not in ("config", "full")}

    def load_state_dict(self, data: Mapping[str, Any]) -> None:
        """Restore the progress that `state_dict` returned."""
        vars(self).update(data)


@dataclass(frozen=True)
class Outcome:
    """Figures of one training step.

    Attributes:
        loss: on the answers, in nats, a mean over rows.
        right: share of correct answers.
        rows: number of rows of the batch.
        tokens: number of tokens of the batch.
        moved: whether a new stage begins after this step.
    """

    loss: float
    right: float
    rows: int
    tokens: int
    moved: bool
    units = 0

    @property
    def sums(self) -> dict[str, float]:
        """Amounts that are summed up for a line of the log."""
        return {"loss": self.loss * self.rows, "right": self.right * self.rows, "rows": self.rows}


class CurriculumTrainer(TrainingLoop):
    """Trains a model along a curriculum in one process; subclasses define the stages, the batches and the loss.

    Arguments are those of `TrainingLoop` without `group`.
    """

    config: CurriculumConfig
    stages: Stages

    def __init__(self, model: Any, task: Any, config: CurriculumConfig, folder: Path, *, display: Display) -> None:
        super().__init__(model, task, config, folder, group=Group(), display=display)
        self.stages = self.data = self.first_stage()
        self.optimization = Optimization(model, config, self.group)

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return device_and_dtype(self.model).device

    def first_stage(self) -> Stages:
        """Return the curriculum at its first stage."""
        raise NotImplementedError

    def read(self) -> Outcome:
        """Draw the batch of this step, add its gradients, and update the curriculum."""
        raise NotImplementedError

    def _train(self, rate: float) -> Outcome:
        """Make one training step at `rate` times the learning rate.

        Raises:
            DivergedError: the loss is not finite.
        """
        step = self.position.step
        self.optimization.begin()
        outcome = self.read()
        if not math.isfinite(outcome.loss):
            raise DivergedError(f"the loss of step {step + 1} is {outcome.loss}, not a finite number")
        self.optimization.update(step, rate)
        return outcome

    def _line_is_due(self, outcome: Outcome) -> bool:
        """Return whether a new stage begins, which is logged at once."""
        return outcome.moved

    def _figures(self, outcome: Outcome) -> dict[str, Any]:
        """Return mean loss and accuracy since the last log line, and the stage, for a log line."""
        pending = self.position.pending
        means = {"loss": pending["loss"] / pending["rows"], "accuracy": pending["right"] / pending["rows"]}
        return means | self.stages.columns() | {"new_stage": outcome.moved}

    def _display_fields(self) -> dict[str, Any]:
        """Return the description of the current stage for the progress display."""
        return {"stage": self.stages.words}
