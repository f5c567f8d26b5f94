"""Runs of the claim `performer-protein`: their sizes and recipes, training in workers, and scores during training."""

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np

from longspan.errors import CheckpointError, LongspanError
from longspan.experiments.claims.base import Say
from longspan.experiments.claims.runs import measure_once, read_recipe, train_or_resume, trained_seconds
from longspan.files import write_text
from longspan.tasks import Documents, ProteinTask
from longspan.tasks.base import Array
from longspan.tasks.protein import FIRST, is_amino_acid
from longspan.tasks.sources import read_source
from longspan.train import Evaluation, evaluate_text, load_run
from longspan.train import checkpoint as checkpoints
from longspan.train.workers import Done, Workers, run_jobs

CONSTANT = 0.9
"""share of a first training at the full learning rate; the rest is a linear decay"""
PRIOR = 200
"""weight of frequencies against a sequence's own residues: they count as this many (100 to 400 score alike)"""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Size of a model with exact attention and the length of its training; the feed-forward is 4 times as wide."""

    layers: int
    dim: int
    heads: int
    steps: int
    """optimizer steps, a multiple of the plan's `points`"""

    @property
    def name(self) -> str:
        """Name of its run."""
        return f"{self.layers}x{self.dim}"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Sizes of the models, their training, and of what is measured on held-out sequences."""

    shapes: tuple[Shape, ...]
    """of the models with exact attention, by size"""
    scored: int
    """held-out sequences to score"""
    mapped: int
    """held-out sequences whose attention is mapped"""
    longest: int = 250
    """most residues of a mapped sequence"""
    points: int = 10
    """measurements of a first training, evenly spaced"""
    lanes: int = 16
    """rows of a batch"""
    length: int = 256
    """residues per row, in training and in scores"""
    rate: float = 1e-3
    """learning rate of a width of 64; it falls with the square root of the width. After 1.6 million residues at a
    constant rate 2x64 is 0.011 bits better with it than with 3e-3, where losses scatter by a hundredth of a bit"""
    warmup: int = 200
    continued: float = 0.1
    """share of the best model's steps for which it and the models with features continue"""
    features: int = 128
    """random features per head of 32: four per dimension, as the paper has 256 for 64"""
    copies: int = 10
    """differently masked copies of each sequence, about as many as a training reads"""
    recipe: tuple[tuple[str, str, Any], ...] = ()
    """fields of the recipe to set: (table, field, value)"""
    sequences: int = 0
    """sequences to read, the first of the file; 0: all"""
    relabelings: int = 10_000
    """of the amino acids, for the p-values"""
    draws: int = 200
    """resamples of sequences and points for the interval of the extrapolation; 0: no extrapolation"""

    def __post_init__(self) -> None:
        assert all(shape.steps % self.points == 0 for shape in self.shapes), "a measured step needs a checkpoint"


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run to train and to score."""

    run: Path
    """its folder"""
    recipe: Mapping[str, Any]
    plan: Plan
    points: int
    """measurements, evenly spaced; the last is at the end"""
    quiet: bool = False
    """show no progress of the training: several runs share a terminal"""

    @property
    def record(self) -> Path:
        """The file of the measurements, which is written last."""
        return self.run / f"measured-{self.plan.scored}.json"


class Point(NamedTuple):
    """A measurement of a run: residues read in training, and the evaluation on held-out sequences."""

    residues: int
    evaluation: Evaluation


@dataclass(frozen=True, kw_only=True)
class TrainedRun:
    """A run that was trained and scored."""

    folder: Path
    parameters: int
    seconds: float
    """of training"""
    points: Sequence[Point] = field(repr=False)

    @property
    def last(self) -> Evaluation:
        """The evaluation at the end of the training."""
        return self.points[-1].evaluation


def first_job(folder: Path, shape: Shape, plan: Plan, source: str = "") -> Job:
    """Return the first training of a model with exact attention: a constant rate, then a decay.

    Args:
        folder: of the whole claim.
        shape: of the model.
        plan: sizes.
        source: FASTA file to read instead of the recipe's.
    """
    recipe = _recipe(plan, {"name": "full"}, shape.steps, source)
    recipe["model"] |= {
        "num_layers": shape.layers,
        "dim": shape.dim,
        "num_heads": shape.heads,
        "ffn_dim": 4 * shape.dim,
        # heads are wide enough for the usual base
        "rope_theta": 10_000.0,
    }
    recipe["train"] |= {
        "lr": plan.rate * math.sqrt(64 / shape.dim),
        "warmup": plan.warmup,
        "constant": CONSTANT,
        # every measured step has a checkpoint
        "checkpoint_every": shape.steps // plan.points,
        "keep": plan.points + 2,
    }
    return Job(run=folder / shape.name, recipe=_changed(recipe, plan), plan=plan, points=plan.points)


def continued_job(folder: Path, name: str, mixer: Mapping[str, Any], best: Job) -> Job:
    """Return the training of a model that starts from the best one, with its own or another mixer.

    Args:
        folder: of the whole claim.
        name: of the run.
        mixer: table of the mixer of all layers.
        best: job of the model from which it takes its weights.
    """
    plan, first = best.plan, best.recipe
    steps = max(round(plan.continued * first["train"]["steps"]), 1)
    model = {**first["model"], "mixers": [mixer]}
    train = {
        **first["train"],
        "init": str(best.run),
        "steps": steps,
        # the start was trained at twice this rate and then decayed
        "lr": first["train"]["lr"] / 2,
        "warmup": steps // 20,
        "constant": 0.5,
        "checkpoint_every": 500,
        "keep": 2,
    }
    recipe = {**first, "model": model, "train": train}
    return Job(run=folder / "continued" / name, recipe=recipe, plan=plan, points=1)


def _recipe(plan: Plan, mixer: Mapping[str, Any], steps: int, source: str) -> dict[str, Any]:
    """Return the recipe `protein` with a mixer and the batches of the plan."""
    recipe = read_recipe(
        "protein",
        steps=steps,
        lanes=plan.lanes,
        segment_length=plan.length,
        min_lr_ratio=0.0,
        # the losses that count are measured afterwards, so one sequence is enough at the end of training
        final_eval_tokens=1000,
        threads=1,
        device="cpu",
    )
    recipe["model"]["mixers"] = [mixer]
    recipe["task"] |= {"copies": plan.copies} | ({"source": source} if source else {})
    return recipe


def _changed(recipe: dict[str, Any], plan: Plan) -> dict[str, Any]:
    """Set the fields of the recipe that the plan names."""
    for table, name, value in plan.recipe:
        recipe[table][name] = value
    return recipe


def first_sequences(path: Path, count: int) -> Path:
    """Write the first `count` sequences of the source to a FASTA file, unless an earlier call did; return its path."""
    if not path.is_file():
        sequences = read_source("proteins")[:count]
        write_text(path, "".join(f">{name}\n{bytes(residues).decode()}\n" for name, residues in sequences))
    return path


def train_all(jobs: Sequence[Job], workers: Workers, say: Say) -> list[TrainedRun]:
    """Train and score runs in several processes; return them in the order of the jobs. A second call resumes.

    Raises:
        LongspanError: a run failed; the others have ended.
    """
    left = [job for job in jobs if not job.record.is_file()]

    def report(job: Job, done: Done) -> None:
        """Print what became of a run."""
        say(f"{job.run.name}: {done.failure or f'trained in {trained_seconds([job.run]) / 60:.0f} minutes'}")

    for job, done in zip(left, run_jobs(train_and_score, left, workers, report), strict=True):
        if done.failure:
            raise LongspanError(
                f"performer-protein: the run {job.run.name} failed: {done.failure}; run the command again to resume"
            )
    return [_opened(job) for job in jobs]


def train_and_score(job: Job) -> dict[str, Any]:
    """Train a run, or resume it, and score it at every point; delete its checkpoints.

    Returns:
        Plain data: `parameters`, `seconds` of training, `names` of the held-out sequences, and `points`: `residues`
        that were read in training, and the totals of the evaluation per sequence.
    """
    return measure_once(job.record, lambda: _trained_and_scored(job))


def _trained_and_scored(job: Job) -> dict[str, Any]:
    """Train a run, score its checkpoints and its trained model, and delete the checkpoints."""
    train_or_resume(job.recipe, job.run, progress="none" if job.quiet else None)
    model, task = cast("tuple[Any, ProteinTask]", load_run(job.run))
    held_out = held_out_of(task, job.plan)
    steps, width = job.recipe["train"]["steps"], job.recipe["train"]["segment_length"]
    saved = {int(path.name.partition("-")[2]): path for path in checkpoints.list_checkpoints(job.run / "checkpoints")}
    points = []
    for step in (steps * (index + 1) // job.points for index in range(job.points)):

        def score(step: int = step) -> dict[str, Any]:
            """Score the model after `step` steps."""
            if step != steps and step not in saved:
                raise CheckpointError(f"{job.run}: has no checkpoint of step {step}; remove this folder to train again")
            trained = model if step == steps else checkpoints.read(saved[step]).model.eval()
            return evaluate_text(trained, held_out, chunk=width, memory=False, unit="residue").record()

        totals = measure_once(job.run / f"scored-{len(held_out)}" / f"step-{step}.json", score)
        points.append({"residues": step * width * job.recipe["train"]["lanes"], "totals": totals})
    # checkpoints with their moments need as much room as hundreds of measurements
    shutil.rmtree(job.run / "checkpoints", ignore_errors=True)
    return {
        "parameters": model.num_parameters(),
        "seconds": trained_seconds([job.run]),
        "names": list(held_out.names),
        "points": points,
    }


def held_out_of(task: ProteinTask, plan: Plan) -> Documents:
    """Return the masked held-out sequences to score."""
    held_out = task.documents("validation")
    return Documents(held_out.items[: plan.scored], held_out.names[: plan.scored])


def _opened(job: Job) -> TrainedRun:
    """Read the measurements of a run."""
    record = train_and_score(job)
    points = [
        Point(point["residues"], Evaluation.of(point["totals"], record["names"], "residue"))
        for point in record["points"]
    ]
    return TrainedRun(folder=job.run, parameters=record["parameters"], seconds=record["seconds"], points=points)


def by_frequency(documents: Documents, frequencies: Array, prior: float = math.inf) -> Evaluation:
    """Score a predictor that knows only the frequencies of the amino acids.

    With a finite `prior` it also counts the residues of the sequence itself, and the frequencies weigh as `prior`
    residues: the best prediction that ignores order.
    """
    rows = []
    for index in range(len(documents)):
        part = documents[index].cut(0, len(documents[index]))
        residues, shares = part.targets[part.graded] - FIRST, frequencies
        if prior < math.inf:
            seen = part.tokens[is_amino_acid(part.tokens)] - FIRST
            shares = np.bincount(seen, minlength=len(frequencies)) + prior * frequencies
            shares = shares / shares.sum()
        rows.append((-np.log(shares[residues]).sum(), len(residues), (residues == shares.argmax()).sum()))
    nats, tokens, correct = np.array(rows).T
    counts = tokens.astype(np.int64)
    return Evaluation(tuple(documents.names), nats, counts, counts, correct.astype(np.int64), "residue")
