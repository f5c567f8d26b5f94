"""One call of a converted model: the arguments of its base model are turned into a layout that all layers share."""

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers import Cache, masking_utils

from longspan import host
from longspan import state as states
from longspan.contract.base import why_no_stream
from longspan.errors import ConfigError, UnsupportedError
from longspan.hf.cache import CACHE, CACHE_NAMES, StateCache, is_linear, own_cache, take_cache
from longspan.hf.families import AttentionModules, attention_modules
from longspan.hf.keywords import PASSED_ON, check_keywords, known_keywords
from longspan.hf.positions import PACKING, Documents, Past, documents
from longspan.mixers import BatchLayout

_OWN_KEYWORDS = ("mask", "reset")


@dataclass
class Call:
    """Data of one call of a converted model, passed from layer to layer.

    Attributes:
        rows: layout of the call.
        before: the state of each converted layer before the call, by layer index.
        after: the states after the call, filled in by the layers.
        devices: where each layer computed.
        aux_losses: auxiliary losses.
        graph: whether gradients are enabled.
        shift: as in `StateCache`, after the call.
        first_columns: (batch, length) the column, counting earlier calls, at which the document of each token begins;
            None = the first column, or no layer stores keys.
        offloading: states stay on the CPU while their layer does not compute.
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
        """Store the state after layer `index`, which ran on `device`."""
        self.devices[index] = device
        self.after[index] = states.to(state, device="cpu") if self.offloading and state is not None else state

    def advance(self, cache: StateCache) -> None:
        """Write all states to the cache, after every layer has succeeded."""
        for index, layer in cache.state_layers.items():
            layer.advance(
                self.after.get(index, self.before.get(index)), self.rows.columns, self.devices.get(index, layer.device)
            )
        cache.shift = self.shift
        if self.first_columns is not None:
            cache.first_columns = self.first_columns[:, -1]


def check_caches(arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
    """Check that a converted layer received no cache other than a `StateCache`.

    Raises:
        UnsupportedError: the model made a cache of its own in addition.
    """
    for value in (*arguments, *keywords.values()):
        if isinstance(value, Cache) and not isinstance(value, StateCache):
            raise UnsupportedError(
                "this version of transformers made its own key cache beside the states of the converted layers; "
                f"longspan only supports the argument names {', '.join(CACHE_NAMES)}; install transformers<6"
            )


@host.eager
def prepare_call(
    base: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Build the layout of a base model's call and pass it on as a keyword `longspan_call` (a forward pre-hook).

    Args:
        base: a converted model without its heads.
        arguments, keywords: arguments of its forward.

    Returns:
        The arguments and keywords to call it with. A KV cache among them is turned into a `StateCache`.
    """
    forward, modules = type(base).forward, attention_modules(base)
    known = known_keywords(forward)
    if len(arguments) > len(known):
        raise ConfigError(
            f"{type(base).__name__}: takes at most {len(known)} positional arguments, got {len(arguments)}"
        )
    keywords = {**dict(zip(known, arguments, strict=False)), **keywords}
    inputs = keywords.get("input_ids")
    inputs = keywords.get("inputs_embeds") if inputs is None else inputs
    if inputs is None:
        raise ConfigError(f"converted {type(base).__name__}: neither input_ids nor inputs_embeds; pass one of them")
    if (reset := keywords.pop("longspan_reset", None)) is not None:
        keywords["reset"] = reset
    cache = _cache(base, modules, keywords, take_cache(keywords))
    passed = PASSED_ON if modules.family.causal else PASSED_ON - {"shift_labels"}
    if hasattr(base.config, "output_router_logits"):
        # a mixture of experts
        passed = passed | {"output_router_logits"}
    check_keywords(keywords, {*known, *passed, *PACKING, *_OWN_KEYWORDS}, f"converted {type(base).__name__}")
    attentions = keywords.get("output_attentions")
    if getattr(base.config, "output_attentions", False) if attentions is None else attentions:
        raise UnsupportedError(
            "output_attentions: converted layers compute no matrix of attention weights; set it False"
        )
    call, mask = _build_call(base, modules, keywords, inputs, cache)
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
    """Return the name of the cache argument of this base model."""
    return next((name for name in CACHE_NAMES if name in known), CACHE)


def _cache(base: Any, modules: AttentionModules, keywords: dict[str, Any], cache: Any) -> StateCache | None:
    """Return the cache that this call starts from and fills; None = it starts from an empty past and keeps no state."""
    use_cache = keywords.get("use_cache")
    if not modules.family.causal:
        return None
    if use_cache is None:
        # training batches have no past, and a cache would keep their graphs alive
        keeps_state = getattr(base.config, "use_cache", False) and not base.training
    else:
        keeps_state = bool(use_cache)
    cores = modules.cores
    if not all(core.traits.streams for core in cores.values()):
        if cache is not None or use_cache:
            raise UnsupportedError(
                f"{why_no_stream(list(cores.values()))}; pass use_cache=False to the model and to generate"
            )
        return None
    if cache is None and not keeps_state:
        return None
    layers = [index in cores for index in range(len(modules.attentions))]
    carried = own_cache(cache, lambda: StateCache(layers, base.config))
    if not all(is_linear(carried.layers[index]) for index in modules.others):
        raise UnsupportedError(
            f"{base.config.model_type}: transformers {transformers.__version__} has no cache layer for linear "
            "attention; pass use_cache=False, or install transformers>=5.23"
        )
    carried.begin()
    return carried


