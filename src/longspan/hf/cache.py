"""Caches of transformers that hold states of mechanisms instead of keys and values."""

import copy
import dataclasses
from collections.abc import Callable, MutableMapping
from typing import Any, NoReturn

import torch
import transformers
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from longspan import state as states
from longspan.errors import ConfigError, UnsupportedError

CACHE_NAMES = ("cache", "past_key_values")
"""Names of the cache argument in versions of transformers: `cache` from 5.24 on, `past_key_values` before."""


def _cache_name() -> str:
    """Return the name of the cache argument in the installed transformers.

    Raises:
        UnsupportedError: that version uses an unknown name.
    """
    fields = {field.name for field in dataclasses.fields(CausalLMOutputWithPast)}
    for name in CACHE_NAMES:
        if name in fields:
            return name
    raise UnsupportedError(
        f"transformers {transformers.__version__} uses a name for its cache that this version of longspan does not "
        "know; install transformers<6, as pyproject.toml requires, or a newer longspan"
    )


CACHE = _cache_name()
"""Name of the cache in the installed transformers, in arguments of models and in their outputs."""


def take_cache(arguments: MutableMapping[str, Any]) -> Any:
    """Remove the cache from the arguments of a call, under either of its names, and return it; None if there is none.

    Raises:
        ConfigError: two different caches were passed.
    """
    passed = [arguments.pop(name, None) for name in CACHE_NAMES]
    first, *rest = [cache for cache in passed if cache is not None] or [None]
    if any(cache is not first for cache in rest):
        raise ConfigError(f"{' and '.join(CACHE_NAMES)} are two names of the same argument; pass only one of them")
    return first


def on_device(state: Any, device: torch.device) -> Any:
    """Move a state to a device; returns it unchanged if it is there already, and None for None."""
    if state is None or states.live(state, 0).device == device:
        return state
    return states.to(state, device=device)


class StateLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """Cache layer of transformers that holds the state of one layer, or of a whole longspan model.

    transformers 5.23 and newer list it under `_layer_type` among the layers that caches can be made of.

    Attributes:
        state: None before the first token.
        columns: number of columns read so far, padding included: the sequence length of transformers.
        device: where the layer computes, also while its state is offloaded; None before the first token.
    """

    _layer_type = "longspan_state"
    is_croppable = False
    is_sliding = False

    def __init__(self, **unused: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.state: Any = None
        self.columns = 0
        self.device: torch.device | None = None

    def advance(self, state: Any, columns: int, device: torch.device | None = None) -> None:
        """Store the state after a call that read `columns` more columns.

        Args:
            state: the layer's next state.
            columns: columns of the call.
            device: where the layer computes; default: the state's device.
        """
        self.state, self.columns, self.is_initialized = state, self.columns + columns, True
        if state is not None:
            self.device = device or states.live(state, 0).device

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing, as the state comes with the first call (required by transformers)."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Raise, because this layer stores a state instead of keys and values."""
        raise UnsupportedError("this cache layer stores a longspan state, not keys and values; do not call update")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the number of columns that a mask covers, and the first of them."""
        return self.columns + query_length, 0

    def get_seq_length(self) -> int:
        """Return the number of columns read, padding included."""
        return self.columns

    def get_max_length(self) -> int:
        """Return -1: the length is not limited."""
        return -1

    def get_max_cache_shape(self) -> int:
        """Return -1: the length is not limited (older versions of transformers call this)."""
        return -1

    def reset(self) -> None:
        """Drop the state, to start from an empty past."""
        self.state, self.columns, self.is_initialized, self.device = None, 0, False, None

    def offload(self) -> None:
        """Move the state to the CPU."""
        self.state = on_device(self.state, torch.device("cpu"))

    def prefetch(self) -> None:
        """Move an offloaded state back to the device where the layer computes."""
        if self.device is not None:
            self.state = on_device(self.state, self.device)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Select batch rows by index."""
        if self.state is not None:
            self.state = states.select(self.state, indices.to(states.live(self.state, 0).device))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder batch rows for beam search."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every batch row `repeats` times."""
        if self.state is not None:
            rows = states.live(self.state, 0).shape[0]
            self.batch_select_indices(torch.arange(rows).repeat_interleave(repeats))

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """Raise, because a state cannot drop its last tokens."""
        refuse_crop()


def refuse_crop() -> NoReturn:
    """Raise, because a state cannot drop its last tokens."""
    raise UnsupportedError(
        "a longspan state cannot be cropped, and assisted decoding rolls back the tokens that it rejects; leave out "
        "assistant_model and prompt_lookup_num_tokens, and use no contrastive search"
    )


class StateCache(Cache):
    """Cache of a converted model or longspan model: states that `generate` carries, reorders for beams, and never
    crops.

    Args:
        layers: one entry per layer of the model: True = a state, False = keys and values, or the state of linear
            attention, as in transformers.
        config: configuration of the model, so that layers with keys and values store them as in its own cache (a window
            of them for sliding windows). None: they store all.
        offloading: states stay on the CPU while their layer does not compute.

    Attributes:
        shift: (batch,) how far the caller's position of a row's next token is ahead of the state's; None = equal.
        first_columns: (batch,) column at which the current document of each row begins, for layers with keys; None =
            the first column.
    """

    shift: Tensor | None
    first_columns: Tensor | None

    def __init__(self, layers: list[bool], config: Any = None, *, offloading: bool = False) -> None:
        plain: list[Any] = [] if config is None or all(layers) else DynamicCache(config=config).layers
        keys: list[Any] = plain + [DynamicLayer() for _ in layers[len(plain) :]]  # type: ignore[no-untyped-call]
        super().__init__(
            layers=[StateLayer() if has_state else layer for has_state, layer in zip(layers, keys, strict=False)]
        )
        self.offloading = offloading
        self.shift, self.first_columns = None, None

    _open: tuple[dict[str, Any], list[dict[str, Any]]] | None = None

    def begin(self) -> None:
        """Start a call: save the current contents, after restoring those from before an interrupted call."""
        self._restore()
        rest = {name: value for name, value in self.__dict__.items() if name not in ("layers", "_open")}
        self._open = rest, [_contents(layer) for layer in self.layers]

    def end(self) -> None:
        """Finish a successful call in one step, dropping the saved contents."""
        self._open = None

    def _restore(self) -> None:
        """Restore the contents from before a call that did not finish."""
        if self._open is not None:
            rest, layers = self._open
            self.__dict__.update(rest)
            for layer, fields in zip(self.layers, layers, strict=True):
                layer.__dict__.clear()
                layer.__dict__.update(fields)
            self._open = None

    @property
    def is_compileable(self) -> bool:
        """False: shapes grow, or states are replaced."""
        return False

    @property
    def state_layers(self) -> dict[int, StateLayer]:
        """The layers with a state, by layer index."""
        return {index: layer for index, layer in enumerate(self.layers) if isinstance(layer, StateLayer)}

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of columns read, padding included, without those of an unfinished call."""
        if is_linear(self.layers[layer_idx]):
            # linear attention does not count, but all layers read the same columns
            counting = (index for index, layer in enumerate(self.layers) if not is_linear(layer))
            layer_idx = next(counting, layer_idx)
        layer: Any = self.layers[layer_idx]
        if self._open is not None:
            # keys of the call may be in it already
            layer = copy.copy(layer)
            layer.__dict__.update(self._open[1][layer_idx])
        return int(layer.get_seq_length())

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values of a layer that stores them; with offloading they are moved around their use."""
        layer: Any = self.layers[layer_idx]
        if self.offloading:
            layer.prefetch()
        keys, values = layer.update(key_states, value_states, *args, **kwargs)
        if self.offloading and not getattr(layer, "is_sliding", False):
            layer.offload()
        return keys, values

    def reset(self) -> None:
        """Empty the cache, to start from an empty past."""
        self._restore()
        super().reset()  # type: ignore[no-untyped-call]
        self.shift, self.first_columns = None, None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder batch rows for beam search."""
        self._restore()
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]
        self._change_rows(lambda rows: rows[beam_idx.to(rows.device)])

    def batch_select_indices(self, indices: Tensor) -> None:
        """Select batch rows by index."""
        self._restore()
        for layer in self.layers:
            _select_rows(layer, indices)
        self._change_rows(lambda rows: rows[indices.to(rows.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every batch row `repeats` times."""
        self._restore()
        layers: list[Any] = self.layers
        for layer in layers:
            if is_linear(layer):
                count = next((tensor.shape[0] for tensor in _linear_states(layer)), 0)
                _select_rows(layer, torch.arange(count).repeat_interleave(repeats))
            else:
                layer.batch_repeat_interleave(repeats)
        self._change_rows(lambda rows: rows.repeat_interleave(repeats))

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """Raise, because a state cannot drop its last tokens."""
        refuse_crop()

    def _change_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply a selection of batch rows to `shift` and `first_columns`."""
        self.shift, self.first_columns = (
            None if rows is None else change(rows) for rows in (self.shift, self.first_columns)
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all states, keys and values."""
        carried: list[Any] = [layer.state for layer in self.state_layers.values() if layer.state is not None]
        others: list[Any] = [layer for layer in self.layers if not isinstance(layer, StateLayer)]
        for layer in others:
            if is_linear(layer):
                carried.append(tuple(_linear_states(layer)))
            elif layer.is_initialized:
                carried.append((layer.keys, layer.values))
        return sum(states.nbytes(state) for state in carried)


def is_linear(layer: Any) -> bool:
    """Whether a cache layer holds the state of linear attention of transformers, without keys and values."""
    return hasattr(layer, "update_recurrent_state") and not hasattr(layer, "get_seq_length")


def _linear_states(layer: Any) -> list[Tensor]:
    """Return the tensors of a cache layer of linear attention."""
    values = [
        part for field in vars(layer).values() for part in (field.values() if isinstance(field, dict) else [field])
    ]
    return [value for value in values if isinstance(value, Tensor)]


def _select_rows(layer: Any, indices: Tensor) -> None:
    """Select batch rows of a cache layer; for linear attention, reordering is the selection."""
    if not is_linear(layer):
        layer.batch_select_indices(indices)
    elif _linear_states(layer):
        layer.reorder_cache(indices)


def _contents(layer: Any) -> dict[str, Any]:
    """Return the attributes of a cache layer, which restore it later.

    Layers replace their tensors and never write into them, so that no copy is needed, except linear attention, whose
    state has a constant size.
    """
    contents = dict(layer.__dict__)
    return {name: _cloned(value) for name, value in contents.items()} if is_linear(layer) else contents


def _cloned(value: Any) -> Any:
    """Return a value with its tensors cloned, also those in dictionaries; deepcopy refuses tensors with a graph."""
    if isinstance(value, dict):
        return {key: _cloned(inner) for key, inner in value.items()}
    return value.clone() if isinstance(value, Tensor) else value


def own_cache(cache: Any, make: Callable[[], StateCache]) -> StateCache:
    """Return the cache of a call as a `StateCache`.

    An empty cache of transformers is turned into one in place, so that the caller's object is filled.

    Args:
        cache: passed by the caller; None = none.
        make: makes an empty cache of the model.

    Raises:
        ConfigError: it contains keys and values, or the states of another model.
        UnsupportedError: it is a quantized cache.
    """
    fresh = make()
    if cache is None:
        return fresh
    if isinstance(cache, StateCache):
        if [type(layer) for layer in cache.layers] != [type(layer) for layer in fresh.layers]:
            raise ConfigError(
                f"{CACHE}: belongs to another model with other kinds of states; start with an empty cache"
            )
        return cache
    if not isinstance(cache, Cache):
        raise ConfigError(f"{CACHE}: a {type(cache).__name__} is not a cache; pass the one that the last call returned")
    if cache.get_seq_length():
        raise ConfigError(
            f"{CACHE}: contains keys and values of another model, or of this one before it was converted; this model "
            "carries a longspan state, so start with an empty cache"
        )
    if type(cache).__name__.startswith("Quant"):
        raise UnsupportedError("cache_implementation = 'quantized': states cannot be quantized; leave the option out")
    cache.__class__ = StateCache
    cache.__dict__.update(layers=fresh.layers, layer_class_to_replicate=None, shift=None, first_columns=None)
    assert isinstance(cache, StateCache)
    return cache
