"""States of mechanisms where transformers looks for keys and values."""

import copy
import dataclasses
from collections.abc import Callable, MutableMapping
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from longspan import state as states
from longspan.errors import ConfigError, UnsupportedError

CACHE_NAMES = ("cache", "past_key_values")
"""What versions of transformers call a cache: `cache` from 5.24 on, `past_key_values` before."""


def _cache_name() -> str:
    fields = {field.name for field in dataclasses.fields(CausalLMOutputWithPast)}
    for name in CACHE_NAMES:
        if name in fields:
            return name
    raise UnsupportedError(
        f"transformers {transformers.__version__} calls its cache by a name that this version of longspan does not "
        "know; install transformers<6 as pyproject.toml has it, or a newer longspan"
    )


CACHE = _cache_name()
"""What the installed transformers calls it, in arguments of models and in their outputs."""


def take_cache(arguments: MutableMapping[str, Any]) -> Any:
    """Remove a cache from the arguments of a call, by whichever name it was passed; None where there is none.

    Raises:
        ConfigError: two different ones were passed.
    """
    passed = [arguments.pop(name, None) for name in CACHE_NAMES]
    first, *rest = [cache for cache in passed if cache is not None] or [None]
    if any(cache is not first for cache in rest):
        raise ConfigError(f"{' and '.join(CACHE_NAMES)} are two names of one argument; pass one of them")
    return first


def on_device(state: Any, device: torch.device) -> Any:
    """The state on a device; itself where it is there already, None where there is none."""
    if state is None or states.live(state, 0).device == device:
        return state
    return states.to(state, device=device)


class StateLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """The state of one layer, or of a whole model of longspan, as a layer of a cache.

    Attributes:
        state: None before the first token.
        columns: read so far, padding included: what transformers calls the sequence length.
        device: where the state is worked on, while it is offloaded too; None before the first token.
    """

    is_croppable = False
    is_sliding = False

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.state: Any = None
        self.columns = 0
        self.device: torch.device | None = None

    def advance(self, state: Any, columns: int, device: torch.device | None = None) -> None:
        """Take up the state after `columns` more.

        Args:
            state: of the layer behind them.
            columns: how many.
            device: where it is worked on; default: where it is.
        """
        self.state, self.columns, self.is_initialized = state, self.columns + columns, True
        if state is not None:
            self.device = device or states.live(state, 0).device

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to make: the state comes with the first call."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """No keys are kept here."""
        raise UnsupportedError("this layer was converted and keeps a state, no keys and values of its own")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns a mask covers, and its first."""
        return self.columns + query_length, 0

    def get_seq_length(self) -> int:
        """Columns read."""
        return self.columns

    def get_max_length(self) -> int:
        """No limit."""
        return -1

    def get_max_cache_shape(self) -> int:
        """The same, as older versions of transformers call it."""
        return -1

    def reset(self) -> None:
        """An empty past."""
        self.state, self.columns, self.is_initialized, self.device = None, 0, False, None

    def offload(self) -> None:
        """Move the state to the CPU."""
        self.state = on_device(self.state, torch.device("cpu"))

    def prefetch(self) -> None:
        """Move an offloaded state back to the device it is worked on."""
        if self.device is not None:
            self.state = on_device(self.state, self.device)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Some rows."""
        if self.state is not None:
            self.state = states.select(self.state, indices.to(states.live(self.state, 0).device))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows of the beams that go on."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row so many times."""
        if self.state is not None:
            rows = states.live(self.state, 0).shape[0]
            self.batch_select_indices(torch.arange(rows).repeat_interleave(repeats))

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """A state cannot forget its last tokens."""
        raise UnsupportedError("a state cannot be cropped: assisted decoding and contrastive search need a KV cache")


