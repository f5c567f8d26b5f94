"""Runs and pretrained models, opened for whoever reads with them: the command line, the evaluation harness."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from longspan import mixers, tasks
from longspan.config import from_dict, override, to_dict
from longspan.contract.registry import mechanism_class
from longspan.errors import CheckpointError, ConfigError
from longspan.files import read_json, read_object
from longspan.models import build_model, describe_model, load_model, load_weights
from longspan.models.io import is_converted
from longspan.tasks import Task, TextTask
from longspan.tasks.tokenizers import borrow
from longspan.train import checkpoint as checkpoints
from longspan.train import folders, pretrained
from longspan.train.checkpoint import Checkpoint
from longspan.train.distributed import choose_device
from longspan.train.progress import Display

TABLES = ("model", "task", "train")
DTYPES = ("float32", "bfloat16", "float16", "float64")


class OpenedRun(NamedTuple):
    """A model in evaluation mode, on its device; a task ready to encode text (of a pretrained model a text task with
    its tokenizer); and notes for whoever asked, a line each.
    """

    model: Any
    task: Task
    notes: tuple[str, ...]


def open_run(
    folder: str | Path, assignments: Sequence[str] = (), *, device: str = "auto", dtype: str = "", text: bool = False
) -> OpenedRun:
    """The model and the task of a run, or of a folder of transformers.

    Args:
        folder: of the run, of a converted model, or of a plain model of transformers.
        assignments: `model.a.b=c`, see `reshape`.
        device: as in `TrainConfig.device`.
        dtype: one of `DTYPES`; empty: as the weights are stored.
        text: refuse a run that reads something else.

    Raises:
        CheckpointError: no run, a damaged one, or one that is not of text.
        ConfigError: a field that does not exist or that the weights do not fit, an unknown type or device.
    """
    parse_dtype(dtype)  # a wrong name is told before weights are read
    if is_pretrained_folder(folder):
        if assignments:
            raise ConfigError("--set: a pretrained model keeps its fields; convert it again with others")
        model, task, note = _open_pretrained(folder, dtype)
    else:
        model, task = load_run(folder)
        model, note = reshape(model, assignments)
    if text and not isinstance(task, TextTask):
        raise CheckpointError(f"{folder}: a run of the task {type(task).__name__}, not of text, which this verb reads")
    model.to(choose_device(device, what="--device"), parse_dtype(dtype))
    return OpenedRun(model, task, (note,) if note else ())


def parse_dtype(name: str) -> torch.dtype | None:
    """The type of a name, None where it is empty; a ConfigError where it is none of `DTYPES`."""
    if not name:
        return None
    if name not in DTYPES:
        raise ConfigError(f"--dtype {name!r}: one of {', '.join(DTYPES)}")
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def is_pretrained_folder(folder: str | Path) -> bool:
    """Whether a folder holds a model as transformers keeps it, converted or plain, and no run."""
    if is_converted(folder):
        return True
    path = Path(folder) / "config.json"
    return path.is_file() and not (Path(folder) / "recipe.json").exists() and "model_type" in read_object(path)


def recipe_table(folder: str | Path, name: str) -> dict[str, Any]:
    """The table `name` of a run's recipe; empty where there is no run, or no such table."""
    path = Path(folder) / "recipe.json"
    return read_object(path).get(name, {}) if path.is_file() else {}


def is_memory_run(folder: str | Path) -> bool:
    """Whether a folder holds a classifier on a memory task."""
    return "classes" in recipe_table(folder, "model")


def is_passkey_run(folder: str | Path) -> bool:
    """Whether a folder holds a model that was trained along a curriculum of pass keys."""
    return recipe_table(folder, "train").get("curriculum") in ("passkey", "retrieval")


def _open_pretrained(folder: str | Path, dtype: str) -> tuple[Any, Task, str]:
    from longspan.hf.decoder import end_tokens_of, load_converted
    from longspan.hf.opening import open_plain

    folders.check_sealed(Path(folder))
    note = ""
    if is_converted(folder):
        opened = load_converted(folder, parse_dtype(dtype))
    else:
        opened = open_plain(folder, parse_dtype(dtype))
        if hasattr(opened.model, "conversion"):
            note = f"{folder}: not converted; read with its own attention, as a baseline"
    return opened.model, TextTask(tokenizer=borrow(opened.tokenizer, end_tokens_of(folder))), note


