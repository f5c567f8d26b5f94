"""Selects the held-out documents on which the layers of a run are observed."""

from typing import TYPE_CHECKING, Any

from longspan.errors import ConfigError

if TYPE_CHECKING:
    from longspan.tasks import Documents

# tokens per row in one call; it bounds memory use and does not change the results
_CHUNK = 256


def chosen(model: Any, task: Any, run: str, *, tokens: int, head: int) -> "tuple[Documents, int]":
    """Return held-out documents of a run, and the number of tokens per row to read in one call.

    Args:
        model, task: of the run.
        run: its folder, for error messages.
        tokens: total number of tokens to select, from randomly chosen documents.
        head: use only this many tokens from the start of each document; 0: all.

    Raises:
        ConfigError: the run has no documents of its own.
    """
    from longspan.tasks.base import heads
    from longspan.train import first_places
    from longspan.train.opening import is_memory_run, is_pretrained_folder, recipe_table

    if is_memory_run(run) or not hasattr(task, "documents"):
        raise ConfigError(f"{run}: a run of a memory task has no held-out documents; give a run trained on text")
    if is_pretrained_folder(run):
        raise ConfigError(f"{run}: a pretrained model has no held-out documents; give a run of `longspan train`")
    chunk = _CHUNK
    if not model.traits.streams:
        chunk = recipe_table(run, "train").get("segment_length", _CHUNK)
    return first_places(heads(task.documents("validation"), head), tokens), chunk
