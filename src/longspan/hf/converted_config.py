"""Configurations of converted models: in memory those of the original, on disk of a type of their own.

In memory a converted Llama is a Llama with records of its conversions, so that PEFT, the Trainer and pipelines treat it
as one. On disk its `model_type` is "longspan_llama", which transformers alone does not know and `import longspan.hf`
makes known, and its activation function is a note that says so: whoever loads the folder without longspan, or by the
original class, gets an error in the place of a model that computes something else.

Folders of earlier versions have the original's `model_type`. The original's configuration class learns to know them.
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
    "of a model that longspan converted: `import longspan.hf`, then load it with AutoModelForCausalLM (or another Auto "
    "class) or longspan.hf.load"
)


class ConvertedConfig:
    """Stands before the class of an original configuration, and writes and reads the form on disk.

    Attributes:
        longspan: one record a conversion: mixer, layers, fields.
        longspan_plain: the class of the original configuration.
    """

    longspan: list[dict[str, Any]]
    longspan_plain: type

    def to_json_string(self, use_diff: bool = True) -> str:
        """The form on disk, as text."""
        parent: Any = super()
        return json.dumps(_to_disk(json.loads(parent.to_json_string(use_diff))), indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **options: Any) -> Any:
        """A configuration of the form on disk or in memory; options of transformers."""
        parent: Any = super()
        return parent.from_dict(_from_disk(config_dict), **options)


def _activation(kind: str) -> str:
    return "activation_function" if kind == "gpt2" else "hidden_act"


def _to_disk(config: dict[str, Any]) -> dict[str, Any]:
    if not config.get(CORE):
        return config
    kind = config["model_type"]
    name = _activation(kind)
    # no key "model_type" in here: transformers would take it for a configuration of its own
    original = {"type": kind, "activation": config.get(name)}
    return {**config, "model_type": PREFIX + kind, name: _NOTE, _ORIGINAL: original}


def _from_disk(config: dict[str, Any]) -> dict[str, Any]:
    if _ORIGINAL not in config:
        return config
    original = config[_ORIGINAL]
    name = _activation(original["type"])
    read = {key: value for key, value in config.items() if key not in (_ORIGINAL, name)}
    # the defaults of transformers may be left out
    activation = {} if original["activation"] is None else {name: original["activation"]}
    return {**read, **activation, "model_type": original["type"]}


def _make(plain: type) -> type:
    name = f"Longspan{plain.__name__}"
    return type(name, (ConvertedConfig, plain), {"__module__": __name__, "longspan_plain": plain})


# by model type; by name in this module too, so that they pickle
CONVERTED: dict[str, type] = {kind: _make(CONFIG_MAPPING[kind]) for kind in model_types() if kind in CONFIG_MAPPING}
globals().update({cls.__name__: cls for cls in CONVERTED.values()})

for _kind, _cls in CONVERTED.items():
    CONFIG_MAPPING.register(PREFIX + _kind, _cls, exist_ok=True)


# -- folders of earlier versions -----------------------------------------------------------------------------------

_by_original_class: contextvars.ContextVar[bool] = contextvars.ContextVar("longspan_by_original_class", default=False)


def _know_earlier_folders(plain: Any, converted: Any) -> None:
    """Let a configuration class tell the folders of converted models from its own: Auto classes, which read by
    `from_dict`, get the converted configuration; the original's model classes, which read by `from_pretrained`, an
    error.
    """
    from_dict, from_pretrained = plain.from_dict.__func__, plain.from_pretrained.__func__

    @functools.wraps(from_dict)
    def read(cls: Any, config_dict: dict[str, Any], **options: Any) -> Any:
        if cls is plain and config_dict.get(CORE):
            if _by_original_class.get():
                raise CheckpointError(f"this folder is {_NOTE}")
            return converted.from_dict(config_dict, **options)
        return from_dict(cls, config_dict, **options)

    @functools.wraps(from_pretrained)
    def open_folder(cls: Any, *args: Any, **options: Any) -> Any:
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
    """Let no model of transformers be built by a converted configuration: nothing in it would be converted."""
    build: Any = PreTrainedModel.__init__

    @functools.wraps(build)
    def init(self: Any, config: Any, *args: Any, **options: Any) -> None:
        if isinstance(config, ConvertedConfig):
            raise ConfigError(
                f"{type(self).__name__}: this configuration is of a model that longspan converted; build or load it "
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
    """Make the configuration that of the original again, in place."""
    config.__dict__.pop(CORE, None)
    if isinstance(config, ConvertedConfig):
        config.__class__ = type(config).longspan_plain
