"""Held-back documents read while someone watches what layers do."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from longspan.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from longspan.mixers import Core, Rows
    from longspan.train import Evaluation

# tokens of a row in one call; a limit of memory, not of what is seen
_CHUNK, _BATCH = 256, 8


def watched(
    model: Any,
    task: Any,
    run: str,
    cores: "Sequence[Core]",
    watch: Callable[..., None],
    *,
    tokens: int,
    head: int,
) -> "Evaluation":
    """Read held-back documents of a run as `longspan eval` does; `watch` is called after each layer of `cores`.

    Args:
        model: of the run.
        task: of the run.
        run: its folder, for errors.
        cores: what is watched.
        watch: a forward hook with keywords: (core, positional arguments, keywords, output).
        tokens: read in all, of documents drawn at random.
        head: of each document only its first so many tokens; 0: all.

    Raises:
        ConfigError: a run that has no documents of its own.
    """
    from longspan.cli.evaluate import is_memory_run
    from longspan.files import read_json
    from longspan.models.io import is_converted
    from longspan.tasks.base import heads
    from longspan.train import evaluate_text, first_places

    if is_memory_run(run) or not hasattr(task, "documents"):
        raise ConfigError(f"{run}: a run of a memory task has no held-back documents to read here")
    if is_converted(run):
        raise ConfigError(f"{run}: a converted model has no held-back documents of its own to read here")
    chunk = _CHUNK
    if not model.traits.streams:
        from pathlib import Path

        chunk = read_json(Path(run) / "recipe.json").get("train", {}).get("segment_length", _CHUNK)
    documents = first_places(heads(task.documents("validation"), head), tokens)
    hooks = [core.register_forward_hook(watch, with_kwargs=True) for core in cores]
    try:
        return evaluate_text(
            model, documents, chunk=chunk, batch=_BATCH, memory=bool(model.traits.streams), unit=task.unit
        )
    finally:
        for hook in hooks:
            hook.remove()


def real_tokens(rows: "Rows", like: "Tensor") -> "Tensor":
    """(batch, length) bool: which columns of a call hold a token of their row."""
    import torch

    return torch.arange(rows.length, device=like.device) < rows.real_tokens()[:, None]
