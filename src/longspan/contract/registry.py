"""Mechanisms by name: longspan's own, those that a program registers, and those of installed packages.

A new mechanism in longspan is a folder under `mechanisms` and one line here. A package adds mechanisms by entry points
of the group `longspan.mechanisms`, `name = "module:CoreClass"`.
"""

import dataclasses
import functools
import importlib
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from longspan import renames
from longspan.config import from_dict, nearest
from longspan.contract.base import Mechanism, Mixer, Shape
from longspan.contract.projections import Projections
from longspan.errors import ConfigError

_MECHANISMS = {
    "full": "longspan.mechanisms.full.layer:FullMechanism",
    "window": "longspan.mechanisms.window.layer:WindowMechanism",
    "window_linear": "longspan.mechanisms.window_linear.layer:WindowLinearMechanism",
    "linear": "longspan.mechanisms.linear.layer:LinearMechanism",
    "gated_delta": "longspan.mechanisms.gated_delta.layer:GatedDeltaMechanism",
    "performer": "longspan.mechanisms.performer.layer:PerformerMechanism",
    "infini": "longspan.mechanisms.infini.layer:InfiniMechanism",
    "associative": "longspan.mechanisms.associative.layer:AssociativeMechanism",
    "sparse": "longspan.mechanisms.sparse.layer:SparseMechanism",
    "adaptive_span": "longspan.mechanisms.adaptive_span.layer:AdaptiveSpanMechanism",
    "entmax": "longspan.mechanisms.entmax.layer:EntmaxMechanism",
    "bp": "longspan.mechanisms.bp.layer:BPMechanism",
    "lsh": "longspan.mechanisms.lsh.layer:LSHMechanism",
    "routing": "longspan.mechanisms.routing.layer:RoutingMechanism",
    "memorizing": "longspan.mechanisms.memorizing.layer:MemorizingMechanism",
    "transformer_xl": "longspan.mechanisms.transformer_xl.layer:TransformerXLMechanism",
    "compressive": "longspan.mechanisms.compressive.layer:CompressiveMechanism",
    "mixed_heads": "longspan.mechanisms.mixed_heads.layer:MixedHeadsMechanism",
}


REGISTERED: dict[str, type[Mechanism]] = {}
"""Mechanisms registered by the running program, by name."""


@functools.cache
def installed() -> dict[str, EntryPoint]:
    """Return the entry points of installed packages by name, without loading them;
    names of built-in mechanisms are skipped.
    """
    return {point.name: point for point in entry_points(group="longspan.mechanisms") if point.name not in _MECHANISMS}


def names() -> list[str]:
    """Return the mechanism names that `build` accepts, without loading any installed package."""
    return list(dict.fromkeys([*_MECHANISMS, *REGISTERED, *sorted(installed())]))


def register(name: str, mechanism_class: type[Mechanism]) -> None:
    """Add a mechanism under a new name for as long as the program runs; it then works like a built-in one.

    Raises:
        ConfigError: the name is taken, or the class is not a subclass of `Mechanism` whose `Config` is a dataclass.
    """
    if name in _MECHANISMS or REGISTERED.get(name, mechanism_class) is not mechanism_class:
        raise ConfigError(f"register: the mixer name {name!r} is already taken; choose another one")
    REGISTERED[name] = _checked(mechanism_class, f"register {name!r}")


def mechanism_class(name: str, where: str = "mixer") -> type[Mechanism]:
    """Return the core class of a mechanism name, loading its module.

    Raises:
        ConfigError: unknown name (the message suggests the nearest one), or a mechanism of an installed package fails
            to load.
    """
    name = renames.mixer(name)
    if name in _MECHANISMS:
        module, _, attribute = _MECHANISMS[name].partition(":")
        builtin: type[Mechanism] = getattr(importlib.import_module(module), attribute)
        return builtin
    if name in REGISTERED:
        return REGISTERED[name]
    point = installed().get(name)
    if point is None:
        raise ConfigError(f"{where}: unknown mixer {name!r}{nearest(str(name), names())}")
    origin = f"{where}: mixer {name!r} of {point.dist.name if point.dist else point.value}"
    try:
        loaded = point.load()
    except Exception as error:  # third-party modules may raise anything
        raise ConfigError(f"{origin} failed to load: {type(error).__name__}: {error}") from error
    return _checked(loaded, origin)