def load_run(folder: str | Path) -> tuple[Any, Task]:
    """The model of a run, in evaluation mode, and its task, ready to encode text; data is read only when asked for.

    The model is the trained one, or that of the newest sound checkpoint while the run is not over; a CheckpointError
    where there is neither.
    """
    folder = Path(folder)
    recipe = stored_recipe(folder)
    task = tasks.build(recipe["task"])
    task.prepare(folder, main=False)
    if pretrained.is_pretrained(recipe):
        pretrained.make_known()
    folders.check_sealed(folder / "model")
    if is_converted(folder / "model"):
        from longspan.hf.decoder import load_converted

        model = load_converted(folder / "model").model
    elif (folder / "model").is_dir():
        model = load_model(folder / "model")
    else:
        checkpoint = newest_sound(folder / "checkpoints", Display())
        if checkpoint is None:
            raise CheckpointError(f"{folder}: this run has no checkpoint yet")
        model = checkpoint.model
    if model.vocab_size < task.vocab_size:
        raise CheckpointError(
            f"{folder}: the model knows {model.vocab_size} token ids, the tokenizer has {task.vocab_size}"
        )
    return model, task


def stored_recipe(folder: Path) -> dict[str, Any]:
    """The recipe of a run; a CheckpointError where there is none, or a damaged one."""
    if not (folder / "recipe.json").exists():
        raise CheckpointError(f"{folder}: no run here (recipe.json is missing)")
    folders.check_sealed(folder)
    stored: dict[str, Any] = read_json(folder / "recipe.json")
    if not isinstance(stored, dict) or not all(isinstance(stored.get(name), dict) for name in TABLES):
        raise CheckpointError(f"{folder / 'recipe.json'}: not the recipe of a run")
    return stored


def newest_sound(folder: Path, display: Display) -> Checkpoint | None:
    """The newest checkpoint that can be read; each damaged one before it is named. None where there is none at all."""
    problem: CheckpointError | None = None
    for path in checkpoints.found(folder):
        try:
            checkpoint = checkpoints.read(path)
        except CheckpointError as error:
            problem = error
            continue
        if problem is not None:
            display.message(f"{problem}; going on from {path}")
        return checkpoint
    if problem is not None:
        raise CheckpointError(f"{problem}; no earlier checkpoint is sound")
    return None


def reshape(model: Any, assignments: Sequence[str]) -> tuple[Any, str]:
    """The same weights in a model of other settings (`model.a.b=c`), such as another length of memory, and a line that
    says what differs from training; empty where nothing does.

    Raises:
        ConfigError: an assignment that is not `model.a.b=c`, an unknown field, or weights that do not fit.
    """
    if not assignments:
        return model, ""
    if hasattr(model, "describe"):
        raise ConfigError("--set: a pretrained model keeps its fields; convert it anew with others, and train that")
    trained = describe_model(model)
    data: dict[str, Any] = {"model": trained}
    for assignment in assignments:
        if not assignment.startswith("model."):
            raise ConfigError(f"--set {assignment!r}: only the model can be changed here: model.a.b=c")
        data = override(data, assignment)
    other = build_model(data["model"])
    try:
        load_weights(other, model.state_dict(), f"--set {' '.join(assignments)}")
    except CheckpointError as error:
        raise ConfigError(str(error)) from None
    changes = _differences(_with_defaults(trained), _with_defaults(describe_model(other)), "model")
    return other.eval(), f"not as trained, so figures may be worse: {'; '.join(changes)}" if changes else ""


# the same outputs, whatever their values
_SAME_OUTPUTS = ("checkpoint", "ffn_chunk", "dropout", "cache", "bptt_segments")


def _with_defaults(table: Any) -> Any:
    """A model's table with the defaults of its mixers filled in."""
    if isinstance(table, list | tuple):
        return [_with_defaults(item) for item in table]
    if not isinstance(table, dict):
        return table
    table = {key: _with_defaults(value) for key, value in table.items()}
    if table.get("name") not in mixers.names():
        return table
    config = mechanism_class(table["name"]).Config
    known = {field.name for field in dataclasses.fields(config)}
    return {**table, **to_dict(from_dict(config, {key: value for key, value in table.items() if key in known}))}


def _differences(before: Any, after: Any, path: str) -> list[str]:
    """Settings that differ, as `model.mixers.0.window = 16 (trained with 64)`."""
    if isinstance(before, dict) and isinstance(after, dict):
        names = [name for name in after if not (name in _SAME_OUTPUTS and not isinstance(after[name], dict))]
        return [line for name in names for line in _differences(before.get(name), after[name], f"{path}.{name}")]
    if isinstance(before, list | tuple) and isinstance(after, list | tuple) and len(before) == len(after):
        pairs = enumerate(zip(before, after, strict=True))
        return [line for index, (old, new) in pairs for line in _differences(old, new, f"{path}.{index}")]
    return [] if before == after else [f"{path} = {after!r} (trained with {before!r})"]
