"""Runs as the verbs open them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from longspan.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from longspan.models import Decoder
    from longspan.tasks import Task, TextTask

SET_HELP = "Change a field of the model that holds no weights, such as model.mixers.0.mem_len=1024. Repeatable."


def open_run(folder: str, assignments: Sequence[str] = ()) -> "tuple[Decoder, TextTask]":
    """The model and the task of a run that reads text.

    Args:
        folder: of the run.
        assignments: `model.a.b=c`, see `reshape`.

    Raises:
        CheckpointError: no run, a damaged one, or one that is not of text.
        ConfigError: a field that does not exist, or that the weights do not fit.
    """
    from longspan.tasks import TextTask

    model, task = open_any_run(folder, assignments)
    if not isinstance(task, TextTask):
        raise CheckpointError(f"{folder}: a run of the task {type(task).__name__}, not of text, which this verb reads")
    return model, task


def open_any_run(folder: str, assignments: Sequence[str] = ()) -> "tuple[Any, Task]":
    """The same of a run of any task; raises as `open_run` does."""
    from longspan.models.io import is_converted
    from longspan.train import load_run

    if is_converted(folder):
        if assignments:
            raise ConfigError("--set: a converted model keeps its fields; convert it anew with others")
        return _open_converted(folder)
    model, task = load_run(folder)
    return reshape(model, assignments), task


def _open_converted(folder: str) -> "tuple[Any, Task]":
    from longspan.hf.decoder import end_tokens, load_converted
    from longspan.tasks import TextTask
    from longspan.tasks.tokenizers import borrow

    opened = load_converted(folder)
    return opened.model, TextTask(tokenizer=borrow(opened.tokenizer, end_tokens(opened.model.inner)))


def reshape(model: "Decoder", assignments: Sequence[str]) -> "Decoder":
    """The same weights in a model of other settings, such as another length of memory.

    Raises:
        ConfigError: an assignment that is not `model.a.b=c`, an unknown field, or weights that do not fit.
    """
    from longspan.config import override
    from longspan.models import build_model, describe_model, load_weights

    if not assignments:
        return model
    if hasattr(model, "describe"):
        raise ConfigError("--set: a pretrained model keeps its fields; convert it anew with others, and train that")
    data: dict[str, Any] = {"model": describe_model(model)}
    for assignment in assignments:
        if not assignment.startswith("model."):
            raise ConfigError(f"--set {assignment!r}: only the model can be changed here: model.a.b=c")
        data = override(data, assignment)
    other = build_model(data["model"])
    try:
        load_weights(other, model.state_dict(), f"--set {' '.join(assignments)}")
    except CheckpointError as error:
        raise ConfigError(str(error)) from None
    reshaped: Decoder = other.eval()
    return reshaped
