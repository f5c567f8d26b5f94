"""Support for runs of pretrained models: registers the model kind and completes recipes with path and tokenizer."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from longspan.errors import ConfigError
from longspan.models import save_model
from longspan.models.io import is_converted
from longspan.train.folders import check_sealed

KIND = "pretrained"


def is_pretrained(recipe: Mapping[str, Any]) -> bool:
    """Return whether the model of a recipe has `kind = "pretrained"`."""
    model = recipe.get("model", {})
    return isinstance(model, Mapping) and model.get("kind") == KIND


def register_kind() -> None:
    """Register the model kind `"pretrained"`; raises UnsupportedError if transformers is not installed."""
    import longspan.hf.tuned  # noqa: F401 - importing it registers the kind


def complete_recipe(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recipe of a pretrained model with an absolute `model.source` and `task.tokenizer = "model"`.

    Raises:
        ConfigError: the recipe names another task or tokenizer.
    """
    model, task = dict(recipe["model"]), dict(recipe.get("task", {}))
    if model.get("source") and Path(model["source"]).is_dir():
        model["source"] = str(Path(model["source"]).resolve())
    if task.get("name", "text") == "text":
        task.setdefault("tokenizer", "model")
    if task.get("tokenizer") != "model":
        raise ConfigError(
            "model.kind = 'pretrained' needs its own tokenizer: set task.name = 'text' and task.tokenizer = 'model', "
            "or leave both out"
        )
    return {**recipe, "model": model, "task": task}


def write_tokenizer(model: Mapping[str, Any], folder: Path) -> None:
    """Write the tokenizer of a pretrained model to the folder of a run, unless it has one.

    Args:
        model: the table `model` of the recipe.
        folder: of the run.

    Raises:
        ConfigError: the source is not a converted model, and the recipe has no table `model.memory`.
        CheckpointError: the tokenizer cannot be read.
        UnsupportedError: the bytes of its tokens cannot be determined.
    """
    from longspan.hf.decoder import end_tokens_of, open_tokenizer
    from longspan.tasks.tokenizers import borrow

    source = model["source"]
    if "memory" not in model and not is_converted(source):
        raise ConfigError(
            f"model.source = {source!r}: is not a folder that `longspan convert` wrote; convert the model first, or "
            "add a table model.memory"
        )
    if Path(source).is_dir():
        check_sealed(Path(source))
    path = folder / "tokenizer.json"
    if not path.exists():
        borrow(open_tokenizer(source), end_tokens_of(source)).save(path)


def publish(model: Any, folder: Path) -> None:
    """Write a trained model to a folder: a pretrained one in the format of transformers, others in our own."""
    if hasattr(model, "export"):
        model.export(folder)
    else:
        save_model(model, folder)
