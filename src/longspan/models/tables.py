"""Convert models to plain data and back, as in recipes and saved models.

A table has a `kind` ("decoder", "encoder" or "masked_lm"; default: decoder; `longspan.hf.tuned` adds "pretrained"), the
fields of that model's configuration, and optionally a table `memory` of `RecurrentConfig` (for a RecurrentMemory over
that model) and `classes` (for a RecurrentClassifier).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import nn

from longspan import renames
from longspan.config import from_dict, nearest, to_dict
from longspan.errors import ConfigError, UnsupportedError
from longspan.models.classifier import RecurrentClassifier
from longspan.models.config import DecoderConfig, EncoderConfig, RecurrentConfig
from longspan.models.decoder import Decoder
from longspan.models.encoder import Encoder
from longspan.models.masked import MaskedLM
from longspan.models.recurrent import RecurrentMemory

_KINDS: dict[str, tuple[Any, Any]] = {
    "decoder": (Decoder, DecoderConfig),
    "encoder": (Encoder, EncoderConfig),
    "masked_lm": (MaskedLM, EncoderConfig),
}


def register_kind(name: str, model_class: Any, config_class: Any) -> None:
    """Add a kind of model.

    Args:
        name: value of `kind` in a table.
        model_class: built from a configuration; has a method `describe` that returns its table. An optional static
            method `backbone(config)` returns the model to wrap if there is a table `memory`; such a backbone has its
            table as an attribute `longspan_table`.
        config_class: a dataclass with a field `vocab_size`.
    """
    _KINDS[name] = (model_class, config_class)


def resolve_model(table: Mapping[str, Any], where: str = "model") -> dict[str, Any]:
    """Return a model table with all defaults filled in; `vocab_size` only if it is set, because it follows the task.

    Raises:
        ConfigError: an unknown kind or field, with the nearest name, or an invalid value.
    """
    kind = table.get("kind", "decoder")
    if kind not in _KINDS:
        raise ConfigError(f"{where}.kind = {kind!r}: unknown kind of model{nearest(str(kind), _KINDS)}")
    fields = {key: value for key, value in table.items() if key not in ("kind", "memory", "classes")}
    fields = renames.model(fields)
    resolved: dict[str, Any] = {"kind": kind, **to_dict(from_dict(_KINDS[kind][1], fields, where))}
    if "vocab_size" not in fields:
        del resolved["vocab_size"]
    if "memory" in table:
        if kind == "masked_lm":
            raise ConfigError(f"{where}.memory: not supported with kind = 'masked_lm'; use kind decoder or encoder")
        resolved["memory"] = to_dict(from_dict(RecurrentConfig, table["memory"], f"{where}.memory"))
    if "classes" in table:
        if "memory" not in table:
            raise ConfigError(f"{where}.classes: a classifier needs a table {where}.memory; add one")
        resolved["classes"] = int(table["classes"])
    return resolved


def as_kind(table: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """Convert a resolved table to another kind;
    fields that the other kind lacks are dropped if they have their default.
    """
    before = to_dict(_KINDS[table["kind"]][1]())
    known = {field.name for field in dataclasses.fields(_KINDS[kind][1])} | {"memory", "classes"}
    fields = {name: value for name, value in table.items() if name in known or value != before.get(name)}
    return {**fields, "kind": kind}


def build_model(table: Mapping[str, Any], where: str = "model") -> Any:
    """Build the model of a table; raises as `resolve_model` does."""
    resolved = resolve_model(table, where)
    model_class, config_class = _KINDS[resolved.pop("kind")]
    memory, classes = resolved.pop("memory", None), resolved.pop("classes", None)
    config = from_dict(config_class, resolved, where)
    if memory is None:
        return model_class(config)
    model = getattr(model_class, "backbone", model_class)(config)
    model = RecurrentMemory(model, from_dict(RecurrentConfig, memory, f"{where}.memory"))
    return model if classes is None else RecurrentClassifier(model, classes)


def describe_model(model: nn.Module) -> dict[str, Any]:
    """Return the table of a model.

    Raises:
        UnsupportedError: a recurrent memory over a foreign backbone.
    """
    describe = getattr(model, "describe", None)
    if callable(describe):
        # a registered kind, which describes itself
        described: dict[str, Any] = describe()
        return described
    if isinstance(model, RecurrentClassifier):
        return {**describe_model(model.recurrent), "classes": model.num_classes}
    if isinstance(model, RecurrentMemory):
        table = getattr(model.backbone, "longspan_table", None)
        if table is None and not isinstance(model.backbone, (Decoder, Encoder)):
            raise UnsupportedError(
                f"RecurrentMemory over {type(model.backbone).__name__} cannot be saved as one model; save the backbone "
                "with its own save_pretrained and the memory (model.cell) with its state_dict()"
            )
        return {**(table or describe_model(model.backbone)), "memory": to_dict(model.config)}
    kinds = [kind for kind, (model_class, _) in _KINDS.items() if isinstance(model, model_class)]
    assert kinds, f"{type(model).__name__} is not a model of this library"
    return {"kind": kinds[0], **to_dict(model.config)}
