"""One call of a converted model: what transformers passes to its base model, laid out once for all layers."""

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, masking_utils

from longspan import host
from longspan import state as states
from longspan.contract.base import why_no_stream
from longspan.errors import ConfigError, UnsupportedError
from longspan.hf.cache import CACHE, CACHE_NAMES, StateCache, own_cache, take_cache
from longspan.hf.families import AttentionModules, find
from longspan.hf.keywords import PASSED_ON, known_keywords, settle_keywords
from longspan.hf.positions import PACKING, Documents, Past, documents
from longspan.mixers import BatchLayout

_OWN_KEYWORDS = ("mask", "reset")


@dataclass
class Call:
    """One call of a converted model, handed from layer to layer.

    Attributes:
        rows: where the real tokens are.
        before: the state of each converted layer, by its index.
        after: the same behind the call, filled by the layers.
        devices: where each layer worked on its state.
        aux_losses: auxiliary losses.
        graph: a graph is built.
        shift: as in `StateCache`, behind the call.
        first_columns: (batch, length) the column, earlier calls counted, at which the document of each token begins;
            None = at the first, or no layer keeps keys.
        offloading: states wait on the CPU while their layer does not run.
    """

    rows: BatchLayout
    before: dict[int, Any]
    after: dict[int, Any] = field(default_factory=dict)
    devices: dict[int, torch.device] = field(default_factory=dict)
    aux_losses: list[Tensor] = field(default_factory=list)
    graph: bool = field(default_factory=torch.is_grad_enabled)
    shift: Tensor | None = None
    first_columns: Tensor | None = None
    offloading: bool = False

    def finish(self, index: int, state: Any, device: torch.device) -> None:
        """Take the state behind layer `index`, which ran on `device`."""
        self.devices[index] = device
        self.after[index] = states.to(state, device="cpu") if self.offloading and state is not None else state

    def advance(self, cache: StateCache) -> None:
        """Hand all states to the cache, once every layer has succeeded."""
        for index, layer in cache.state_layers.items():
            layer.advance(
                self.after.get(index, self.before.get(index)), self.rows.columns, self.devices.get(index, layer.device)
            )
        cache.shift = self.shift
        if self.first_columns is not None:
            cache.first_columns = self.first_columns[:, -1]


