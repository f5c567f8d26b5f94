"""Open folders of pretrained models for the command line: converted, plain, of longspan, or with GGUF weights."""

from collections.abc import Container
from pathlib import Path
from typing import Any, NamedTuple

import torch

from longspan.errors import CheckpointError, UnsupportedError
from longspan.files import read_object
from longspan.hf.convert import convert, convert_without_defaults, mechanisms, revert
from longspan.hf.decoder import ConvertedDecoder, ModelAndTokenizer, one_line_errors, open_pretrained, open_tokenizer
from longspan.hf.families import attention_modules


class WeightsLocation(NamedTuple):
    """Location of the weights of a pretrained model.

    Attributes:
        source: a folder, or a name on the hub.
        gguf: a GGUF file in that folder; None = safetensors or another format that transformers reads.
    """

    source: str
    gguf: str | None


def locate_weights(model: str, gguf: str | None = None) -> WeightsLocation:
    """Return the folder or hub name and the GGUF file of a pretrained model.

    Args:
        model: a folder, a GGUF file, or a name on the hub.
        gguf: name of a file in the folder. None = the only GGUF file of a folder without other weights.

    Raises:
        CheckpointError: no such folder or file, or the folder contains no weights, or several GGUF files.
    """
    path = Path(model)
    if path.is_file():
        if path.suffix != ".gguf":
            raise CheckpointError(f"{model}: not a model; pass the folder of a model, or a file that ends in .gguf")
        if gguf is not None and Path(gguf).name != path.name:
            raise CheckpointError(f"{model}: is already a GGUF file; leave out --gguf {gguf}")
        return WeightsLocation(str(path.parent), path.name)
    if not path.is_dir():
        if _looks_like_path(model):
            raise CheckpointError(f"{model}: no such folder or file; pass the folder of a model, or a GGUF file")
        return WeightsLocation(model, gguf)
    if gguf is not None:
        if not (path / gguf).is_file():
            raise CheckpointError(f"{path / gguf}: no such file; pass the name of a GGUF file in this folder")
        return WeightsLocation(model, gguf)
    if any(any(path.glob(pattern)) for pattern in ("*.safetensors", "*.bin")):
        return WeightsLocation(model, None)
    files = sorted(file.name for file in path.glob("*.gguf"))
    if len(files) > 1:
        raise CheckpointError(f"{model}: contains {len(files)} GGUF files; choose one, such as --gguf {files[0]}")
    if not files:
        raise CheckpointError(f"{model}: contains no weights; expected a file *.safetensors, *.bin or *.gguf")
    return WeightsLocation(model, files[0])


def _looks_like_path(model: str) -> bool:
    """Whether a string is a path rather than a hub name, which is NAME or ORGANIZATION/NAME."""
    return model.startswith((".", "/", "~")) or model.endswith(("/", ".gguf")) or model.count("/") > 1 or "\\" in model


def open_plain(folder: str | Path, dtype: torch.dtype | None = None) -> ModelAndTokenizer:
    """Open a model that was not converted as a baseline, whose state grows with the text.

    Each layer is read by the mixer that equals its attention: `full`, or `window` for sliding windows. A folder of one
    of the library's own models returns that model.

    Args:
        folder: written by transformers.
        dtype: dtype of the weights; None = as stored.

    Raises:
        CheckpointError: it cannot be read.
        UnsupportedError: a family that cannot be converted, or an encoder.
    """
    if read_object(Path(folder) / "config.json").get("model_type") == "longspan":
        return _open_own(folder, dtype)
    opened = open_pretrained(str(folder), dtype=dtype)
    model: Any = opened.model
    convert_exactly(model)
    return ModelAndTokenizer(ConvertedDecoder(model.eval()), opened.tokenizer)


def _open_own(folder: str | Path, dtype: torch.dtype | None) -> ModelAndTokenizer:
    """Open a folder of one of the library's own models; arguments as of `open_plain`."""
    from longspan.hf.modeling import LongspanForCausalLM

    tokenizer = open_tokenizer(folder)
    with one_line_errors(folder):
        wrapped: Any = LongspanForCausalLM.from_pretrained(folder, dtype="auto" if dtype is None else dtype)
    return ModelAndTokenizer(wrapped.model.eval(), tokenizer)


def layers_by_window(model: Any) -> dict[int | None, list[int]]:
    """Return the layer indices for each sliding window; None = layers that see every earlier token.

    Raises:
        UnsupportedError: the family cannot be converted, or is bidirectional.
    """
    modules = attention_modules(model)
    if not modules.family.causal:
        raise UnsupportedError(
            f"a model of type {model.config.model_type!r} is bidirectional and does not stream; use a causal one"
        )
    return modules.by_window(model)


class ExactMechanism(NamedTuple):
    """The mechanism that equals a layer's pretrained attention."""

    name: str
    fields: dict[str, Any]


def exact_mechanisms(model: Any) -> dict[int, ExactMechanism]:
    """Return the mechanism that equals the pretrained attention of each layer; raises as `layers_by_window` does."""
    return {index: _exact_mechanism(window) for window, layers in layers_by_window(model).items() for index in layers}


def _exact_mechanism(window: int | None) -> ExactMechanism:
    """Return the mechanism that equals attention with a sliding window; None = without one."""
    return ExactMechanism("full", {}) if window is None else ExactMechanism("window", {"window": window})


def convert_exactly(model: Any, layers: Container[int] | None = None) -> None:
    """Convert layers to the mechanism that equals their pretrained attention, which streams like any other; None = all.

    Raises:
        UnsupportedError: the family cannot be converted, or is bidirectional.
    """
    for window, indices in layers_by_window(model).items():
        chosen = [index for index in indices if layers is None or index in layers]
        if chosen:
            mechanism = _exact_mechanism(window)
            convert_without_defaults(model, mechanism.name, chosen, mechanism.fields)


def open_empty(folder: str | Path, mixer: str = "", fields: dict[str, Any] | None = None) -> ConvertedDecoder:
    """Build the model that a folder configures, with weights on the meta device only, to count its cost.

    Args:
        folder: with a config.json of transformers, of a converted model or not.
        mixer: convert to this mechanism; "" = as it is, with the attention of its configuration if not converted.
        fields: of the mechanism.

    Raises:
        CheckpointError: the configuration cannot be read.
        ConfigError, UnsupportedError: the model does not convert so.
    """
    import transformers
    from accelerate import init_empty_weights  # type: ignore[import-untyped]

    auto: Any = transformers.AutoModelForCausalLM

    # buffers stay on the CPU: the angles of positions are read from them
    with init_empty_weights(include_buffers=False):
        with one_line_errors(folder):
            model: Any = auto.from_config(transformers.AutoConfig.from_pretrained(folder))
        if mixer:
            if mechanisms(model):
                revert(model)
            convert(model, mixer, **(fields or {}))
        convert_exactly(model, [layer for layer in exact_mechanisms(model) if layer not in mechanisms(model)])
    return ConvertedDecoder(model)
