"""Opens runs and pretrained models for evaluation and generation."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from longspan import mixers, renames, tasks
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
    """An opened run or pretrained model."""

    model: Any
    """in evaluation mode, on its device"""
    task: Task
    """ready to encode text; for a pretrained model, a text task with its tokenizer"""
    notes: tuple[str, ...]
    """one-line notes for the user"""


def open_run(
    folder: str | Path, assignments: Sequence[str] = (), *, device: str = "auto", dtype: str = "", text: bool = False
) -> OpenedRun:
    """Open a run, or a folder of a transformers model: its model, its task, and notes for the user.

    Args:
        folder: of a run, of a converted model, or of an unchanged transformers model.
        assignments: changed fields of the model, `model.a.b=c`, see `reshape`.
        device: as in `TrainConfig.device`.
        dtype: one of `DTYPES`; empty: as the weights are stored.
        text: require a run that reads text.

    Raises:
        CheckpointError: the folder is not a run, is damaged, or, with `text`, is a run of another task.
        ConfigError: an unknown field, dtype or device, or a field whose value the weights do not fit.
    """
    parse_dtype(dtype)  # raise for a wrong name before weights are read
    if is_pretrained_folder(folder):
        if assignments:
            raise ConfigError("--set: the fields of a converted model are fixed; run `longspan convert` with others")
        model, task, note = _open_pretrained(folder, dtype)
    else:
        model, task = load_run(folder)
        model, note = reshape(model, assignments)
    if text and not isinstance(task, TextTask):
        raise CheckpointError(
            f"{folder}: this is a run of {type(task).__name__}, but the command needs one of the task text; "
            "use longspan eval"
        )
    model.to(choose_device(device, what="--device"), parse_dtype(dtype))
    return OpenedRun(model, task, (note,) if note else ())


def parse_dtype(name: str) -> torch.dtype | None:
    """Return the torch dtype of a name, None for an empty name; raises ConfigError if it is not one of `DTYPES`."""
    if not name:
        return None
    if name not in DTYPES:
        raise ConfigError(f"--dtype {name!r}: must be one of {', '.join(DTYPES)}")
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def is_pretrained_folder(folder: str | Path) -> bool:
    """Return whether a folder contains a saved transformers model, converted or not, rather than a run."""
    if is_converted(folder):
        return True
    path = Path(folder) / "config.json"
    return path.is_file() and not (Path(folder) / "recipe.json").exists() and "model_type" in read_object(path)


def recipe_table(folder: str | Path, name: str) -> dict[str, Any]:
    """Return the table `name` of a run's recipe; empty if the folder is not a run or the table does not exist."""
    path = Path(folder) / "recipe.json"
    return read_object(path).get(name, {}) if path.is_file() else {}


def is_memory_run(folder: str | Path) -> bool:
    """Return whether a folder is a run of a classifier on a memory task."""
    return "classes" in recipe_table(folder, "model")


def is_passkey_run(folder: str | Path) -> bool:
    """Return whether a folder is a run trained with the passkey curriculum (`curriculum = "passkey"`)."""
    with renames.reading_saved():
        return bool(renames.value("train.curriculum", recipe_table(folder, "train").get("curriculum")) == "passkey")


def _open_pretrained(folder: str | Path, dtype: str) -> tuple[Any, Task, str]:
    """Open a transformers folder: return its model, a text task with its tokenizer, and a note (may be empty)."""
    from longspan.hf.decoder import end_tokens_of, load_converted
    from longspan.hf.opening import open_plain

    folders.check_sealed(Path(folder))
    note = ""
    if is_converted(folder):
        opened = load_converted(folder, parse_dtype(dtype))
    else:
        opened = open_plain(folder, parse_dtype(dtype))
        if hasattr(opened.model, "conversion"):
            note = f"{folder}: is not converted; using its original attention, as a baseline"
    return opened.model, TextTask(tokenizer=borrow(opened.tokenizer, end_tokens_of(folder))), note


