"""One run of a comparison: trained from the start, then measured from its checkpoints and its trained model."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from longspan.errors import CheckpointError
from longspan.experiments.claims.continued.curves import Point
from longspan.experiments.claims.continued.plan import ModelSpec, Plan, recipe_of, run_folder
from longspan.experiments.claims.runs import measure_once, train_or_resume
from longspan.files import read_json, read_tensors, write_tensors
from longspan.models import build_model
from longspan.tasks.base import Array, Documents, evenly, heads
from longspan.train import checkpoint as checkpoints
from longspan.train import evaluate_text, lm_evaluation, load_run, recurrence
from longspan.train.distributed import Group
from longspan.train.init import SUMMARY, start_from
from longspan.train.starts import recipe_hash

# tokens per call of a model that carries its state; does not change losses
CHUNK, ROWS = 512, 16


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run to train and to measure."""

    spec: ModelSpec
    plan: Plan
    seed: int
    folder: Path
    """of the whole comparison"""
    quiet: bool = False
    """show no progress of the training: several runs share a terminal"""

    @property
    def run(self) -> Path:
        """The folder of the run."""
        return run_folder(self.folder, self.spec.name, self.seed)

    @property
    def record(self) -> Path:
        """The file of the measurements, which is written last."""
        return record_file(self.run, self.plan)


def record_file(run: Path, plan: Plan) -> Path:
    """Return the file of the measurements of a run."""
    return run / f"measured-{_measured_sizes(plan)}.json"


def _measured_sizes(plan: Plan) -> str:
    """Return the sizes of the measurements of a run as text."""
    return f"{plan.documents}x{plan.reach}-{plan.first}-{plan.curve_documents}x{plan.curve_reach}"


def is_record_of(record: Mapping[str, Any], job: Job) -> bool:
    """Return whether measurements are those of a run by the recipe of a job, with the measurements of its plan."""
    same_recipe = record.get("recipe") == recipe_hash(recipe_of(job.spec, job.plan, job.seed))
    return same_recipe and record.get("measured") == _measured_sizes(job.plan)


def train_and_measure(job: Job) -> dict[str, Any]:
    """Train a run and measure it; a second call resumes, and a measured run is read from its files.

    A run that another claim in the same output folder made by the same recipe is copied.

    Returns:
        Plain data: `recipe` (its digest), `measured` (sizes of the measurements), `seed`, `parameters`,
        `taken_parameters`, `new`, `steps`, `tokens`, `seconds`, `curve` (see `Curve`), `documents`, `nats` and `units`
        per document, `first` (the same of their first bytes), `positions` and `distances` (see `_places`), `flops` of a
        forward pass per byte, `state` (bytes at two lengths; None: the model does not stream).
    """
    if not job.record.is_file() and (same := _same_run(job)) is not None:
        shutil.copytree(same, job.run, dirs_exist_ok=True)
    return measure_once(job.record, lambda: _trained_and_measured(job))


def _same_run(job: Job) -> Path | None:
    """Return the folder of a measured run of another claim with the same recipe and measurements, if there is one."""
    digest = recipe_hash(recipe_of(job.spec, job.plan, job.seed))
    # claims may give the same model different names
    for run in sorted(job.folder.parent.glob(f"*/*/{job.run.name}")):
        record = record_file(run, job.plan)
        # a restored record has no weights, which the other claim may need
        if record.is_file() and (run / "model").is_dir() and read_json(record).get("recipe") == digest:
            return run
    return None


def _trained_and_measured(job: Job) -> dict[str, Any]:
    """Train a run, or resume it, and measure it; delete its checkpoints."""
    recipe = recipe_of(job.spec, job.plan, job.seed)
    train_or_resume(recipe, job.run, progress="none" if job.quiet else None)
    model, task = load_run(job.run)
    held_out = task.documents("validation")
    curve = _measured_curve(job, recipe, held_out)
    documents = heads(evenly(held_out, job.plan.documents), job.plan.reach)
    nats = _losses(job, model, documents)
    start = read_json(job.run / SUMMARY)
    record = {
        "recipe": recipe_hash(recipe),
        "measured": _measured_sizes(job.plan),
        "seed": job.seed,
        "parameters": model.num_parameters(),
        "taken_parameters": start["taken_parameters"],
        "new": start["new"],
        "steps": curve[-1].step,
        "tokens": curve[-1].tokens,
        "seconds": curve[-1].seconds,
        "curve": [list(point) for point in curve],
        "documents": list(documents.names),
        "nats": [float(losses.sum(dtype=np.float64)) for losses in nats],
        "units": documents.lengths.tolist(),
        "first": {
            "nats": [float(losses[: job.plan.first].sum(dtype=np.float64)) for losses in nats],
            "units": documents.lengths.clip(max=job.plan.first).tolist(),
        },
        **_places(nats, documents, job.plan.reach),
        "flops": model.flops(job.plan.length) / job.plan.length,
        "state": _state_bytes(model, job.plan),
    }
    # ten checkpoints of a small model need as much room as thousands of measurements
    shutil.rmtree(job.run / "checkpoints", ignore_errors=True)
    return record