def _checked(loaded: Any, where: str) -> type[Mechanism]:
    """Return the class if it is a valid mechanism; raise a ConfigError otherwise."""
    if not (
        isinstance(loaded, type)
        and issubclass(loaded, Mechanism)
        and dataclasses.is_dataclass(getattr(loaded, "Config", None))
    ):
        raise ConfigError(f"{where}: {loaded!r} is not a subclass of Mechanism with a dataclass Config")
    renames.with_current_keyword(loaded, "forward", {"penalties": "aux_losses"})
    return loaded


def examples(name: str) -> tuple[dict[str, Any], ...]:
    """Return small field sets, one for each form of a mechanism (for 4 heads)."""
    return mechanism_class(name).examples


def build_mechanism(name: str, shape: Shape, fields: dict[str, Any], where: str = "mixer") -> Mechanism:
    """Build a mechanism by name from its fields, which are checked first."""
    name = renames.mixer(name)
    cls = mechanism_class(name, where)
    fields = renames.fields(name, fields)
    config: Any = from_dict(cls.Config, fields, name if where == "mixer" else f"{where} ({name})")
    return cls(shape, config)


def build(
    name: str,
    *,
    dim: int,
    num_heads: int,
    num_kv_heads: int | None = None,
    head_dim: int | None = None,
    causal: bool = True,
    bias: bool = False,
    rope: float | None = None,
    dropout: float = 0.0,
    **fields: Any,
) -> Mixer:
    """Build a mixer by name.

    Args:
        name: one of `names()`.
        dim: width of the hidden states.
        num_heads: query heads.
        num_kv_heads: key and value heads, dividing `num_heads`; default: `num_heads`.
        head_dim: width per head; default dim // num_heads.
        causal: no token sees a later one; False = bidirectional, where the mechanism has that form.
        bias: biases in the four projections.
        rope: base of rotary positions (10000.0 is the paper's); None = no positions. Mechanisms with their own
            positions (transformer_xl) ignore it.
        dropout: applied to the output of the layer.
        fields: the mechanism's own fields.

    Raises:
        ConfigError: unknown name or field (the message suggests the nearest), or inconsistent sizes.
    """
    name = renames.mixer(name)
    num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    for label, value in (("dim", dim), ("num_heads", num_heads), ("num_kv_heads", num_kv_heads)):
        if not isinstance(value, int) or value < 1:
            raise ConfigError(f"{name}: {label} = {value!r}: must be an integer of at least 1")
    if num_heads % num_kv_heads:
        raise ConfigError(f"{name}: num_kv_heads = {num_kv_heads}: must divide num_heads = {num_heads}")
    if head_dim is None and dim % num_heads:
        raise ConfigError(f"{name}: dim = {dim} is not a multiple of num_heads = {num_heads}; set head_dim")
    head_dim = dim // num_heads if head_dim is None else head_dim
    if rope is not None and (head_dim % 2 or rope <= 0):
        raise ConfigError(f"{name}: rope = {rope} needs a positive base and an even head_dim, which is {head_dim}")
    if not 0 <= dropout < 1:
        raise ConfigError(f"{name}: dropout = {dropout}: must be in [0, 1)")
    shape = Shape(dim=dim, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, causal=causal, rope=rope)
    core = build_mechanism(name, shape, fields)
    traits = core.traits
    projections = Projections(
        dim, num_heads, num_kv_heads, head_dim, bias, keys=traits.uses_keys, value_dim=traits.value_dim
    )
    return Mixer(name, core, projections, dropout)
