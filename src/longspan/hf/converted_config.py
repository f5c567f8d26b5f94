"""Configurations of converted models: like the original's in memory, with their own model type on disk.

In memory a converted Llama is a Llama with records of its conversions, so that PEFT, the Trainer and pipelines treat it
as one. On disk its `model_type` is "longspan_llama", which transformers does not know without `import longspan.hf`, and
its activation function is replaced by a note. So loading the folder without longspan, or by the original class, raises
an error instead of building a model that computes something else.

Folders of earlier versions have the original's `model_type`; the original's configuration class is patched to recognize
them.
"""

import contextvars
import functools
import json
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedModel

from longspan.errors import CheckpointError, ConfigError
from longspan.hf.families import model_types

CORE = "longspan"
PREFIX = "longspan_"
_ORIGINAL = "longspan_original"
_NOTE = (
    "converted by longspan: `import longspan.hf`, then load it with AutoModelForCausalLM (or another Auto class) or "
    "longspan.hf.load"
)


class ConvertedConfig:
    """Mixin placed before an original configuration class; it writes and reads the form on disk.

    Attributes:
        longspan: one record per conversion: mixer, layers, fields.
        longspan_plain: the class of the original configuration.
    """

    longspan: list[dict[str, Any]]
    longspan_plain: type

    def to_json_string(self, use_diff: bool = True) -> str:
        """Return the form on disk as JSON text."""
        parent: Any = super()
        return json.dumps(_to_disk(json.loads(parent.to_json_string(use_diff))), indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **options: Any) -> Any:
        """Build a configuration from the form on disk or in memory; options as in transformers."""
        parent: Any = super()
        return parent.from_dict(_from_disk(config_dict), **options)


def _activation(kind: str) -> str:
    """Return the name of the field with the activation function for a model type."""
    if kind in ("gemma2", "gemma3_text"):
        return "hidden_activation"
    return "activation_function" if kind == "gpt2" else "hidden_act"


def _to_disk(config: dict[str, Any]) -> dict[str, Any]:
    """Convert the fields of a converted model's configuration to the form on disk."""
    if not config.get(CORE):
        return config
    kind = config["model_type"]
    name = _activation(kind)
    # the key must not be "model_type", or transformers would treat this as a nested configuration
    original = {"type": kind, "activation": config.get(name)}
    return {**config, "model_type": PREFIX + kind, name: _NOTE, _ORIGINAL: original}


def _from_disk(config: dict[str, Any]) -> dict[str, Any]:
    """Convert the form on disk back to the original's fields."""
    if _ORIGINAL not in config:
        return config
    original = config[_ORIGINAL]
    name = _activation(original["type"])
    read = {key: value for key, value in config.items() if key not in (_ORIGINAL, name)}
    # transformers does not store default values
    activation = {} if original["activation"] is None else {name: original["activation"]}
    return {**read, **activation, "model_type": original["type"]}


def _make_converted_config(plain: type) -> type:
    """Return the configuration class of converted models for an original configuration class."""
    name = f"Longspan{plain.__name__}"
    return type(name, (ConvertedConfig, plain), {"__module__": __name__, "longspan_plain": plain})


# by model type; also by name in this module, so that instances can be pickled
CONVERTED: dict[str, type] = {
    kind: _make_converted_config(CONFIG_MAPPING[kind]) for kind in model_types() if kind in CONFIG_MAPPING
}
globals().update({cls.__name__: cls for cls in CONVERTED.values()})

for _kind, _cls in CONVERTED.items():
    CONFIG_MAPPING.register(PREFIX + _kind, _cls, exist_ok=True)


# -- folders of earlier versions -----------------------------------------------------------------------------------

_by_original_class: contextvars.ContextVar[bool] = contextvars.ContextVar("longspan_by_original_class", default=False)


def _know_earlier_folders(plain: Any, converted: Any) -> None:
    """Patch a configuration class to recognize folders of converted models from earlier versions.

    Auto classes, which read by `from_dict`, then get the converted configuration; the original's model classes, which
    read by `from_pretrained`, raise an error.
    """
    from_dict, from_pretrained = plain.from_dict.__func__, plain.from_pretrained.__func__

    @functools.wraps(from_dict)
    def read(cls: Any, config_dict: dict[str, Any], **options: Any) -> Any:
        """Replace `from_dict`: build the converted configuration if the fields record a conversion."""
        if cls is plain and config_dict.get(CORE):
            if _by_original_class.get():
                raise CheckpointError(f"this folder belongs to a model {_NOTE}")
            return converted.from_dict(config_dict, **options)
        return from_dict(cls, config_dict, **options)

    @functools.wraps(from_pretrained)
    def open_folder(cls: Any, *args: Any, **options: Any) -> Any:
        """Replace `from_pretrained`: remember that the original class was used, so that `from_dict` raises."""
        token = _by_original_class.set(True)
        try:
            return from_pretrained(cls, *args, **options)
        finally:
            _by_original_class.reset(token)

    wrappers: tuple[Any, Any] = read, open_folder
    plain.from_dict, plain.from_pretrained = (classmethod(wrapper) for wrapper in wrappers)


for _cls in CONVERTED.values():
    _know_earlier_folders(getattr(_cls, "longspan_plain"), _cls)  # noqa: B009 - a plain type to the checker


def _refuse_other_models() -> None:
    """Patch transformers to raise if a model is built directly from a converted configuration,
    as it would not be converted.
    """
    build: Any = PreTrainedModel.__init__

    @functools.wraps(build)
    def init(self: Any, config: Any, *args: Any, **options: Any) -> None:
        """Replace `PreTrainedModel.__init__`: raise for a converted configuration."""
        if isinstance(config, ConvertedConfig):
            raise ConfigError(
                f"{type(self).__name__}: this configuration belongs to a model converted by longspan; build or load it "
                "with an Auto class (AutoModelForCausalLM.from_config, .from_pretrained) or longspan.hf.load"
            )
        build(self, config, *args, **options)

    changed: Any = PreTrainedModel
    changed.__init__ = init


_refuse_other_models()


def mark(config: Any, record: dict[str, Any]) -> None:
    """Add the record of a conversion to a configuration, in place."""
    config.longspan = [*(getattr(config, CORE, None) or []), record]
    cls: Any = CONVERTED.get(config.model_type)
    if cls is not None and type(config) is cls.longspan_plain:
        config.__class__ = cls


def unmark(config: Any) -> None:
    """Turn a converted configuration back into the original's, in place."""
    config.__dict__.pop(CORE, None)
    if isinstance(config, ConvertedConfig):
        config.__class__ = type(config).longspan_plain