def _measured_curve(job: Job, recipe: Mapping[str, Any], held_out: Documents) -> list[Point]:
    """Measure the held-out loss at step 0 and at the measured steps, each from a file if an earlier call saved it.

    Raises:
        CheckpointError: a checkpoint is missing, because the run was measured with other sizes before.
    """
    plan = job.plan
    documents = heads(evenly(held_out, plan.curve_documents), plan.curve_reach)
    folder = job.run / f"curve-{plan.curve_documents}x{plan.curve_reach}"
    saved = {int(path.name.partition("-")[2]): path for path in checkpoints.list_checkpoints(job.run / "checkpoints")}
    last = max(saved, default=plan.steps)
    points = [_measured_point(folder, 0, lambda: (_initial_model(recipe, job), 0, 0.0), job, documents)]
    # a run that the clock ended has fewer steps
    for step in sorted({*(step for step in plan.measured_steps if step < last), last}):

        def opened(step: int = step) -> tuple[Any, int, float]:
            """Return the model after `step` steps, its tokens and its seconds."""
            if step not in saved:
                raise CheckpointError(
                    f"{job.run}: has no checkpoint of step {step}; remove this folder to train the run again"
                )
            checkpoint = checkpoints.read(saved[step])
            return checkpoint.model, checkpoint.position.tokens, checkpoint.position.seconds

        points.append(_measured_point(folder, step, opened, job, documents))
    return points


def _measured_point(folder: Path, step: int, opened: Any, job: Job, documents: Documents) -> Point:
    """Return the held-out loss of the model that `opened` returns with its tokens and seconds, from a file if saved."""

    def measure() -> dict[str, Any]:
        """Evaluate the model."""
        model, tokens, seconds = opened()
        memory = job.spec.carries
        # without carried states a call reads whole pieces
        chunk, rows = (CHUNK, ROWS) if memory else (job.plan.length, job.plan.rows)
        bits = evaluate_text(model, documents, memory=memory, chunk=chunk, batch=rows).bits_per_unit
        return {"tokens": tokens, "seconds": seconds, "bits": bits}

    return Point(step=step, **measure_once(folder / f"step-{step}.json", measure))


def _initial_model(recipe: Mapping[str, Any], job: Job) -> Any:
    """Return the model of a run before its first step: initialized with its seed, with the weights of the start."""
    _, task = load_run(job.run)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(job.seed)
        model = build_model({**recipe["model"], "vocab_size": task.vocab_size})
        start_from(model, job.plan.start_of(job.spec), task, Group(device=torch.device("cpu")))
    return model.eval()


def _losses(job: Job, model: Any, documents: Documents) -> list[Array]:
    """Return the loss of every byte of the held-out documents, from the file of an earlier call if there is one."""
    plan = job.plan
    path = _losses_file(job.run, plan)
    if not path.is_file():
        window = None if job.spec.carries else lm_evaluation.Window(plan.length, plan.length)
        nats = lm_evaluation.place_nats(model, documents, window, chunk=CHUNK, batch=ROWS)
        write_tensors(path, {str(index): torch.from_numpy(losses) for index, losses in enumerate(nats)}, {})
    return saved_losses(job.run, plan)


def saved_losses(run: Path, plan: Plan) -> list[Array]:
    """Return the loss of every byte of the held-out documents of a measured run."""
    tensors, _ = read_tensors(_losses_file(run, plan))
    return [tensors[str(index)].numpy() for index in range(len(tensors))]


def _losses_file(run: Path, plan: Plan) -> Path:
    """Return the file of the losses of every byte."""
    return run / f"losses-{plan.documents}x{plan.reach}.safetensors"


def _places(nats: Sequence[Array], documents: Documents, reach: int) -> dict[str, Any]:
    """Return losses by position and by distance to the last occurrence of the same context, as plain data.

    `positions`: `edges` of the ranges, and `nats` (documents, ranges) of the documents that are long enough to have all
    positions, so that every range has the same text; the edges end where a third of the documents still reach.
    `distances`: lower ends, and `nats` and `units` (documents, ranges).
    """
    lengths = documents.lengths
    # the reach of the plan, or less where too few documents have it
    end = min(reach, int(np.sort(lengths)[-max(-(-len(lengths) // 3), 1)]))
    edges = recurrence.position_edges(end)
    long = [losses for losses in nats if len(losses) >= end]
    pairs = [
        recurrence.by_distance(losses, recurrence.distances(document.cut(0, len(document)).targets))
        for losses, document in zip(nats, documents.items, strict=True)
    ]
    return {
        "positions": {"edges": edges, "nats": [recurrence.by_position(losses, edges).tolist() for losses in long]},
        "distances": {
            "edges": list(recurrence.DISTANCES),
            "nats": [sums.tolist() for sums, _ in pairs],
            "units": [counts.tolist() for _, counts in pairs],
        },
    }


def _state_bytes(model: Any, plan: Plan) -> dict[str, int] | None:
    """Return the bytes of the state of one text after half of the reach and after all of it; None: does not stream."""
    if not model.traits.streams:
        return None
    return {str(length): model.state_nbytes(1, length) for length in (plan.reach // 2, plan.reach)}
