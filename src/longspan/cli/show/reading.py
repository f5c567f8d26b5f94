"""Which held-back documents of a run are read to see what its layers do."""

from typing import TYPE_CHECKING, Any

from longspan.errors import ConfigError

if TYPE_CHECKING:
    from longspan.tasks import Documents

# tokens of a row in one call; a limit of memory, not of what is seen
_CHUNK = 256


def chosen(model: Any, task: Any, run: str, *, tokens: int, head: int) -> "tuple[Documents, int]":
    """Held-back documents of a run, and how many tokens of a row are read in one call.

    Args:
        model, task: of the run.
        run: its folder.
        tokens: in all, of documents drawn at random.
        head: of each document only its first so many tokens; 0: all.

    Raises:
        ConfigError: a run that has no documents of its own.
    """
    from longspan.tasks.base import heads
    from longspan.train import first_places
    from longspan.train.opening import is_memory_run, is_pretrained_folder, recipe_table

    if is_memory_run(run) or not hasattr(task, "documents"):
        raise ConfigError(f"{run}: a run of a memory task has no held-back documents to read here")
    if is_pretrained_folder(run):
        raise ConfigError(f"{run}: a pretrained model has no held-back documents of its own to read here")
    chunk = _CHUNK
    if not model.traits.streams:
        chunk = recipe_table(run, "train").get("segment_length", _CHUNK)
    return first_places(heads(task.documents("validation"), head), tokens), chunk