def check_caches(arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
    """Refuse a call in which a converted layer is handed a cache that does not carry its state.

    Raises:
        UnsupportedError: the model made a cache of its own beside ours.
    """
    for value in (*arguments, *keywords.values()):
        if isinstance(value, Cache) and not isinstance(value, StateCache):
            raise UnsupportedError(
                "this version of transformers made a cache of keys beside the states of the converted layers; longspan "
                f"knows a cache by the names {', '.join(CACHE_NAMES)}"
            )


@host.eager
def prepare_call(
    base: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Lay out the call of a base model, and hand it to the layers; a cache that holds keys becomes one of states.

    Args:
        base: a converted model without its heads.
        arguments, keywords: of its forward.

    Returns:
        Those to call it with.
    """
    forward, modules = type(base).forward, find(base)
    known = known_keywords(forward)
    if len(arguments) > len(known):
        raise ConfigError(f"{type(base).__name__}: {len(arguments)} positional arguments, it takes {len(known)}")
    keywords = {**dict(zip(known, arguments, strict=False)), **keywords}
    inputs = keywords.get("input_ids")
    inputs = keywords.get("inputs_embeds") if inputs is None else inputs
    if inputs is None:
        raise ConfigError("give input_ids or inputs_embeds to a converted model")
    if (reset := keywords.pop("longspan_reset", None)) is not None:
        keywords["reset"] = reset
    cache = _cache(base, modules, keywords, take_cache(keywords))
    passed = PASSED_ON if modules.family.causal else PASSED_ON - {"shift_labels"}
    settle_keywords(keywords, {*known, *passed, *PACKING, *_OWN_KEYWORDS}, f"converted {type(base).__name__}")
    attentions = keywords.get("output_attentions")
    if getattr(base.config, "output_attentions", False) if attentions is None else attentions:
        raise UnsupportedError("output_attentions: converted layers never make a matrix of attention weights")
    call, mask = _lay_out(base, modules, keywords, inputs, cache)
    for name in _OWN_KEYWORDS:
        keywords.pop(name, None)
    keywords["longspan_call"] = call
    if modules.family.causal:
        keywords["use_cache"] = cache is not None
        if cache is not None:
            keywords[_cache_keyword(known)] = cache
    keywords["attention_mask"] = _attention_mask(base, modules, keywords, mask, call)
    return (), keywords


def _cache_keyword(known: tuple[str, ...]) -> str:
    """What this base model calls its cache."""
    return next((name for name in CACHE_NAMES if name in known), CACHE)


def _cache(base: Any, modules: AttentionModules, keywords: dict[str, Any], cache: Any) -> StateCache | None:
    """The states that this call begins with and fills; None: it begins with an empty past and keeps nothing."""
    use_cache = keywords.get("use_cache")
    if not modules.family.causal:
        return None
    if use_cache is None:
        # training reads segments without a past; a cache would keep their graphs alive
        use = getattr(base.config, "use_cache", False) and not base.training
    else:
        use = bool(use_cache)
    cores = modules.cores
    if not all(core.traits.streams for core in cores.values()):
        if cache is not None or use_cache:
            raise UnsupportedError(
                f"{why_no_stream(list(cores.values()))}; call the model, and generate, with use_cache=False"
            )
        return None
    if cache is None and not use:
        return None
    layers = [index in cores for index in range(len(modules.attentions))]
    carried = own_cache(cache, lambda: StateCache(layers, base.config))
    carried.begin()
    return carried


def _lay_out(
    base: Any, modules: AttentionModules, keywords: dict[str, Any], inputs: Tensor, cache: StateCache | None
) -> tuple[Call, Tensor | None]:
    before = {} if cache is None else {index: layer.state for index, layer in cache.state_layers.items()}
    first = next((state for state in before.values() if state is not None), None)
    live = states.live(first, inputs.shape[0], inputs.device).to(inputs.device)
    if live.shape[0] != inputs.shape[0]:
        raise ConfigError(f"the call has {inputs.shape[0]} rows, its {CACHE} {live.shape[0]}")
    past = Past(live, 0 if cache is None else cache.get_seq_length(), None if cache is None else cache.shift)
    packed = documents(inputs, past, keywords, modules.family.first_position(base))
    reads: dict[Hashable, Tensor] = {}
    for index, core in modules.cores.items():
        reads |= core.layout_inputs(before.get(index))
    rows = BatchLayout(live, inputs.shape[1], packed.mask, packed.reset, reads=reads)
    whole = len(modules.cores) == len(modules.attentions)
    if packed.positions is not None:
        keywords["position_ids"] = packed.positions
    elif modules.family.causal and (whole or packed.reset is not None or past.shift is not None):
        # without the mask transformers would count padding, and it knows of no documents
        keywords["position_ids"] = _count(rows, past.shift)
    most = modules.family.max_positions(base)
    if most is not None and rows.batch and rows.columns:
        largest = int(keywords["position_ids"].max()) if "position_ids" in keywords else rows.largest_position
        if largest >= most:
            raise UnsupportedError(
                f"position {largest} is past the {most} learned positions of this {base.config.model_type}; cut the "
                "text there, or convert a model with RoPE"
            )
    call = Call(rows, before, shift=packed.shift, offloading=cache is not None and cache.offloading)
    if not whole and (packed.reset is not None or (cache is not None and cache.first_columns is not None)):
        call.first_columns = _first_columns(packed, past, cache)
    return call, packed.mask


def _count(rows: BatchLayout, shift: Tensor | None) -> Tensor:
    """Positions (batch, columns) by the rows; documents from before the call go on as the caller counted them."""
    positions = rows.positions.expand(rows.batch, -1)
    if shift is not None:
        ahead = shift[:, None]
        positions = positions + (ahead if rows.origin is None else torch.where(rows.origin < 0, ahead, 0))
    return rows.scatter(positions[..., None])[..., 0]


# -- layers that keep their keys -----------------------------------------------------------------------------------


def _first_columns(packed: Documents, past: Past, cache: StateCache | None) -> Tensor:
    """(batch, length) the column, earlier calls counted, at which the document of each token begins."""
    before = (
        past.live.new_zeros(len(past.live)) if cache is None or cache.first_columns is None else cache.first_columns
    )
    if packed.reset is None:
        return before[:, None]
    column = torch.arange(past.columns, past.columns + packed.reset.shape[1], device=before.device)
    begun = torch.where(packed.reset, column, -1).cummax(1).values
    return torch.where(begun < 0, before[:, None], begun)


def _attention_mask(
    base: Any, modules: AttentionModules, keywords: dict[str, Any], mask: Tensor | None, call: Call
) -> Any:
    """What the base model makes the masks of its own layers of."""
    rows = call.rows
    if len(modules.cores) == len(modules.attentions):
        # nobody reads it; without one, or of padding, transformers would make a matrix of the length squared
        return torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=rows.device)
    cache = keywords.get(_cache_keyword(known_keywords(type(base).forward)))
    past = 0 if cache is None else cache.get_seq_length()
    wide = keywords.get("attention_mask")
    wide = mask if wide is None else wide
    if wide is not None and wide.shape[1] != past + rows.columns:
        raise ConfigError(
            f"the layers that were not converted keep the keys of earlier calls: pass attention_mask of shape "
            f"{(rows.batch, past + rows.columns)}, which says for all of them what is padding"
        )
    if call.first_columns is None:
        return wide
    # documents of one row do not see each other: transformers makes such masks of positions only where there is
    # neither padding nor a cache
    implementation, causal = base.config._attn_implementation, modules.family.causal
    if implementation not in ("eager", "sdpa", "flex_attention"):
        raise UnsupportedError(
            f"attn_implementation = {implementation!r}: with it, the layers that were not converted cannot keep the "
            "documents of one row apart; use 'sdpa'"
        )
    firsts = call.first_columns.expand(-1, rows.columns)

    def same(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return key >= firsts[batch, query - past] if causal else firsts[batch, query] == firsts[batch, key]

    options: dict[str, Any] = {"config": base.config, "attention_mask": wide, "and_mask_function": same}
    options["inputs_embeds"] = torch.empty(rows.batch, rows.columns, 0, dtype=base.dtype, device=rows.device)
    if not causal:
        return masking_utils.create_bidirectional_mask(**options)
    options[CACHE] = cache
    return masking_utils.create_masks_for_generate(**options)
