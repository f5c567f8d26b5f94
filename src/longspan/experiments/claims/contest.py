"""Models that are trained from nothing for a short time, where no trained start fits: of images, of a form of a model.

Their losses are shown next to those of the comparisons from a common start (`continued`), and decide no verdict.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from longspan.experiments.claims.base import Figure, Say
from longspan.experiments.claims.continued.plan import run_folder
from longspan.experiments.claims.runs import measure_once, train_or_resume, trained_seconds
from longspan.files import read_json
from longspan.report.tables import signed
from longspan.tasks.base import evenly, heads
from longspan.train import Interval, evaluate_text, load_run
from longspan.train.evaluate import Evaluation

INTERVALS = "95 % intervals by bootstrap over documents, losses summed over seeds"

ModelRecords = dict[str, list[dict[str, Any]]]
"""Records of each model, one per seed: `alone`, its evaluation on pieces without a carried state, `names` of the
documents, `parameters`, `seconds` of training."""


@dataclass(frozen=True, kw_only=True)
class Contest:
    """Sizes of a comparison: training seeds, held-out text, and the fields of `[train]` that all models share."""

    seeds: int
    head: int
    """bytes of each held-out document; 0: all"""
    documents: int = 0
    """number of held-out documents, evenly spaced; 0: all"""
    train: Mapping[str, Any] = field(default_factory=dict)


def contest(folder: Path, recipes: Mapping[str, Mapping[str, Any]], plan: Contest, say: Say) -> ModelRecords:
    """Train and evaluate every model with every seed; a second call resumes from the folder."""
    models: ModelRecords = {name: [] for name in recipes}
    for seed in range(plan.seeds):
        for name, recipe in recipes.items():
            run = run_folder(folder, name, seed)
            # the loss that counts is measured afterwards
            settings = {"seed": seed, "threads": 1, "eval_every": 0, "final_eval_tokens": 1000, "checkpoint_every": 100}
            train_or_resume({**recipe, "train": {**recipe["train"], **settings, **plan.train}}, run)
            file = run / f"evenly-{plan.documents}x{plan.head}.json"
            record = measure_once(file, functools.partial(_evaluated, run, plan))
            models[name].append({**record, "seconds": trained_seconds([run])})
            bits, seconds = evaluation(record).bits_per_unit, models[name][-1]["seconds"]
            say(f"{name}, seed {seed}: {bits:.3f} bits per byte after {seconds:.0f} s")
    return models


def _evaluated(run: Path, plan: Contest) -> dict[str, Any]:
    """Return nats of each held-out document, read in pieces as long as in training."""
    model, task = load_run(run)
    documents = heads(evenly(task.documents("validation"), plan.documents), plan.head)
    piece = read_json(run / "recipe.json")["train"]["segment_length"]
    value = evaluate_text(model, documents, chunk=piece, memory=False, segment_length=piece)
    return {"alone": value.record(), "names": list(documents.names), "parameters": model.num_parameters()}


def evaluation(record: Mapping[str, Any]) -> Evaluation:
    """Return the evaluation of a record."""
    return Evaluation.of(record["alone"], record["names"])


def sum_seeds(records: Sequence[Mapping[str, Any]]) -> Evaluation:
    """Join the evaluations of several seeds by summing the nats of each document."""
    return functools.reduce(Evaluation.plus, [evaluation(record) for record in records])


def difference(ours: Sequence[Mapping[str, Any]], base: Sequence[Mapping[str, Any]]) -> Interval:
    """Return bits per byte of `ours` minus `base` over the seeds of both, with an interval over documents."""
    seeds = min(len(ours), len(base))
    return sum_seeds(ours[:seeds]).minus(sum_seeds(base[:seeds]))


def bit_figures(models: ModelRecords, base: str, paper: Mapping[str, str], what: str) -> list[Figure]:
    """Return one row per model for the results table: its bits per byte, and the difference to `base`."""
    figures = []
    for name, records in models.items():
        ours = f"{sum_seeds(records).bits_per_unit:.4f}"
        if name != base:
            ours += f"; {signed(difference(records, models[base]))} relative to {base}"
        figures.append(
            Figure(f"{what}, {name}", paper.get(name, ""), f"{ours}; {records[0]['parameters']:,} parameters")
        )
    return figures
