"""Folders of pretrained models as the command line opens them: converted, plain, of longspan, or with GGUF weights."""

from pathlib import Path
from typing import Any, NamedTuple

import torch

from longspan.errors import CheckpointError, UnsupportedError
from longspan.files import read_object
from longspan.hf.convert import convert
from longspan.hf.decoder import ConvertedDecoder, Opened, open_pretrained, open_tokenizer, readable
from longspan.hf.families import find


class Weights(NamedTuple):
    """Where the weights of a pretrained model are.

    Attributes:
        source: a folder, or a name on the hub.
        gguf: a GGUF file in that folder; None = safetensors or what else transformers reads.
    """

    source: str
    gguf: str | None


def locate_weights(model: str, gguf: str | None = None) -> Weights:
    """The folder and the file of a pretrained model.

    Args:
        model: a folder, a GGUF file, or a name on the hub.
        gguf: the name of a file in the folder. None: the only GGUF file of a folder that has no other weights.

    Raises:
        CheckpointError: there is no such folder or file, the folder holds no model, or several GGUF files.
    """
    path = Path(model)
    if path.is_file():
        if path.suffix != ".gguf":
            raise CheckpointError(f"{model}: a file; give the folder of a model, or a file that ends in .gguf")
        if gguf is not None and Path(gguf).name != path.name:
            raise CheckpointError(f"{model}: names one GGUF file already; leave out the other, {gguf}")
        return Weights(str(path.parent), path.name)
    if not path.is_dir():
        if _looks_like_path(model):
            raise CheckpointError(f"{model}: no such folder or file")
        return Weights(model, gguf)
    if gguf is not None:
        if not (path / gguf).is_file():
            raise CheckpointError(f"{path / gguf}: no such file")
        return Weights(model, gguf)
    if any(any(path.glob(pattern)) for pattern in ("*.safetensors", "*.bin")):
        return Weights(model, None)
    files = sorted(file.name for file in path.glob("*.gguf"))
    if len(files) > 1:
        raise CheckpointError(f"{model}: holds {len(files)} GGUF files; choose one with --gguf {files[0]}")
    if not files:
        raise CheckpointError(f"{model}: holds no weights (*.safetensors, *.bin or *.gguf)")
    return Weights(model, files[0])


def _looks_like_path(model: str) -> bool:
    """Names on the hub are NAME or ORGANIZATION/NAME."""
    return model.startswith((".", "/", "~")) or model.endswith(("/", ".gguf")) or model.count("/") > 1 or "\\" in model


def open_plain(folder: str | Path, dtype: torch.dtype | None = None) -> Opened:
    """A model that nobody converted, as the verbs read it: the baseline, whose state grows with the text.

    Its own attention is read through the mixers that equal it, layer by layer: `full`, or `window` where the model
    slides. A folder of one of the library's own models gives that model.

    Args:
        folder: that transformers wrote.
        dtype: of the weights; None = as they are stored.

    Raises:
        CheckpointError: it cannot be read.
        UnsupportedError: a family that does not convert, or an encoder.
    """
    if read_object(Path(folder) / "config.json").get("model_type") == "longspan":
        return _open_own(folder, dtype)
    opened = open_pretrained(str(folder), dtype=dtype)
    model: Any = opened.model
    for window, layers in _layers_by_window(model).items():
        if window is None:
            convert(model, "full", layers=layers)
        else:
            convert(model, "window", layers=layers, window=window)
    return Opened(ConvertedDecoder(model.eval()), opened.tokenizer)


def _open_own(folder: str | Path, dtype: torch.dtype | None) -> Opened:
    from longspan.hf.modeling import LongspanForCausalLM

    tokenizer = open_tokenizer(folder)
    with readable(folder):
        wrapped: Any = LongspanForCausalLM.from_pretrained(folder, dtype="auto" if dtype is None else dtype)
    return Opened(wrapped.model.eval(), tokenizer)


def _layers_by_window(model: Any) -> dict[int | None, list[int]]:
    """The layers of each sliding window; None = layers that see every earlier token.

    Raises:
        UnsupportedError: the family does not convert, or sees both sides.
    """
    family = find(model)
    if not family.family.causal:
        raise UnsupportedError(f"a model of type {model.config.model_type!r} sees both sides and does not stream")
    config = model.config
    kinds = list(getattr(config, "layer_types", None) or [])
    layers: dict[int | None, list[int]] = {}
    for index, attention in enumerate(family.attentions):
        window = getattr(attention, "sliding_window", None)
        if window is None and index < len(kinds) and kinds[index] == "sliding_attention":
            window = config.sliding_window
        if window is None and not kinds and config.model_type == "mistral":
            window = getattr(config, "sliding_window", None)
        layers.setdefault(window, []).append(index)
    return layers
