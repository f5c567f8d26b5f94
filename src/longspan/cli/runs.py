"""Runs as the verbs open them."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longspan.cli.console import say
from longspan.cli.options import parse_dtype, place
from longspan.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from longspan.models import Decoder
    from longspan.tasks import Task, TextTask

SET_HELP = "Change a field of the model that holds no weights, such as model.mixers.0.mem_len=1024. Repeatable."


def open_run(
    folder: str, assignments: Sequence[str] = (), *, device: str = "auto", dtype: str = ""
) -> "tuple[Decoder, TextTask]":
    """The model and the task of a run that reads text.

    Args:
        folder: of the run, of a converted model, or of a plain model of transformers.
        assignments: `model.a.b=c`, see `reshape`.
        device: as `--device` names it.
        dtype: as `--dtype` names it; empty: as the weights are stored.

    Raises:
        CheckpointError: no run, a damaged one, or one that is not of text.
        ConfigError: a field that does not exist, or that the weights do not fit.
    """
    from longspan.tasks import TextTask

    model, task = open_any_run(folder, assignments, device=device, dtype=dtype)
    if not isinstance(task, TextTask):
        raise CheckpointError(f"{folder}: a run of the task {type(task).__name__}, not of text, which this verb reads")
    return model, task


def open_any_run(
    folder: str, assignments: Sequence[str] = (), *, device: str = "auto", dtype: str = ""
) -> "tuple[Any, Task]":
    """The same of a run of any task; raises as `open_run` does."""
    from longspan.train import load_run

    parse_dtype(dtype)  # a wrong name is told before weights are read
    if is_pretrained_folder(folder):
        if assignments:
            raise ConfigError("--set: a pretrained model keeps its fields; convert it again with others")
        model, task = _open_pretrained(folder, dtype)
    else:
        model, task = load_run(folder)
        model = reshape(model, assignments)
    return place(model, device, dtype), task


def is_pretrained_folder(folder: str) -> bool:
    """Whether a folder holds a model as transformers keeps it, converted or plain, and no run."""
    from longspan.files import read_object
    from longspan.models.io import is_converted

    if is_converted(folder):
        return True
    path = Path(folder) / "config.json"
    return path.is_file() and not (Path(folder) / "recipe.json").exists() and "model_type" in read_object(path)


def _open_pretrained(folder: str, dtype: str) -> "tuple[Any, Task]":
    from longspan.hf.decoder import end_tokens_of, load_converted
    from longspan.hf.opening import open_plain
    from longspan.models.io import is_converted
    from longspan.tasks import TextTask
    from longspan.tasks.tokenizers import borrow
    from longspan.train.folders import check_sealed

    check_sealed(Path(folder))
    if is_converted(folder):
        opened = load_converted(folder, parse_dtype(dtype))
    else:
        opened = open_plain(folder, parse_dtype(dtype))
        if hasattr(opened.model, "conversion"):
            say(f"{folder}: not converted; read with its own attention, as a baseline")
    return opened.model, TextTask(tokenizer=borrow(opened.tokenizer, end_tokens_of(folder)))


def reshape(model: "Decoder", assignments: Sequence[str]) -> "Decoder":
    """The same weights in a model of other settings, such as another length of memory; says what differs from training.

    Raises:
        ConfigError: an assignment that is not `model.a.b=c`, an unknown field, or weights that do not fit.
    """
    from longspan.config import override
    from longspan.models import build_model, describe_model, load_weights

    if not assignments:
        return model
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
    if changes:
        say(f"not as trained, so figures may be worse: {'; '.join(changes)}")
    reshaped: Decoder = other.eval()
    return reshaped


# the same outputs, whatever their values
_SAME_OUTPUTS = ("checkpoint", "ffn_chunk", "dropout", "memory", "bptt_segments")


def _with_defaults(table: Any) -> Any:
    """A model's table with the defaults of its mixers filled in."""
    from longspan.config import from_dict, to_dict
    from longspan.mixers.registry import core_class, names

    if isinstance(table, list | tuple):
        return [_with_defaults(item) for item in table]
    if not isinstance(table, dict):
        return table
    table = {key: _with_defaults(value) for key, value in table.items()}
    if table.get("name") not in names():
        return table
    known = {field.name for field in dataclasses.fields(core_class(table["name"]).Config)}
    fields = {key: value for key, value in table.items() if key in known}
    return {**table, **to_dict(from_dict(core_class(table["name"]).Config, fields))}


def _differences(before: Any, after: Any, path: str) -> list[str]:
    """Settings that differ, as `model.mixers.0.window = 16 (trained with 64)`."""
    if isinstance(before, dict) and isinstance(after, dict):
        names = [name for name in after if not (name in _SAME_OUTPUTS and not isinstance(after[name], dict))]
        return [line for name in names for line in _differences(before.get(name), after[name], f"{path}.{name}")]
    if isinstance(before, list | tuple) and isinstance(after, list | tuple) and len(before) == len(after):
        pairs = enumerate(zip(before, after, strict=True))
        return [line for index, (old, new) in pairs for line in _differences(old, new, f"{path}.{index}")]
    return [] if before == after else [f"{path} = {after!r} (trained with {before!r})"]