class StateCache(Cache):
    """What `generate` and the caller carry from call to call: resumable, reordered by beams, never cropped.

    Args:
        layers: one entry a layer of the model; True = a state, False = keys and values as in transformers.
        config: of the model: layers that keep keys and values keep them as its own cache would (sliding windows hold a
            window). None: they keep all.
        offloading: states wait on the CPU while they are not worked on.

    Attributes:
        shift: (batch,) by how much the caller's position of a row's next token is ahead of the state's; None = by
            nothing.
        first_columns: (batch,) column at which the document begins that each row is in, for layers that keep keys;
            None = at the first.
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
        """Before a call: where the last one did not come to its end, go back to before it."""
        self._take_back()
        rest = {name: value for name, value in self.__dict__.items() if name not in ("layers", "_open")}
        # layers replace what they hold and write into nothing, so that no copy is needed
        self._open = rest, [dict(layer.__dict__) for layer in self.layers]

    def end(self) -> None:
        """Behind a call that has come to its end, in one step."""
        self._open = None

    def _take_back(self) -> None:
        if self._open is not None:
            rest, layers = self._open
            self.__dict__.update(rest)
            for layer, fields in zip(self.layers, layers, strict=True):
                layer.__dict__.clear()
                layer.__dict__.update(fields)
            self._open = None

    @property
    def is_compileable(self) -> bool:
        """Shapes grow, or states are replaced."""
        return False

    @property
    def state_layers(self) -> dict[int, StateLayer]:
        """The layers that hold a state, by index."""
        return {index: layer for index, layer in enumerate(self.layers) if isinstance(layer, StateLayer)}

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns read, padding included; those of a call that does not come to its end do not count."""
        layer: Any = self.layers[layer_idx]
        if self._open is not None:
            # keys of the call may be in it already
            layer = copy.copy(layer)
            layer.__dict__.update(self._open[1][layer_idx])
        return int(layer.get_seq_length())

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer that keeps them; offloaded around their use where the cache is."""
        layer: Any = self.layers[layer_idx]
        if self.offloading:
            layer.prefetch()
        keys, values = layer.update(key_states, value_states, *args, **kwargs)
        if self.offloading and not getattr(layer, "is_sliding", False):
            layer.offload()
        return keys, values

    def reset(self) -> None:
        """An empty past."""
        self._take_back()
        super().reset()  # type: ignore[no-untyped-call]
        self.shift, self.first_columns = None, None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows of the beams that go on."""
        self._take_back()
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]
        self._change_rows(lambda rows: rows[beam_idx.to(rows.device)])

    def batch_select_indices(self, indices: Tensor) -> None:
        """Some rows."""
        self._take_back()
        super().batch_select_indices(indices)
        self._change_rows(lambda rows: rows[indices.to(rows.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row so many times."""
        self._take_back()
        super().batch_repeat_interleave(repeats)
        self._change_rows(lambda rows: rows.repeat_interleave(repeats))

    def _change_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        self.shift, self.first_columns = (
            None if rows is None else change(rows) for rows in (self.shift, self.first_columns)
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all states, keys and values."""
        carried = [layer.state for layer in self.state_layers.values() if layer.state is not None]
        pairs: list[Any] = [layer for layer in self.layers if not isinstance(layer, StateLayer)]
        carried += [(layer.keys, layer.values) for layer in pairs if layer.is_initialized]
        return sum(states.nbytes(state) for state in carried)


def own_cache(cache: Any, make: Callable[[], StateCache]) -> StateCache:
    """The cache of a call as a model of longspan reads and fills it.

    An empty cache of transformers becomes one in place, so that whoever made it may go on passing it.

    Args:
        cache: that the caller passed; None = none.
        make: makes an empty one of the model.

    Raises:
        ConfigError: it holds keys and values, or the states of another model.
        UnsupportedError: it quantizes what it holds.
    """
    fresh = make()
    if cache is None:
        return fresh
    if isinstance(cache, StateCache):
        if [type(layer) for layer in cache.layers] != [type(layer) for layer in fresh.layers]:
            raise ConfigError(f"{CACHE}: it was made for another model, whose layers hold other states; start anew")
        return cache
    if not isinstance(cache, Cache):
        raise ConfigError(f"{CACHE}: a {type(cache).__name__} is not a cache; pass what the last call returned")
    if cache.get_seq_length():
        raise ConfigError(
            f"{CACHE}: it holds keys and values, of another model or of this one before it was converted; this model "
            "carries a longspan state, so start with an empty cache"
        )
    if type(cache).__name__.startswith("Quant"):
        raise UnsupportedError("cache_implementation = 'quantized': states have no quantized form; leave it out")
    cache.__class__ = StateCache
    cache.__dict__.update(layers=fresh.layers, layer_class_to_replicate=None, shift=None, first_columns=None)
    assert isinstance(cache, StateCache)
    return cache
