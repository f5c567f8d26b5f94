"""States of mechanisms where transformers looks for keys and values."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from longspan import state as states
from longspan.errors import UnsupportedError


class StateLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """The state of one layer, or of a whole model of longspan, as a layer of a cache.

    Attributes:
        state: None before the first token.
        columns: read so far, padding included: what transformers calls the sequence length.
    """

    is_croppable = False

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.state: Any = None
        self.columns = 0

    def advance(self, state: Any, columns: int) -> None:
        """Take up the state after `columns` more."""
        self.state, self.columns, self.is_initialized = state, self.columns + columns, True

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
        self.state, self.columns, self.is_initialized = None, 0, False

    def offload(self) -> None:
        """To the CPU."""
        if self.state is not None:
            self.state = states.to(self.state, device="cpu")

    def prefetch(self) -> None:
        """States move with the model's call."""

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows of the beams that go on."""
        self._select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Some rows."""
        self._select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row so many times."""
        if self.state is not None:
            rows = states.live(self.state, 0).shape[0]
            self._select(torch.arange(rows).repeat_interleave(repeats))

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """A state cannot forget its last tokens."""
        raise UnsupportedError("a state cannot be cropped: assisted decoding and contrastive search need a KV cache")

    def _select(self, index: Tensor) -> None:
        if self.state is not None:
            self.state = states.select(self.state, index.to(states.live(self.state, 0).device))


class StateCache(Cache):
    """What `generate` and the caller carry from call to call: resumable, reordered by beams, never cropped.

    Args:
        layers: one entry a layer of the model; True = a state, False = keys and values as in transformers.
    """

    def __init__(self, layers: list[bool]) -> None:
        keys: Any = DynamicLayer
        super().__init__(layers=[StateLayer() if each else keys() for each in layers])

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

    def reset(self) -> None:
        """An empty past."""
        self._take_back()
        super().reset()  # type: ignore[no-untyped-call]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows of the beams that go on."""
        self._take_back()
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row so many times."""
        self._take_back()
        super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Some rows."""
        self._take_back()
        super().batch_select_indices(indices)

    @property
    def is_compileable(self) -> bool:
        """Shapes grow, or states are replaced."""
        return False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns read, padding included."""
        layer: Any = self.layers[layer_idx]
        return int(layer.get_seq_length())

    @property
    def nbytes(self) -> int:
        """Bytes of all states, keys and values."""
        total = 0
        layers: list[Any] = list(self.layers)
        for layer in layers:
            if isinstance(layer, StateLayer):
                total += 0 if layer.state is None else states.nbytes(layer.state)
            elif layer.is_initialized:
                total += layer.keys.numel() * layer.keys.element_size() * 2
        return total
