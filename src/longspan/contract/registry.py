"""Mechanisms by name: longspan's own, those that a program registers, and those of installed packages.

A new one of longspan's own is one line here, one file beside this one, and its definition in `reference`. A package
brings mechanisms of its own by entry points of the group `longspan.mechanisms`, `name = "module:CoreClass"`.
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
"""Mechanisms that this program has registered, by name."""


@functools.cache
def installed() -> dict[str, EntryPoint]:
    """Entry points of installed packages by name, not loaded yet; names of longspan's own are left out."""
    return {point.name: point for point in entry_points(group="longspan.mechanisms") if point.name not in _MECHANISMS}


def names() -> list[str]:
    """The names that `build` knows; none of an installed package is loaded for it."""
    return list(dict.fromkeys([*_MECHANISMS, *REGISTERED, *sorted(installed())]))


def register(name: str, mechanism_class: type[Mechanism]) -> None:
    """Make a mechanism known by a new name, as if it were longspan's own, for as long as the program runs.

    Raises:
        ConfigError: the name is taken, or the class is no subclass of `Mechanism` whose `Config` is a dataclass.
    """
    if name in _MECHANISMS or REGISTERED.get(name, mechanism_class) is not mechanism_class:
        raise ConfigError(f"register: there is a mixer {name!r} already")
    REGISTERED[name] = _checked(mechanism_class, f"register {name!r}")


def mechanism_class(name: str, where: str = "mixer") -> type[Mechanism]:
    """The class behind a name.

    Raises:
        ConfigError: no mechanism of that name (names the nearest), or one of an installed package that fails to load.
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
    except Exception as error:  # whatever a module of others raises
        raise ConfigError(f"{origin} does not load: {type(error).__name__}: {error}") from error
    return _checked(loaded, origin)


def _checked(loaded: Any, where: str) -> type[Mechanism]:
    """A class that is a mechanism, or an error."""
    if not (
        isinstance(loaded, type)
        and issubclass(loaded, Mechanism)
        and dataclasses.is_dataclass(getattr(loaded, "Config", None))
    ):
        raise ConfigError(f"{where}: {loaded!r} is not a subclass of Mechanism with a dataclass Config")
    renames.with_current_keyword(loaded, "forward", {"penalties": "aux_losses"})
    return loaded


def examples(name: str) -> tuple[dict[str, Any], ...]:
    """Small field sets that show every form of a mechanism (for 4 heads)."""
    return mechanism_class(name).examples


def build_mechanism(name: str, shape: Shape, fields: dict[str, Any], where: str = "mixer") -> Mechanism:
    """A core by name, its fields checked."""
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
    """A mixer by name.

    Args:
        name: one of `names()`.
        dim: width of the hidden states.
        num_heads: query heads.
        num_kv_heads: key and value heads, dividing `num_heads`; default: `num_heads`.
        head_dim: width of a head; default dim // num_heads.
        causal: no token sees a later one; False = bidirectional, where the mechanism has that form.
        bias: biases in the four projections.
        rope: base of rotary positions (10000.0 is the paper's); None = no positions. Mechanisms with positions of
            their own (transformer_xl) leave it aside.
        dropout: applied to the output of the layer.
        fields: the mechanism's own fields.

    Raises:
        ConfigError: unknown name or field (with the nearest), or sizes that do not fit.
    """
    name = renames.mixer(name)
    num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    for label, value in (("dim", dim), ("num_heads", num_heads), ("num_kv_heads", num_kv_heads)):
        if not isinstance(value, int) or value < 1:
            raise ConfigError(f"{name}: {label} = {value!r}: must be a whole number of at least 1")
    if num_heads % num_kv_heads:
        raise ConfigError(f"{name}: num_kv_heads = {num_kv_heads} does not divide num_heads = {num_heads}")
    if head_dim is None and dim % num_heads:
        raise ConfigError(f"{name}: dim = {dim} is no multiple of num_heads = {num_heads}; give head_dim")
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
