"""Runs of pretrained models: their kind is known, their paths hold, and text is cut by their own tokenizer."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from longspan.errors import ConfigError
from longspan.models import save_model
from longspan.models.io import is_converted
from longspan.train.folders import check_sealed

KIND = "pretrained"


def is_pretrained(recipe: Mapping[str, Any]) -> bool:
    """Whether a recipe's model is a pretrained one."""
    model = recipe.get("model", {})
    return isinstance(model, Mapping) and model.get("kind") == KIND


def make_known() -> None:
    """Make the kind of pretrained models known; an UnsupportedError where transformers is missing."""
    import longspan.hf.tuned  # noqa: F401 - registers it


def completed(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe with what follows from a pretrained model: a path that holds anywhere, and its tokenizer."""
    model, task = dict(recipe["model"]), dict(recipe.get("task", {}))
    if model.get("source") and Path(model["source"]).is_dir():
        model["source"] = str(Path(model["source"]).resolve())
    if task.get("name", "text") == "text":
        task.setdefault("tokenizer", "model")
    if task.get("tokenizer") != "model":
        raise ConfigError(
            "model.kind = 'pretrained' reads text through its own tokenizer: task.name = 'text', "
            "task.tokenizer = 'model'"
        )
    return {**recipe, "model": model, "task": task}


def write_tokenizer(model: Mapping[str, Any], folder: Path) -> None:
    """Put the tokenizer of a pretrained model (the recipe's table) into a run's folder, where there is none yet.

    Raises:
        ConfigError: its source is not converted, and gets no memory either.
        CheckpointError: it cannot be read.
        UnsupportedError: it is not one that counts bytes.
    """
    from longspan.hf.decoder import end_tokens_of, open_tokenizer
    from longspan.tasks.tokenizers import borrow

    source = model["source"]
    if "memory" not in model and not is_converted(source):
        raise ConfigError(
            f"model.source = {source!r} is no folder that `longspan convert` wrote; convert it first, or add a table "
            "model.memory"
        )
    if Path(source).is_dir():
        check_sealed(Path(source))
    path = folder / "tokenizer.json"
    if not path.exists():
        borrow(open_tokenizer(source), end_tokens_of(source)).save(path)


def publish(model: Any, folder: Path) -> None:
    """The trained model as a folder: a pretrained one as transformers keeps it, others as this library does."""
    if hasattr(model, "export"):
        model.export(folder)
    else:
        save_model(model, folder)
