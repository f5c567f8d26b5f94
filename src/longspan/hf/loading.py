"""Folders of converted models, read by `longspan.hf.load`, the Auto classes of transformers, pipelines and PEFT."""

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.models.auto import auto_factory, modeling_auto

from longspan import renames
from longspan.errors import CheckpointError
from longspan.hf.convert import convert
from longspan.hf.converted_config import CONVERTED, CORE, unmark

# options of from_pretrained that say which files are meant
_PLACE = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


class ConvertedLoader:
    """What Auto classes find for a converted configuration: loads the original class, then converts what it loaded.

    Attributes:
        original: the name of the class in transformers.
        config_class: of its configurations.
    """

    original: str
    config_class: type

    @classmethod
    def from_pretrained(cls, folder: Any, *args: Any, config: Any, **options: Any) -> Any:
        """A converted model; options of transformers."""
        return load_as(getattr(transformers, cls.original), folder, *args, config=config, **options)

    @classmethod
    def _from_config(cls, config: Any, **options: Any) -> Any:
        """A converted model of new weights."""
        model = getattr(transformers, cls.original)._from_config(_original(config), **options)
        _convert_again(model, config)
        return model


def load(folder: str | Path, auto: Any = None, **options: Any) -> Any:
    """A converted model that `save_pretrained` wrote: the model, its conversion, its new parameters.

    Args:
        folder: that holds config.json and safetensors.
        auto: a class of transformers that loads the original; None = the one that wrote the folder
            (`architectures` in its config.json).
        options: of `from_pretrained`. Parameters of mechanisms keep the type they were stored in where `dtype` is left
            out; under a `dtype` those of another type are fp32 at least.

    Raises:
        CheckpointError: the folder holds no converted model, or lacks parameters of it.
    """
    files = {key: options[key] for key in _PLACE if key in options}
    config = transformers.AutoConfig.from_pretrained(folder, **files)
    if not getattr(config, CORE, None):
        raise CheckpointError(f"{folder}: its config.json names no conversion; load it with transformers")
    written = [getattr(transformers, name, None) for name in getattr(config, "architectures", None) or []]
    encoder = config.model_type in ("bert", "roberta")
    known = [auto, *written, transformers.AutoModel if encoder else transformers.AutoModelForCausalLM]
    return load_as(next(filter(None, known)), folder, config=config, **options)


def load_as(cls: Any, folder: Any, *args: Any, config: Any, **options: Any) -> Any:
    """A converted model of a class of transformers, or what an Auto class chooses; raises as `load` does."""
    plain = _original(config)
    # adapters go on behind the conversion, whose parameters they may hold
    adapters = dict(options.pop("adapter_kwargs", None) or {})
    path, name = adapters.pop("_adapter_model_path", None), options.pop("adapter_name", "default")
    with _expected(cls, plain):
        opened = cls.from_pretrained(folder, *args, config=plain, **options)
    model = opened[0] if isinstance(opened, tuple) else opened
    _convert_again(model, config)
    _take_up(model, folder, options)
    if path is not None:
        model.load_adapter(path, adapter_name=name, adapter_kwargs=adapters)
    model.eval()
    return opened


def _original(config: Any) -> Any:
    """The configuration of the original."""
    plain = copy.deepcopy(config)
    unmark(plain)
    return plain


def _convert_again(model: Any, config: Any) -> None:
    """Repeat the conversions that a configuration records."""
    with renames.reading_saved():
        for record in config.longspan:
            convert(model, record["mixer"], layers=record["layers"], **record["fields"])


def _take_up(model: Any, folder: Any, options: dict[str, Any]) -> None:
    """Give the mechanisms of a model their stored parameters and buffers.

    Raises:
        CheckpointError: one is missing, or of another size.
    """
    dtype: Any = options.get("dtype", options.get("torch_dtype"))
    dtype = getattr(torch, dtype) if isinstance(dtype, str) and dtype != "auto" else dtype
    stored = _stored(folder, options)
    prefix = f"{model.base_model_prefix}."
    fitted = {}
    for key, ours in model.state_dict().items():
        if f".{CORE}." not in key:
            continue
        # a folder of a model with a head, loaded without it, and the other way round
        theirs = next((stored[name] for name in (key, prefix + key, key.removeprefix(prefix)) if name in stored), None)
        if theirs is None:
            raise CheckpointError(f"{folder}: {key} is missing")
        if theirs.shape != ours.shape:
            raise CheckpointError(
                f"{folder}: {key} is {tuple(theirs.shape)}, the configuration says {tuple(ours.shape)}"
            )
        changes = theirs.is_floating_point() and isinstance(dtype, torch.dtype) and theirs.dtype != dtype
        fitted[key] = theirs.to(ours.device, torch.promote_types(dtype, torch.float32) if changes else theirs.dtype)
    # as they were stored: gates are fp32 beside weights of any type
    model.load_state_dict(fitted, strict=False, assign=True)


def _stored(folder: Any, options: dict[str, Any]) -> dict[str, Tensor]:
    """What the files of a folder, or of a name on the hub, hold for mechanisms."""
    from safetensors import safe_open
    from transformers.utils import hub

    cached_file: Any = hub.cached_file
    get_checkpoint_shard_files: Any = hub.get_checkpoint_shard_files

    options_of_files = {key: options[key] for key in _PLACE if options.get(key) is not None}
    variant = f".{options['variant']}" if options.get("variant") else ""
    absent: dict[str, Any] = {"_raise_exceptions_for_missing_entries": False}
    files = [cached_file(folder, f"model{variant}.safetensors", **absent, **options_of_files)]
    if files == [None]:
        index = cached_file(folder, f"model.safetensors.index{variant}.json", **absent, **options_of_files)
        if index is None:
            raise CheckpointError(f"{folder}: holds no model.safetensors")
        files = get_checkpoint_shard_files(folder, index, **options_of_files)[0]
    tensors_by_name: dict[str, Tensor] = {}
    for file in files:
        with safe_open(file, "pt") as tensors:
            tensors_by_name |= {key: tensors.get_tensor(key) for key in tensors.keys() if f".{CORE}." in key}  # noqa: SIM118
    return tensors_by_name


@contextlib.contextmanager
def _expected(auto: Any, config: Any) -> Iterator[None]:
    """Keep transformers from reporting the parameters of mechanisms, which it does not load, as unexpected."""
    known = getattr(auto, "_model_mapping", None)
    cls = auto if known is None else known.get(type(config), auto)
    if isinstance(cls, tuple | list):
        get_model_class: Any = auto_factory._get_model_class
        cls = get_model_class(config, known)
    before = cls.__dict__.get("_keys_to_ignore_on_load_unexpected")
    cls._keys_to_ignore_on_load_unexpected = [*(before or []), rf"(^|\.){CORE}\."]
    try:
        yield
    finally:
        cls._keys_to_ignore_on_load_unexpected = before


def register() -> None:
    """Make the folders of converted models known to every Auto class that knows the original."""
    for auto in vars(modeling_auto).values():
        mapping = getattr(auto, "_model_mapping", None)
        if not isinstance(auto, type) or mapping is None:
            continue
        for kind, config_class in CONVERTED.items():
            # by name alone: what nobody loads need not be imported
            names = mapping._model_mapping.get(kind)
            name = names[0] if isinstance(names, tuple | list) else names
            if isinstance(name, str):
                attributes = {"__module__": __name__, "original": name, "config_class": config_class}
                loader = type(name, (ConvertedLoader,), attributes)
                mapping.register(config_class, loader, exist_ok=True)
