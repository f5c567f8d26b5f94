"""The contract of every mechanism: `y, state = mixer(x, state)`, built from projections and a core."""

import dataclasses
import functools
import math
import sys
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from longspan import host, ops
from longspan import state as states
from longspan.contract.gradients import with_gradients
from longspan.contract.maps import collected, device_and_dtype
from longspan.contract.projections import Projections
from longspan.contract.rows import BatchLayout
from longspan.engine.rotary import halves, rotate_halves
from longspan.errors import ConfigError, UnsupportedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Traits:
    """Capability flags of one built mechanism: what it supports, which laws its tests check, and what it needs.

    Attributes:
        causal: a causal form exists.
        value_causal: only where `causal` is False: a causal form exists in which no later value reaches an earlier
            output, but later tokens may change which earlier ones are visible.
        bidirectional: a bidirectional form exists.
        streams: calls take and return a state; the laws of stream and bounded memory hold. False if built
            bidirectional.
        bounded: the bytes of a state do not depend on the length.
        selects: a discrete choice (bucket, cluster, top-k) depends on data.
        sparse: a visible key may get a weight of exactly zero, depending on data (sparse features, entmax).
        segment: positions per segment; None = the mechanism does not use segments.
        horizon: number of segments that gradients reach, counting the segment of the loss as the first; None = the
            graph is never cut.
        no_stream_reason: why a causal form does not stream; read only where `streams` is False.
        no_conversion_reason: why a pretrained model cannot be converted to it; "" = it can (`convertible`).
        receives_hidden: the core also receives the hidden states that its layer projects (for gates, decays, spans); in
            a converted model these are the normalized inputs of the layer's projections.
        tracks_statistics: a training forward pass adds to statistics that `after_step` applies.
        uses_keys: keys are read; False where queries also serve as keys, so that no key projection is needed.
        linear_in_values: the output is an attention map times the values, so that `attention_map` exists.
        value_dim: width of the values and outputs per head; None = head_dim.
    """

    causal: bool = True
    bidirectional: bool = True
    streams: bool = True
    bounded: bool = False
    selects: bool = False
    sparse: bool = False
    segment: int | None = None
    horizon: int | None = None
    value_causal: bool = False
    no_stream_reason: str = "does not stream"
    no_conversion_reason: str = ""
    receives_hidden: bool = False
    tracks_statistics: bool = False
    uses_keys: bool = True
    linear_in_values: bool = True
    value_dim: int | None = None

    @property
    def convertible(self) -> bool:
        """Whether a pretrained model can be converted to this mechanism."""
        return not self.no_conversion_reason


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes that a core is built for: `dim` of hidden states, query heads, kv heads (dividing them), width per
    head.

    `causal` builds the causal form, else the bidirectional one. `rope` is the base of RoPE, or the angles of one
    position (head_dim // 2 of them), or None for no RoPE.
    """

    dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    causal: bool = True
    rope: float | tuple[float, ...] | None = None

    @property
    def group(self) -> int:
        """Number of query heads that share a kv head."""
        return self.num_heads // self.num_kv_heads


class Hidden(NamedTuple):
    """Hidden states x (B, N, dim) for cores that receive them,
    and the layer's `keys_values(x, kv_heads=None)` as `project`.
    """

    x: Tensor
    project: Callable[..., tuple[Tensor, Tensor]]


class ParameterGroup(NamedTuple):
    """Parameters with optimizer settings of their own; `lr` or `weight_decay` None = the setting of the run."""

    name: str
    parameters: list[nn.Parameter]
    lr: float | None = None
    weight_decay: float | None = None


def optimizer_groups(
    parameters: Iterable[nn.Parameter],
    decaying: Iterable[Any],
    cores: Iterable["Mechanism"],
    *,
    lr: float,
    weight_decay: float,
) -> list[dict[str, Any]]:
    """Return parameter groups for a torch optimizer: `decay`, `plain`, and one for each name that mechanisms declare.

    Args:
        parameters: all parameters to be trained.
        decaying: those that get weight decay, unless they are in a mechanism's own group.
        cores: the mechanisms of all layers.
        lr, weight_decay: settings of the run, used by groups without their own.
    """
    parameters = list(parameters)
    trained, merged = {id(parameter) for parameter in parameters}, dict[str, dict[str, Any]]()
    for group in (group for core in cores for group in core.parameter_groups()):
        settings = {
            "lr": lr if group.lr is None else group.lr,
            "weight_decay": weight_decay if group.weight_decay is None else group.weight_decay,
        }
        known = merged.setdefault(group.name, {"name": group.name, "params": [], **settings})
        known["params"] += [parameter for parameter in group.parameters if id(parameter) in trained]
    special = {id(parameter) for group in merged.values() for parameter in group["params"]}
    decays = {id(weight) for weight in decaying} - special
    decay = [p for p in parameters if id(p) in decays]
    plain = [p for p in parameters if id(p) not in decays | special]
    groups: list[dict[str, Any]] = [
        {"name": "decay", "params": decay, "lr": lr, "weight_decay": weight_decay},
        {"name": "plain", "params": plain, "lr": lr, "weight_decay": 0.0},
        *merged.values(),
    ]
    return [group for group in groups if group["params"]]


class Mechanism(nn.Module):
    """A mechanism without projections: maps q, k, v (before positions) and a state to values and the next state.

    A subclass sets `Config` (a frozen keyword-only dataclass whose every field has a default) and `examples`, and
    writes `traits`, `forward`, `init_state`, `state_nbytes`, `flops` and `pairs`.
    """

    Config: ClassVar[type]
    examples: ClassVar[tuple[dict[str, Any], ...]] = ({},)
    """Small field sets, one for each form of the mechanism; the law tests and the pictures run them."""
    conversion_fields: ClassVar[dict[str, Any]] = {}
    """Default fields for a converted pretrained model, where the user does not set them."""

    def __init__(self, shape: Shape, config: Any) -> None:
        super().__init__()
        self.shape, self.config = shape, config

    @property
    def traits(self) -> Traits:
        """Capability flags of this instance; they never change. A subclass builds them once (a `cached_property`)."""
        raise NotImplementedError

    @property
    def value_dim(self) -> int:
        """Width of the values and outputs per head."""
        return self.traits.value_dim or self.shape.head_dim

    @classmethod
    def about(cls) -> str:
        """Return the equations and their source: the docstring of the class's module or folder, else of the class."""
        folder, _, name = cls.__module__.rpartition(".")
        module = sys.modules[folder if name == "layer" else cls.__module__]
        return (module.__doc__ or cls.__doc__ or "").strip()

    def head_traits(self) -> list[Traits]:
        """Return the traits of each query head, one entry per head; they differ only in a mix of several mechanisms."""
        return [self.traits] * self.shape.num_heads

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        state: Any,
        rows: BatchLayout,
        *,
        hidden: Hidden | None = None,
        aux_losses: list[Tensor] | None = None,
    ) -> tuple[Tensor, Any]:
        """Return the attention outputs of a call and the next state.

        Args:
            q: (B, heads, N, head_dim), contiguous rows as gathered by `rows`.
            k: (B, kv_heads, N, head_dim).
            v: (B, kv_heads, N, value_dim).
            state: the state that the previous call returned; None = empty past.
            rows: lengths, documents and positions of this call.
            hidden: passed where `traits.receives_hidden`.
            aux_losses: a list to which auxiliary losses are appended.

        Returns:
            Outputs (B, heads, N, value_dim), arbitrary after a row's last real token, and the next state.
        """
        raise NotImplementedError

    def run(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        state: Any,
        rows: BatchLayout,
        *,
        hidden: Hidden | None = None,
        aux_losses: list[Tensor] | None = None,
    ) -> tuple[Tensor, Any]:
        """Call `forward` with the state cast to the dtypes of this call, and give every parameter a gradient.

        Layers call this, with the arguments of `forward`. torch.compile must not trace it, as tiles depend on host
        values.
        """
        state = self.fit(state, k, hidden)
        out, state = self(q, k, v, state, rows, hidden=hidden, aux_losses=collected(aux_losses, self))
        if torch.is_grad_enabled():
            out = with_gradients(out, [*self.parameters(), *(() if out.numel() else (q, k, v))])
        return out, state

    def layout_inputs(self, state: Any) -> dict[Hashable, Tensor]:
        """Return small tensors by name (spans, projection versions, counts of a state) that decide a call's layout.

        A model reads those of all layers in one transfer to the host; `forward` gets them by `rows.read(...)`.
        """
        return {}

    def init_state(self, batch_size: int, device: torch.device | None, dtype: torch.dtype) -> Any:
        """Return the state of an empty past."""
        raise NotImplementedError

    def fit(self, state: Any, k: Tensor, hidden: Hidden | None = None) -> Any:
        """Cast a state to the dtype of the keys k of this call, after a call in another precision (autocast)."""
        return states.fit(state, k.dtype)

    def state_nbytes(self, batch_size: int, length: int, dtype: torch.dtype) -> int:
        """Return the exact number of bytes of the state after `length` live tokens (tokens since the last reset)."""
        raise NotImplementedError

    def state_columns(self, length: int) -> int:
        """Return the columns of a state's growing tensors after `length` live tokens: one per token by default."""
        return length

    def flops(self, length: int, batch_size: int = 1) -> int:
        """Return the FLOPs of the core for `batch_size` rows of `length` tokens from an empty past."""
        raise NotImplementedError

    def pairs(self, length: int) -> int:
        """Return the number of attended (query, key) pairs of the definition, summed over query heads."""
        raise NotImplementedError

    def after_step(self, step: int, generator: torch.Generator | None = None) -> None:
        """Update state that is not trained by gradients, after an optimizer step: clamps, redraws, statistics."""

    def why_no_stream(self) -> str:
        """Return the reason why this instance does not stream; only meaningful where it does not."""
        if self.shape.causal:
            return self.traits.no_stream_reason
        return "a bidirectional mixer sees the future and does not stream"

    @property
    def redraw_count(self) -> int:
        """Version of the random projections: how often they were redrawn. States of other versions are invalid."""
        return 0

    def parameter_groups(self) -> list[ParameterGroup]:
        """Return the parameters that need optimizer settings of their own."""
        return []

    def rotate(self, q: Tensor, k: Tensor, rows: BatchLayout) -> tuple[Tensor, Tensor]:
        """Rotate q and k (B, heads, N, head_dim) to their positions by RoPE, if the model has RoPE."""
        base, dtype = self.shape.rope, q.dtype
        if base is None or not rows.length:
            return q, k
        key = ("rotary", base, q.shape[-1], dtype)
        table = rows.cached(key, lambda: halves(*ops.rotary_table(rows.positions, q.shape[-1], base=base, dtype=dtype)))
        return rotate_halves(q, *table), rotate_halves(k, *table)


