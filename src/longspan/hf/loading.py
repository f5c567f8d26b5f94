"""Load folders of converted models by `longspan.hf.load`, transformers' Auto classes, pipelines and PEFT."""

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
from longspan.hf.convert import convert_without_defaults
from longspan.hf.converted_config import CONVERTED, CORE, unmark

# options of from_pretrained that select files
_FILE_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


class ConvertedLoader:
    """Class that Auto classes use for a converted configuration: loads the original class, then repeats the conversion.

    Attributes:
        original: name of the original model class in transformers.
        config_class: class of its configurations.
    """

    original: str
    config_class: type

    @classmethod
    def from_pretrained(cls, folder: Any, *args: Any, config: Any, **options: Any) -> Any:
        """Load a converted model from a folder; `config` is its converted configuration, options as in transformers."""
        return load_as(getattr(transformers, cls.original), folder, *args, config=config, **options)

    @classmethod
    def _from_config(cls, config: Any, **options: Any) -> Any:
        """Build a converted model with new random weights."""
        model = getattr(transformers, cls.original)._from_config(_original(config), **options)
        _convert_again(model, config)
        return model


def load(folder: str | Path, auto: Any = None, **options: Any) -> Any:
    """Load a converted model that `save_pretrained` wrote, with its conversion and its new parameters.

    Args:
        folder: contains config.json and safetensors.
        auto: a class of transformers to load the original with; None = the one that wrote the folder (`architectures`
            in its config.json).
        options: of `from_pretrained`. Without `dtype`, parameters of mechanisms keep the stored dtype; with it, those
            of another dtype become fp32 at least.

    Raises:
        CheckpointError: the folder contains no converted model, or some of its parameters are missing.
    """
    files = {key: options[key] for key in _FILE_OPTIONS if key in options}
    config = transformers.AutoConfig.from_pretrained(folder, **files)
    if not getattr(config, CORE, None):
        raise CheckpointError(f"{folder}: config.json records no conversion by longspan; load it with transformers")
    written = [getattr(transformers, name, None) for name in getattr(config, "architectures", None) or []]
    encoder = config.model_type in ("bert", "roberta")
    known = [auto, *written, transformers.AutoModel if encoder else transformers.AutoModelForCausalLM]
    return load_as(next(filter(None, known)), folder, config=config, **options)


def load_as(cls: Any, folder: Any, *args: Any, config: Any, **options: Any) -> Any:
    """Load a converted model by a class of transformers or an Auto class; raises as `load` does."""
    plain = _original(config)
    # adapters are loaded after the conversion, because they may contain its parameters
    adapters = dict(options.pop("adapter_kwargs", None) or {})
    path, name = adapters.pop("_adapter_model_path", None), options.pop("adapter_name", "default")
    with _ignoring_mechanisms(cls, plain):
        opened = cls.from_pretrained(folder, *args, config=plain, **options)
    model = opened[0] if isinstance(opened, tuple) else opened
    _convert_again(model, config)
    _load_mechanisms(model, folder, options)
    if path is not None:
        model.load_adapter(path, adapter_name=name, adapter_kwargs=adapters)
    model.eval()
    return opened


def _original(config: Any) -> Any:
    """Return a copy of a converted configuration as the original's."""
    plain = copy.deepcopy(config)
    unmark(plain)
    return plain


def _convert_again(model: Any, config: Any) -> None:
    """Repeat the conversions that a configuration records."""
    with renames.reading_saved():
        for record in config.longspan:
            convert_without_defaults(model, record["mixer"], record["layers"], record["fields"])


def _load_mechanisms(model: Any, folder: Any, options: dict[str, Any]) -> None:
    """Load the stored parameters and buffers of the mechanisms into a model.

    Raises:
        CheckpointError: one is missing, or has another shape.
    """
    dtype: Any = options.get("dtype", options.get("torch_dtype"))
    dtype = getattr(torch, dtype) if isinstance(dtype, str) and dtype != "auto" else dtype
    stored = _stored(folder, options)
    prefix = f"{model.base_model_prefix}."
    fitted = {}
    for key, ours in model.state_dict().items():
        if f".{CORE}." not in key:
            continue
        # the folder's model may have a head that this one lacks, or the reverse
        theirs = next((stored[name] for name in (key, prefix + key, key.removeprefix(prefix)) if name in stored), None)
        if theirs is None:
            raise CheckpointError(f"{folder}: {key} is missing; convert and save the model again")
        if theirs.shape != ours.shape:
            raise CheckpointError(
                f"{folder}: {key} has shape {tuple(theirs.shape)}, expected {tuple(ours.shape)} by the configuration; "
                "convert and save the model again"
            )
        changes = theirs.is_floating_point() and isinstance(dtype, torch.dtype) and theirs.dtype != dtype
        fitted[key] = theirs.to(ours.device, torch.promote_types(dtype, torch.float32) if changes else theirs.dtype)
    # keep the stored dtype: gates are fp32 whatever the dtype of the other weights
    model.load_state_dict(fitted, strict=False, assign=True)


def _stored(folder: Any, options: dict[str, Any]) -> dict[str, Tensor]:
    """Return the tensors of mechanisms in the files of a folder or a hub name, by parameter name."""
    from safetensors import safe_open
    from transformers.utils import hub

    cached_file: Any = hub.cached_file
    get_checkpoint_shard_files: Any = hub.get_checkpoint_shard_files

    options_of_files = {key: options[key] for key in _FILE_OPTIONS if options.get(key) is not None}
    variant = f".{options['variant']}" if options.get("variant") else ""
    absent: dict[str, Any] = {"_raise_exceptions_for_missing_entries": False}
    files = [cached_file(folder, f"model{variant}.safetensors", **absent, **options_of_files)]
    if files == [None]:
        index = cached_file(folder, f"model.safetensors.index{variant}.json", **absent, **options_of_files)
        if index is None:
            raise CheckpointError(f"{folder}: contains no model.safetensors")
        files = get_checkpoint_shard_files(folder, index, **options_of_files)[0]
    tensors_by_name: dict[str, Tensor] = {}
    for file in files:
        with safe_open(file, "pt") as tensors:
            tensors_by_name |= {key: tensors.get_tensor(key) for key in tensors.keys() if f".{CORE}." in key}  # noqa: SIM118
    return tensors_by_name


@contextlib.contextmanager
def _ignoring_mechanisms(auto: Any, config: Any) -> Iterator[None]:
    """Context in which transformers does not report the parameters of mechanisms, which it does not load,
    as unexpected.
    """
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
    """Register the folders of converted models with every Auto class that knows the original."""
    for auto in vars(modeling_auto).values():
        mapping = getattr(auto, "_model_mapping", None)
        if not isinstance(auto, type) or mapping is None:
            continue
        for kind, config_class in CONVERTED.items():
            # by name, so that model classes are only imported when they are loaded
            names = mapping._model_mapping.get(kind)
            name = names[0] if isinstance(names, tuple | list) else names
            if isinstance(name, str):
                attributes = {"__module__": __name__, "original": name, "config_class": config_class}
                loader = type(name, (ConvertedLoader,), attributes)
                mapping.register(config_class, loader, exist_ok=True)
