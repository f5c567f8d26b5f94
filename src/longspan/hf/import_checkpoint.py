"""Import published weights of long-context models as models of this library."""

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
"""For each `model_type` a function that maps published weights and a configuration to a model."""


def import_checkpoint(
    source: nn.Module | Mapping[str, Tensor] | str | Path, config: Mapping[str, Any] | Any = None
) -> Decoder:
    """Build a `Decoder` from the published weights of a long-context language model, in evaluation mode.

    "transfo-xl" is Transformer-XL of transformers (`TransfoXLLMHeadModel`); see `longspan.hf.transfo_xl`. "reformer" is
    Reformer of transformers (`ReformerModelWithLMHead`); see `longspan.hf.reformer`.

    Args:
        source: the model, its state dict, or a folder with config.json and safetensors or pytorch_model.bin.
        config: a configuration of transformers or a mapping; None = that of the model or of the folder.

    Warns:
        UserWarning: the configuration has dropout of attention weights, which mixers do not support.

    Raises:
        ConfigError: no configuration, or one with missing fields.
        UnsupportedError: another family, or a configuration that this library computes differently.
        CheckpointError: weights that are missing, unexpected, or have other shapes.
    """
    weights, own_config = _read(source)
    config = own_config if config is None else config
    if config is None:
        raise ConfigError("import_checkpoint: the weights come without a configuration; pass config=...")
    table: Mapping[str, Any] = config if isinstance(config, Mapping) else config.to_dict()
    return FAMILIES[_family(table, weights)](weights, table).eval()


def _read(source: Any) -> tuple[Mapping[str, Tensor], Any]:
    """Return the weights, and their configuration if the source has one, else None."""
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
            # files from elsewhere may raise anything
            raise CheckpointError(f"{path}: damaged: {error}; download it again") from None
    if not weights:
        raise CheckpointError(f"{folder}: contains no weights; expected *.safetensors or pytorch_model*.bin")
    return weights, config


def _family(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> str:
    """Return the model type from the configuration, or else from the names of the weights."""
    # prefixes of each family's weights, for configurations without a model_type
    marks = {"reformer": "reformer.", "transfo-xl": "transformer.word_emb."}
    kind = config.get("model_type")
    if kind is None:
        kind = next((name for name, mark in marks.items() if any(key.startswith(mark) for key in weights)), None)
    if kind not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise UnsupportedError(f"import_checkpoint: unsupported model type {kind!r}; supported: {known}")
    return str(kind)