class Mixer(nn.Module):
    """One mechanism as a layer: a function of a sequence and a state.

    Build one with `longspan.mixers.build`. Calling it:

    Args of a call:
        x: (batch, length, dim).
        state: the state that the previous call returned, or `init_state`; None = empty past (no keys, not zero keys).
        mask: (batch, length) bool, True = real token. Padding changes nothing and gets y = 0.
        reset: (batch, length) bool, True = a new document starts here; on padding it acts on the next real token.
        aux_losses: a list to which auxiliary losses are appended.

    Returns of a call:
        y (batch, length, dim) and the next state (None where the mixer does not stream).

    Raises of a call:
        ConfigError: wrong shapes or dtypes.
        UnsupportedError: a state was passed to a mixer that does not stream.
    """

    def __init__(self, name: str, core: Mechanism, projections: Projections, dropout: float = 0.0) -> None:
        super().__init__()
        self.name, self.core, self.projections = name, core, projections
        self.dropout = nn.Dropout(dropout)

    @property
    def shape(self) -> Shape:
        """The sizes that this mixer was built for."""
        return self.core.shape

    @property
    def causal(self) -> bool:
        """Whether the mixer was built causal (True) or bidirectional."""
        return self.core.shape.causal

    @property
    def traits(self) -> Traits:
        """Capability flags of this mixer."""
        return self.core.traits

    def forward(
        self,
        x: Tensor,
        state: Any = None,
        *,
        mask: Tensor | None = None,
        reset: Tensor | None = None,
        aux_losses: list[Tensor] | None = None,
    ) -> tuple[Tensor, Any]:
        """Map x (batch, length, dim) and a state to y (batch, length, dim) and the next state; see the class."""
        if x.ndim != 3 or x.shape[-1] != self.shape.dim:
            raise ConfigError(f"{self.name}: x has shape {tuple(x.shape)}, expected (batch, length, {self.shape.dim})")
        offset = self._offset(x, state)
        rows = BatchLayout(offset, x.shape[1], mask, reset, reads=self.core.layout_inputs(state))
        with states.all_or_nothing():
            y, state = self.mix(rows.gather(x), state, rows, aux_losses)
            return rows.scatter(y), state

    def _offset(self, x: Tensor, state: Any) -> Tensor:
        """Return the state's live tokens (batch,); raise if it cannot be used with x."""
        if state is not None and not self.traits.streams:
            raise UnsupportedError(f"{self.name}: {self.core.why_no_stream()}; call it with state=None")
        offset = states.live(state, x.shape[0], x.device)
        if offset.shape[0] != x.shape[0]:
            raise ConfigError(f"{self.name}: x has {x.shape[0]} rows, the state {offset.shape[0]}; pass equal numbers")
        return offset

    def _hidden(self, x: Tensor) -> Hidden | None:
        """Return the hidden states x (B, N, dim) for cores that receive them; None for others."""
        return Hidden(x, self.projections.keys_values) if self.traits.receives_hidden else None

    def mix(
        self, x: Tensor, state: Any, rows: BatchLayout, aux_losses: list[Tensor] | None = None
    ) -> tuple[Tensor, Any]:
        """Run the layer on contiguous rows. A model calls this, so that tokens are gathered once for all layers.

        Args:
            x: (B, N, dim), as returned by `rows.gather`.
            state, rows, aux_losses: as in a call; the layout, with the offsets of the state.

        Returns:
            (B, N, dim), arbitrary after a row's last real token, and the next state.
        """
        q, k, v = self.projections(x)
        hidden = self._hidden(x)
        compiling = torch.compiler.is_dynamo_compiling()
        run = functools.partial(host.uncompiled, self.core.run) if compiling else self.core.run
        out, state = run(q, k, v, state, rows, hidden=hidden, aux_losses=aux_losses)
        y: Tensor = self.dropout(self.projections.output(out))
        return y, state if self.traits.streams else None

    def init_state(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Any:
        """Return the state of an empty past, by default on the device and in the dtype of the parameters.

        Raises UnsupportedError if the mixer does not stream.
        """
        if not self.traits.streams:
            raise UnsupportedError(f"{self.name}: {self.core.why_no_stream()}, so it has no state; pass state=None")
        like = device_and_dtype(self)
        return self.core.init_state(batch_size, torch.device(device or like.device), dtype or like.dtype)

    def state_nbytes(self, batch_size: int, length: int, dtype: torch.dtype = torch.float32) -> int:
        """Return the exact bytes of the state, counts included, for `batch_size` rows and activations of `dtype`.

        `length` is the largest number of live tokens (real tokens since the last reset) of any row.
        """
        return self.core.state_nbytes(batch_size, length, dtype) if self.traits.streams else 0

    def state_columns(self, length: int) -> int:
        """Return the columns of a state's growing tensors after `length` live tokens."""
        return self.core.state_columns(length)

    def flops(self, length: int, *, batch_size: int = 1) -> int:
        """Return the FLOPs (2 per multiply-add) of a forward pass from an empty past, projections included."""
        return batch_size * self.projections.flops(length) + self.core.flops(length, batch_size)

    def pairs(self, length: int) -> int:
        """Return the attended (query, key) pairs of the definition, of one row from an empty past, over all heads."""
        return self.core.pairs(length)

    def after_step(self, step: int, generator: torch.Generator | None = None) -> None:
        """Apply clamps, redraws and statistics after optimizer step 1, 2, ...; only `generator` draws numbers."""
        self.core.after_step(step, generator)

    @property
    def redraw_count(self) -> int:
        """Version of the random projections: how often they were redrawn. States of other versions are invalid."""
        return self.core.redraw_count

    @torch.no_grad()
    def attention_map(self, x: Tensor) -> Tensor:
        """Return the weights (batch, heads, length, length) of values in outputs; normalized rows sum to 1 or 0.

        It passes unit vectors through the mechanism as values, so it shows what the fast operation really computes.

        Raises:
            UnsupportedError: the mechanism is not linear in its values.
        """
        if not self.traits.linear_in_values:
            raise UnsupportedError(f"{self.name}: no attention map: its output is not linear in its values")
        rows = BatchLayout(self._offset(x, None), x.shape[1])
        q, k, v = self.projections(x)
        hidden = self._hidden(x)
        length, width = x.shape[1], v.shape[-1]
        maps = []
        for first in range(0, length, width):
            unit = torch.zeros_like(v)
            index = torch.arange(min(width, length - first), device=x.device)
            unit[:, :, first + index, index] = 1
            maps.append(self.core(q, k, unit, None, rows, hidden=hidden)[0][..., : len(index)])
        return torch.cat(maps, -1)

    def extra_repr(self) -> str:
        """Return the text that `repr` shows inside the parentheses."""
        return f"{self.name}, {self.core.config}, {self.shape}"


def sum_nbytes(batch_size: int, dtype: torch.dtype, floats: int, counts: int = 1) -> int:
    """Return the bytes of a state with `floats` numbers of `dtype` and `counts` int64 counts per row."""
    return batch_size * (floats * dtype.itemsize + counts * 8)


def with_aux_losses(loss: Tensor, aux_losses: list[Tensor] | None, calls: int = 1) -> Tensor:
    """Return a loss plus the sum of the auxiliary losses of `calls` forward calls, divided by `calls`."""
    return loss + torch.stack(aux_losses).sum() / calls if aux_losses else loss


def why_no_stream(cores: Sequence[Mechanism]) -> str:
    """Name the first layer of a model that does not stream, with the reason; "" if all layers stream."""
    for index, core in enumerate(cores):
        if not core.traits.streams:
            return f"layer {index} (of 0 to {len(cores) - 1}): {core.why_no_stream()}"
    return ""


def merge_traits(parts: Sequence[Traits]) -> Traits:
    """Combine the traits of mechanisms that run side by side in one layer.

    A capability is True if all of them have it, a need is True if any has it. The horizon is the farthest of all, a
    reason is that of the first mechanism that has one, and `value_dim` is None where they differ.
    """
    segments = [part.segment for part in parts if part.segment is not None]
    segment = math.lcm(*segments) if segments else None
    reaches = [
        -(-part.horizon * part.segment // segment)
        for part in parts
        if part.horizon is not None and part.segment is not None and segment is not None
    ]
    every = ("causal", "bidirectional", "streams", "bounded", "linear_in_values")
    some = ("selects", "sparse", "receives_hidden", "tracks_statistics", "uses_keys")
    merged = {name: all(getattr(part, name) for part in parts) for name in every}
    merged |= {name: any(getattr(part, name) for part in parts) for name in some}
    still = (part.no_stream_reason for part in parts if not part.streams)
    value_dims = {part.value_dim for part in parts}
    return Traits(
        value_causal=not merged["causal"] and all(part.causal or part.value_causal for part in parts),
        segment=segment,
        horizon=max(reaches, default=0) if len(reaches) == len(parts) else None,
        no_stream_reason=next(still, Traits.no_stream_reason),
        no_conversion_reason=next((part.no_conversion_reason for part in parts if not part.convertible), ""),
        value_dim=value_dims.pop() if len(value_dims) == 1 else None,
        **merged,
    )
