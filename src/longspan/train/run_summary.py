"""Facts about runs and attention transfers, read from their small files: no weights, no training data.

A folder is a run if it has a `recipe.json` of a run, or what is left of one: a log beside a folder of checkpoints.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple

from longspan import renames
from longspan.config import from_dict
from longspan.errors import CheckpointError, ConfigError
from longspan.files import read_object
from longspan.models.io import is_converted
from longspan.train import checkpoint as checkpoints
from longspan.train import folders
from longspan.train import transfer_store as store
from longspan.train.checkpoint import META_NAMES, list_checkpoints
from longspan.train.config import TrainConfig
from longspan.train.lock import is_locked
from longspan.train.log import read_log
from longspan.train.opening import TABLES, stored_recipe

# names of a pretrained model's sizes, which differ between families
_NUM_LAYERS = ("num_hidden_layers", "n_layer", "num_layers")
_DIM = ("hidden_size", "n_embd", "d_model")

State = Literal["finished", "interrupted", "running", "damaged"]


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """Facts about a run, or about an attention transfer."""

    folder: Path
    """of the run; of a transfer, the folder of its model"""
    task: str
    """`task.name` of its recipe, `"transfer"` for a transfer; empty if the recipe cannot be read"""
    corpus: str
    """what the task reads: `sotu`, `wikitext`, paths separated by commas, or the kind of the task such as `detect`; may
    be empty"""
    mechanism: str
    """names of the mixers, such as `window + full`, and what is around them: `recurrent memory over ...`"""
    num_layers: int | None
    """layers of the model; None: unknown, as are those of a pretrained model that is gone"""
    dim: int | None
    """width of the model"""
    state: State
    """running: its folder is locked; damaged: it can be neither used nor resumed; interrupted: it can be resumed"""
    problem: str
    """why the run is damaged, one line; empty for others"""
    step: int
    """optimizer steps done, by the log or the newest checkpoint, whichever is further"""
    planned_steps: int | None
    """steps after which the run ends; None: only the time ends it"""
    planned_minutes: float | None
    """training time after which the run ends; None: only the steps end it"""
    tokens: int | None
    """predictions trained on; of a transfer, positions read, padding included; None: unknown"""
    best_loss: float | None
    """smallest held-out loss that the log has; None: never evaluated"""
    last_loss: float | None
    """held-out loss of the last evaluation"""
    loss_unit: str
    """of both losses: `bits per byte`, `bits per residue` ..., of a transfer `relative error`, the mean over layers;
    empty if never evaluated"""
    seconds: float
    """training time, without evaluation and saving"""
    changed: datetime
    """last change of the log, the checkpoints or the model, in local time"""

    def plain(self) -> dict[str, Any]:
        """Return all fields as plain data for JSON: the folder as text, `changed` in the format of ISO 8601."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {**values, "folder": str(self.folder), "changed": self.changed.isoformat(timespec="seconds")}


def summarize_runs(folder: str | Path) -> list[RunSummary]:
    """Summarize a run or, for any other folder, all runs below it, sorted by path.

    Folders inside a run and hidden folders are not searched. Links are followed; a run that several paths lead to is
    listed once. What cannot be read is skipped.
    """
    return list(_visit(Path(folder), set()))


def _visit(folder: Path, visited: set[Path]) -> Iterator[RunSummary]:
    """Yield the summaries of a folder that was not visited before, or of those below it."""
    real = folder.resolve()
    if real in visited:
        return
    visited.add(real)
    summaries: list[RunSummary] = []
    children: list[Path] = []
    with contextlib.suppress(OSError):
        summaries = read_summaries(folder)
    yield from summaries
    if summaries:
        return
    with contextlib.suppress(OSError):
        children = sorted(path for path in folder.iterdir() if not path.name.startswith(".") and path.is_dir())
    for child in children:
        yield from _visit(child, visited)


def read_summaries(folder: Path) -> list[RunSummary]:
    """Summarize the run in a folder, or the sets of layers of a transfer; an empty list if it contains neither."""
    parts = sorted((folder / store.TRANSFER).glob(f"layers-*/{store.SETTINGS}"))
    if parts:
        return [_summarize_transfer(folder, path.parent) for path in parts]
    return [_summarize_run(folder)] if _is_run(folder) else []


def _is_run(folder: Path) -> bool:
    """Return whether a folder is a run, also one whose recipe is damaged or missing."""
    if (folder / "log.jsonl").is_file() and (folder / "checkpoints").is_dir():
        return True
    return all(isinstance(_lenient(folder / "recipe.json").get(name), Mapping) for name in TABLES)


