"""Mechanisms by name. A new one is one line here, one file beside this one, and its definition in `reference`."""

import importlib
from typing import Any

from longspan.config import from_dict, nearest
from longspan.errors import ConfigError
from longspan.mixers.base import Core, Mixer, Shape
from longspan.mixers.projections import Projections

_CORES = {
    "full": "longspan.mixers.full:FullCore",
    "window": "longspan.mixers.window:WindowCore",
    "linear": "longspan.mixers.linear:LinearCore",
    "gated_delta": "longspan.mechanisms.gated_delta.layer:GatedDeltaCore",
    "performer": "longspan.mixers.performer:PerformerCore",
    "infini": "longspan.mixers.infini:InfiniCore",
    "associative": "longspan.mixers.associative:AssociativeCore",
    "sparse": "longspan.mixers.sparse:SparseCore",
    "adaptive_span": "longspan.mixers.adaptive_span:AdaptiveSpanCore",
    "entmax": "longspan.mixers.entmax:EntmaxCore",
    "bp": "longspan.mixers.bp:BPCore",
    "lsh": "longspan.mixers.lsh:LSHCore",
    "routing": "longspan.mixers.routing:RoutingCore",
    "memorizing": "longspan.mixers.memorizing:MemorizingCore",
    "transformer_xl": "longspan.mixers.transformer_xl:TransformerXLCore",
    "compressive": "longspan.mixers.compressive:CompressiveCore",
    "heads": "longspan.mixers.heads:HeadsCore",
}


def names() -> list[str]:
    """The names that `build` knows."""
    return list(_CORES)


def core_class(name: str, where: str = "mixer") -> type[Core]:
    """The class behind a name.

    Raises:
        ConfigError: no mechanism of that name; names the nearest.
    """
    if name not in _CORES:
        raise ConfigError(f"{where}: unknown mixer {name!r}{nearest(str(name), _CORES)}")
    module, _, attribute = _CORES[name].partition(":")
    found: type[Core] = getattr(importlib.import_module(module), attribute)
    return found


def examples(name: str) -> tuple[dict[str, Any], ...]:
    """Small field sets that show every form of a mechanism (for 4 heads)."""
    return core_class(name).examples


def build_core(name: str, shape: Shape, fields: dict[str, Any], where: str = "mixer") -> Core:
    """A core by name, its fields checked."""
    cls = core_class(name, where)
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
        causal: no token sees a later one; False = both sides, where the mechanism has that form.
        bias: biases in the four projections.
        rope: base of rotary positions (10000.0 is the paper's); None = no positions. Mechanisms with positions of
            their own (transformer_xl) leave it aside.
        dropout: applied to the output of the layer.
        fields: the mechanism's own fields.

    Raises:
        ConfigError: unknown name or field (with the nearest), or sizes that do not fit.
    """
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
    core = build_core(name, shape, fields)
    return Mixer(name, core, Projections(dim, num_heads, num_kv_heads, head_dim, bias, core.uses_keys), dropout)
