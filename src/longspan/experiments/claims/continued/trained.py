"""The trained runs of a comparison, for what a claim measures beside their losses."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from longspan.experiments.claims.continued.plan import Plan, run_folder
from longspan.experiments.claims.continued.single_run import record_file, saved_losses
from longspan.experiments.claims.runs import measure_once
from longspan.tasks.base import Array, Documents, evenly, heads
from longspan.train import load_run


@dataclass(frozen=True, kw_only=True)
class TrainedRuns:
    """Opens the runs of a comparison; measurements are saved in its folder."""

    folder: Path
    """of the comparison"""
    plan: Plan

    def seeds(self, *names: str) -> list[int]:
        """Return the seeds with which all of some models were trained and measured; none if one of them failed."""
        return [
            seed
            for seed in range(self.plan.seeds)
            if all(record_file(run_folder(self.folder, name, seed), self.plan).is_file() for name in names)
        ]

    def opened(self, name: str, seed: int = 0) -> tuple[Any, Any]:
        """Return the trained model, in evaluation mode, and the task of a run."""
        return load_run(run_folder(self.folder, name, seed))

    def documents(self, task: Any, count: int, reach: int) -> Documents:
        """Return the first `reach` bytes of `count` held-out documents, evenly spaced."""
        return heads(evenly(task.documents("validation"), count), reach)

    def losses(self, name: str) -> list[Array]:
        """Return the loss at every byte of every held-out document of the evaluation, the mean over seeds."""
        parts: Sequence[list[Array]] = [
            saved_losses(run_folder(self.folder, name, seed), self.plan) for seed in self.seeds(name)
        ]
        return [np.stack(document).mean(0, dtype=np.float64) for document in zip(*parts, strict=True)]

    def once(self, name: str, measure: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """Return the record that `measure` makes, from a file of an earlier call with these sizes if there is one."""
        return measure_once(self.folder / f"{name}-{self.plan.documents}x{self.plan.reach}.json", measure)