def _lenient(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; an empty one if it is missing or damaged, which other functions report."""
    try:
        return read_object(path) if path.is_file() else {}
    except (CheckpointError, OSError):
        return {}


def _summarize_run(folder: Path) -> RunSummary:
    """Summarize the run in a folder."""
    # looked at first: a run that ends while it is read was running
    running = is_locked(folder)
    tables, lines = _lenient(folder / "recipe.json"), read_log(folder / "log.jsonl")
    model, task, train = (_table(tables, name) for name in TABLES)
    problem, position = "", dict[str, Any]()
    try:
        stored_recipe(folder)
        position = _newest_position(folder, META_NAMES)
        _check_model(folder / "model")
    except CheckpointError as error:
        problem = str(error)
    step = round(_furthest(lines, position, "step"))
    # curricula have no evaluation at the end
    evaluated = "eval_every" not in train or any("validation" in line and line["step"] == step for line in lines)
    state = _state(running, problem, finished=evaluated and (folder / "model").is_dir())
    plan = _plan(train)
    return RunSummary(
        folder=folder,
        task=str(task.get("name", "")),
        corpus=_corpus(task),
        **_model_facts(model, folder / "model")._asdict(),
        state=state,
        problem=problem if state == "damaged" else "",
        step=step,
        planned_steps=plan.step_limit if plan else None,
        planned_minutes=plan.minutes if plan else None,
        tokens=round(_furthest(lines, position, "tokens")),
        **_held_out(lines)._asdict(),
        seconds=_furthest(lines, position, "seconds"),
        changed=_changed(folder, "recipe.json", "log.jsonl", "checkpoints", "model"),
    )


def _summarize_transfer(folder: Path, part: Path) -> RunSummary:
    """Summarize the transfer of a set of layers: `part` is its folder, `folder` that of the model."""
    running, report = is_locked(part), part / store.REPORT
    settings, lines = _lenient(part / store.SETTINGS), read_log(part / "log.jsonl")
    problem, finished, position = "", False, dict[str, Any]()
    try:
        read_object(part / store.SETTINGS)
        finished = report.is_file() and bool(read_object(report)) and is_converted(folder)
        if not finished:
            position = _newest_position(part, META_NAMES - {"blocks"})
    except CheckpointError as error:
        problem = str(error)
    state = _state(running, problem, finished=finished)
    step, layers = round(_furthest(lines, position, "step")), part.name.removeprefix("layers-")
    model = _pretrained_facts([Path(str(settings.get("model", ""))), folder])
    mechanism = str(settings.get("to") or model.mechanism)
    steps, distill, batch, length = (_whole(settings, (name,)) for name in ("steps", "distill", "batch", "length"))
    return RunSummary(
        folder=folder,
        task="transfer",
        corpus=_corpus({"source": settings.get("text", "")}),
        mechanism=mechanism if layers == "all" else f"{mechanism} in layers {layers}",
        num_layers=model.num_layers,
        dim=model.dim,
        state=state,
        problem=problem if state == "damaged" else "",
        step=step,
        planned_steps=None if steps is None else steps + (distill or 0),
        planned_minutes=None,
        tokens=None if batch is None or length is None else step * batch * length,
        **_mean_errors(lines)._asdict(),
        seconds=_furthest(lines, position, "seconds"),
        changed=_changed(part, store.SETTINGS, "log.jsonl", "checkpoints", store.REPORT),
    )


def _state(running: bool, problem: str, *, finished: bool) -> State:
    """Return the state of a run; what is missing or half written in a running one is no damage."""
    if running:
        return "running"
    if problem:
        return "damaged"
    return "finished" if finished else "interrupted"


def _table(tables: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Return a table of a recipe; an empty one if it is missing."""
    table = tables.get(name)
    return table if isinstance(table, Mapping) else {}


def _newest_position(folder: Path, names: frozenset[str]) -> dict[str, Any]:
    """Return the position of the newest checkpoint that has all its files; empty if there is no checkpoint.

    Args:
        folder: of the run, or of a set of layers.
        names: entries of `meta.json`.

    Raises:
        CheckpointError: all checkpoints are damaged, and there is no trained model in the folder.
    """
    problem: CheckpointError | None = None
    for path in list_checkpoints(folder / "checkpoints"):
        try:
            meta = checkpoints.read_meta(path, names)
            folders.check_present(path, _table(meta, "files"))
        except CheckpointError as error:
            problem = problem or error
            continue
        return dict(_table(meta, "position"))
    if problem is not None and not (folder / "model").is_dir():
        raise problem
    return {}


def _check_model(folder: Path) -> None:
    """Raise CheckpointError if a file of a trained model is missing; their contents are not read."""
    digests = folder / folders.DIGESTS
    if digests.is_file():
        folders.check_present(folder, _table(read_object(digests), "files"))


class _ModelFacts(NamedTuple):
    """Fields of a `RunSummary` about the model."""

    mechanism: str
    num_layers: int | None
    dim: int | None


def _model_facts(table: Mapping[str, Any], trained: Path) -> _ModelFacts:
    """Return what the `[model]` table of a recipe says; for a pretrained model, what is at its source.

    Args:
        table: of the recipe.
        trained: folder of the trained model.
    """
    if "source" in table:
        facts = _pretrained_facts([Path(str(table["source"])), trained])
        facts = facts._replace(mechanism=f"{facts.mechanism}, pretrained")
    else:
        names = _names(table.get("mixers"), "name")
        facts = _ModelFacts(names, _whole(table, ("num_layers",)), _whole(table, ("dim",)))
    memory = table.get("memory")
    if isinstance(memory, Mapping):
        kind = "memory per layer" if memory.get("per_layer") else "recurrent memory"
        facts = facts._replace(mechanism=f"{kind} over {facts.mechanism}")
    return facts


def _pretrained_facts(candidates: Sequence[Path]) -> _ModelFacts:
    """Return the facts of the first folder that has the configuration of a model of transformers."""
    for folder in candidates:
        config = _lenient(folder / "config.json")
        if config:
            sizes = {**config, **_table(config, "text_config")}
            names = _names(config.get("longspan"), "mixer") or "softmax"
            return _ModelFacts(names, _whole(sizes, _NUM_LAYERS), _whole(sizes, _DIM))
    return _ModelFacts("unknown", None, None)


def _names(tables: Any, field: str) -> str:
    """Return the present names of mechanisms in a field of tables, each name once."""
    rows = tables if isinstance(tables, list) else []
    names = [str(table.get(field, "")) for table in rows if isinstance(table, Mapping)]
    with renames.reading_saved():
        return " + ".join(dict.fromkeys(renames.mixer(name) for name in names))


def _whole(table: Mapping[str, Any], names: Sequence[str]) -> int | None:
    """Return the first of some fields that is a whole number; None if there is none."""
    return next((table[name] for name in names if isinstance(table.get(name), int)), None)


def _corpus(task: Mapping[str, Any]) -> str:
    """Return what a task reads, as `RunSummary.corpus`."""
    if task.get("corpus", "text") != "text":
        return str(task["corpus"])
    source = task.get("source", task.get("kind", ""))
    return ", ".join(map(str, source)) if isinstance(source, list) else str(source)


def _plan(train: Mapping[str, Any]) -> TrainConfig | None:
    """Return the length of a run from the `[train]` table of any kind; None if it is damaged or missing."""
    if not train:
        return None
    names = ("steps", "minutes", "stages")
    try:
        return from_dict(TrainConfig, {name: train[name] for name in names if name in train}, "train")
    except ConfigError:
        return None


def _furthest(lines: Sequence[Mapping[str, Any]], position: Mapping[str, Any], name: str) -> float:
    """Return a number that grows during a run, from the log or from a checkpoint, whichever is further; else 0."""
    logged = next((line[name] for line in reversed(lines) if _is_number(line.get(name))), 0)
    saved = position.get(name, 0)
    return float(max(logged, saved if _is_number(saved) else 0))


def _is_number(value: Any) -> bool:
    """Return whether a value of a JSON file is a finite number."""
    return isinstance(value, int | float) and math.isfinite(value)


class _Losses(NamedTuple):
    """Fields of a `RunSummary` about held-out losses."""

    best_loss: float | None
    last_loss: float | None
    loss_unit: str


def _held_out(lines: Sequence[Mapping[str, Any]]) -> _Losses:
    """Return the best and the last held-out loss in bits per unit of the task."""
    losses, unit = list[float](), ""
    for line in lines:
        for name, value in _table(line, "validation").items():
            if name.startswith("bits_per_") and _is_number(value):
                losses.append(value)
                unit = name.replace("_", " ")
    return _Losses(min(losses), losses[-1], unit) if losses else _Losses(None, None, "")


def _mean_errors(lines: Sequence[Mapping[str, Any]]) -> _Losses:
    """Return the best and the last mean over layers of the errors of a transfer on held-out text."""
    measured = [[value for value in _table(line, "errors").values() if _is_number(value)] for line in lines]
    means = [sum(errors) / len(errors) for errors in measured if errors]
    return _Losses(min(means), means[-1], "relative error") if means else _Losses(None, None, "")


def _changed(folder: Path, *names: str) -> datetime:
    """Return when the newest of some files or folders changed; the folder itself if there are none of them."""
    times = []
    for path in (folder / name for name in names):
        with contextlib.suppress(OSError):
            times.append(path.stat().st_mtime)
    return datetime.fromtimestamp(max(times, default=folder.stat().st_mtime)).astimezone()
