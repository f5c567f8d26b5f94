"""Published weights of long-context models as models of this library: one function, a file a family."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from longspan.errors import CheckpointError, ConfigError, UnsupportedError
from longspan.files import read_json
from longspan.hf.reformer import import_reformer
from longspan.hf.transfo_xl import import_transfo_xl
from longspan.models import Decoder

FAMILIES: dict[str, Callable[[Mapping[str, Tensor], Mapping[str, Any]], Decoder]] = {
    "reformer": import_reformer,
    "transfo-xl": import_transfo_xl,
}
"""A function for each `model_type`: weights under their published names, and the configuration, to a model."""


def import_checkpoint(
    source: nn.Module | Mapping[str, Tensor] | str | Path, config: Mapping[str, Any] | Any = None
) -> Decoder:
    """Published weights of a long-context language model as a `Decoder`, in evaluation mode.

    "transfo-xl" is Transformer-XL of transformers (`TransfoXLLMHeadModel`); see `longspan.hf.transfo_xl`.
    "reformer" is Reformer of transformers (`ReformerModelWithLMHead`); see `longspan.hf.reformer`.

    Args:
        source: the model, its state dict, or a folder with config.json and safetensors or pytorch_model.bin.
        config: a configuration of transformers or a mapping; None = that of the model or of the folder.

    Warns:
        UserWarning: the configuration drops attention weights in training, which no mixer does.

    Raises:
        ConfigError: no configuration, or one that lacks something.
        UnsupportedError: another family, or something in the configuration that this library computes otherwise.
        CheckpointError: weights that are missing, left over, or of other shapes.
    """
    weights, own_config = _read(source)
    config = own_config if config is None else config
    if config is None:
        raise ConfigError("import_checkpoint: weights alone do not say how many heads there are; give their config")
    table: Mapping[str, Any] = config if isinstance(config, Mapping) else config.to_dict()
    return FAMILIES[_family(table, weights)](weights, table).eval()


def _read(source: Any) -> tuple[Mapping[str, Tensor], Any]:
    """Weights, and the configuration where it comes with them."""
    if isinstance(source, nn.Module):
        return source.state_dict(), getattr(source, "config", None)
    if isinstance(source, Mapping):
        return source, None
    from safetensors.torch import load_file

    folder = Path(source)
    config = read_json(folder / "config.json")
    weights: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin")):
        try:
            if path.suffix == ".safetensors":
                weights |= load_file(path)
            else:
                weights |= torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            # whatever a file of another origin may hold
            raise CheckpointError(f"{path}: damaged: {error}") from None
    if not weights:
        raise CheckpointError(f"{folder}: no weights; expected *.safetensors or pytorch_model*.bin")
    return weights, config


def _family(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> str:
    # how the names of a family's weights begin, for configurations that do not say what they are of
    marks = {"reformer": "reformer.", "transfo-xl": "transformer.word_emb."}
    kind = config.get("model_type")
    if kind is None:
        kind = next((name for name, mark in marks.items() if any(key.startswith(mark) for key in weights)), None)
    if kind not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise UnsupportedError(f"import_checkpoint: no weights of type {kind!r} are known; these are: {known}")
    return str(kind)