def _build_call(
    base: Any, modules: AttentionModules, keywords: dict[str, Any], inputs: Tensor, cache: StateCache | None
) -> tuple[Call, Tensor | None]:
    """Build the `Call` of a base model, and set its `position_ids`;
    return it with the mask (batch, length) of real tokens.
    """
    before = {} if cache is None else {index: layer.state for index, layer in cache.state_layers.items()}
    first = next((state for state in before.values() if state is not None), None)
    live = states.live(first, inputs.shape[0], inputs.device).to(inputs.device)
    if live.shape[0] != inputs.shape[0]:
        raise ConfigError(
            f"the call has {inputs.shape[0]} rows, but its {CACHE} has {live.shape[0]}; pass equal numbers"
        )
    past = Past(live, 0 if cache is None else cache.get_seq_length(), None if cache is None else cache.shift)
    packed = documents(inputs, past, keywords, modules.family.first_position(base))
    if packed.reset is not None and modules.others:
        raise UnsupportedError(
            f"{base.config.model_type}: a document starts inside a row, but linear attention of transformers (layer "
            f"{modules.others[0]}) cannot be reset there; give every document a row of its own"
        )
    reads: dict[Hashable, Tensor] = {}
    for index, core in modules.cores.items():
        reads |= core.layout_inputs(before.get(index))
    rows = BatchLayout(live, inputs.shape[1], packed.mask, packed.reset, reads=reads)
    whole = len(modules.cores) == len(modules.attentions)
    if packed.positions is not None:
        keywords["position_ids"] = packed.positions
    elif modules.family.causal and (whole or packed.reset is not None or past.shift is not None):
        # transformers would count padding as positions, and ignore documents
        keywords["position_ids"] = _count_positions(rows, past.shift)
    most = modules.family.max_positions(base)
    if most is not None and rows.batch and rows.columns:
        positions = keywords.get("position_ids")
        largest = rows.largest_position if positions is None else int(positions.max())
        if largest >= most:
            raise UnsupportedError(
                f"position {largest} exceeds the {most} learned positions of this {base.config.model_type}; shorten "
                "the text, or convert a model with RoPE"
            )
    call = Call(rows, before, shift=packed.shift, offloading=cache is not None and cache.offloading)
    if not whole and (packed.reset is not None or (cache is not None and cache.first_columns is not None)):
        call.first_columns = _first_columns(packed, past, cache)
    return call, packed.mask


def _count_positions(rows: BatchLayout, shift: Tensor | None) -> Tensor:
    """Return the position of each token (batch, columns), as position_ids of the original model.

    Args:
        rows: batch layout of the call.
        shift: (batch,) how far the caller's position_ids are ahead of the tokens read; it applies to documents that
            began before the call. None = 0.
    """
    positions = rows.positions.expand(rows.batch, -1)
    if shift is not None:
        ahead = shift[:, None]
        positions = positions + (ahead if rows.origin is None else torch.where(rows.origin < 0, ahead, 0))
    return rows.scatter(positions[..., None])[..., 0]


# -- layers with keys, which were not converted ----------------------------------------------------------------------


def _first_columns(packed: Documents, past: Past, cache: StateCache | None) -> Tensor:
    """Return the column (batch, length), counting earlier calls, at which the document of each token begins."""
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
    """Return the attention_mask to pass to the base model, from which its unconverted layers make their masks."""
    rows = call.rows
    if len(modules.cores) == len(modules.attentions):
        # no layer reads it; without one, or with one for padding, transformers would build a length x length matrix
        return torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=rows.device)
    cache = keywords.get(_cache_keyword(known_keywords(type(base).forward)))
    past = 0 if cache is None else cache.get_seq_length()
    wide = keywords.get("attention_mask")
    wide = mask if wide is None else wide
    if len(modules.cores) == len(modules.convertible):
        # linear attention needs the padding of this call only
        return None if wide is None else F.pad(wide[:, wide.shape[1] - rows.columns :], (past, 0), value=1)
    if wide is not None and wide.shape[1] != past + rows.columns:
        raise ConfigError(
            f"attention_mask has shape {tuple(wide.shape)}; the layers that were not converted keep the keys of "
            f"earlier calls, so pass shape {(rows.batch, past + rows.columns)}, padding marked in all columns"
        )
    if call.first_columns is None:
        return wide
    # documents of one row must not see each other, and transformers derives such masks from positions only without
    # padding and cache
    implementation, causal = base.config._attn_implementation, modules.family.causal
    if implementation not in ("eager", "sdpa", "flex_attention"):
        raise UnsupportedError(
            f"attn_implementation = {implementation!r}: unconverted layers cannot separate packed documents with it; "
            "use 'sdpa'"
        )
    firsts = call.first_columns.expand(-1, rows.columns)

    def same_document(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """Return whether a key is visible: it belongs to the document of the query."""
        return key >= firsts[batch, query - past] if causal else firsts[batch, query] == firsts[batch, key]

    options: dict[str, Any] = {"config": base.config, "attention_mask": wide, "and_mask_function": same_document}
    options["inputs_embeds"] = torch.empty(rows.batch, rows.columns, 0, dtype=base.dtype, device=rows.device)
    if not causal:
        return masking_utils.create_bidirectional_mask(**options)
    options[CACHE] = cache
    return masking_utils.create_masks_for_generate(**options)