def load_run(folder: str | Path) -> tuple[Any, Task]:
    """Load the model of a run, in evaluation mode, and its task, ready to encode text; training data is not read.

    The model is the trained one or, while the run is not finished, that of the newest undamaged checkpoint.

    Raises:
        CheckpointError: the folder is not a run, is damaged, or has neither a trained model nor a checkpoint.
    """
    folder = Path(folder)
    recipe = stored_recipe(folder)
    task = tasks.build(recipe["task"])
    task.prepare(folder, main=False)
    if pretrained.is_pretrained(recipe):
        pretrained.register_kind()
    folders.check_sealed(folder / "model")
    if is_converted(folder / "model"):
        from longspan.hf.decoder import load_converted

        model = load_converted(folder / "model").model
    elif (folder / "model").is_dir():
        model = load_model(folder / "model")
    else:
        checkpoint = newest_sound(folder / "checkpoints", Display())
        if checkpoint is None:
            raise CheckpointError(f"{folder}: this run has no checkpoint yet; train it first")
        model = checkpoint.model
    if model.vocab_size < task.vocab_size:
        raise CheckpointError(
            f"{folder}: the tokenizer has {task.vocab_size} token ids, but the model only {model.vocab_size}; restore "
            "tokenizer.json of this run"
        )
    return model, task


def stored_recipe(folder: Path) -> dict[str, Any]:
    """Read the recipe of a run; raises CheckpointError if it is missing or damaged."""
    if not (folder / "recipe.json").exists():
        raise CheckpointError(
            f"{folder}: not a run (recipe.json is missing); give a folder that `longspan train` wrote"
        )
    folders.check_sealed(folder)
    stored: dict[str, Any] = read_json(folder / "recipe.json")
    if not isinstance(stored, dict) or not all(isinstance(stored.get(name), dict) for name in TABLES):
        raise CheckpointError(f"{folder / 'recipe.json'}: is not the recipe of a run; restore the file")
    return stored


def newest_sound(folder: Path, display: Display) -> Checkpoint | None:
    """Load the newest undamaged checkpoint of a folder and report damaged newer ones; None if there are no checkpoints.

    Raises:
        CheckpointError: all checkpoints are damaged.
    """
    problem: CheckpointError | None = None
    for path in checkpoints.list_checkpoints(folder):
        try:
            checkpoint = checkpoints.read(path)
        except CheckpointError as error:
            problem = error
            continue
        if problem is not None:
            display.message(f"{problem}; continuing from {path}")
        return checkpoint
    if problem is not None:
        raise CheckpointError(f"{problem}; no checkpoint of this run can be loaded")
    return None


def reshape(model: Any, assignments: Sequence[str]) -> tuple[Any, str]:
    """Build a model with the same weights and other settings, such as another length of memory.

    Args:
        model: trained model.
        assignments: changed fields, `model.a.b=c`.

    Returns:
        The model in evaluation mode, and a note that lists what differs from training (empty if nothing).

    Raises:
        ConfigError: an assignment that is not `model.a.b=c`, an unknown field, or a value that the weights do not fit.
    """
    if not assignments:
        return model, ""
    if hasattr(model, "describe"):
        raise ConfigError("--set: the fields of a converted model are fixed; run `longspan convert` with others")
    trained = describe_model(model)
    data: dict[str, Any] = {"model": trained}
    for assignment in assignments:
        if not assignment.startswith("model."):
            raise ConfigError(
                f"--set {assignment!r}: only fields of the model can be changed after training; write model.a.b=c"
            )
        data = override(data, assignment)
    other = build_model(data["model"])
    try:
        load_weights(other, model.state_dict(), f"--set {' '.join(assignments)}")
    except CheckpointError as error:
        raise ConfigError(str(error)) from None
    changes = _differences(_with_defaults(trained), _with_defaults(describe_model(other)), "model")
    return other.eval(), f"not as trained, so figures may be worse: {'; '.join(changes)}" if changes else ""


# fields that do not change the outputs of the model
_SAME_OUTPUTS = ("checkpoint", "ffn_chunk", "dropout", "cache", "bptt_segments")


def _with_defaults(table: Any) -> Any:
    """Return a model's table with the defaults of its mixers filled in, recursively."""
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
    """List the settings that differ between two tables, such as `model.mixers.0.window = 16 (trained with 64)`."""
    if isinstance(before, dict) and isinstance(after, dict):
        names = [name for name in after if not (name in _SAME_OUTPUTS and not isinstance(after[name], dict))]
        return [line for name in names for line in _differences(before.get(name), after[name], f"{path}.{name}")]
    if isinstance(before, list | tuple) and isinstance(after, list | tuple) and len(before) == len(after):
        pairs = enumerate(zip(before, after, strict=True))
        return [line for index, (old, new) in pairs for line in _differences(old, new, f"{path}.{index}")]
    return [] if before == after else [f"{path} = {after!r} (trained with {before!r})"]
