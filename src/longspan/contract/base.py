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
from longspan.contract.maps import collected, place_of
from longspan.contract.projections import Projections
from longspan.contract.rows import BatchLayout
from longspan.errors import ConfigError, UnsupportedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Traits:
    """The facts about one built instance: what it promises, and so which laws it is held to, and what it needs.

    Attributes:
        causal: the causal form exists.
        value_causal: where `causal` is not: a causal form exists in which no later value reaches an earlier output, but
            later tokens may change which earlier ones are seen.
        bidirectional: the form that sees both sides exists.
        streams: states go in and out and the laws of stream and bounded memory hold (never where built bidirectional).
        bounded: the bytes of a state do not depend on the length.
        selects: a discrete choice (bucket, cluster, top-k) depends on data.
        sparse: the weight of a key that is seen may be exactly zero, as the data have it (sparse features, entmax).
        segment: positions per segment; None = the mechanism knows no segments.
        horizon: segments reached by gradients, the loss's own counted as the first; None = the graph is never cut.
        no_stream_reason: why a causal form does not stream; read only where `streams` is False.
        no_conversion_reason: why a pretrained model cannot be converted to it; "" = it can (`convertible`).
        receives_hidden: the core is given the hidden states that its layer projects (for gates, decays, spans); in a
            converted model these are what the layer's own projections read, normalized as the model does it.
        tracks_statistics: a training forward adds to statistics that `after_step` applies.
        uses_keys: keys are read; a mechanism whose keys are its queries needs no projection to keys.
        linear_in_values: the output is an attention map times the values, so that `attention_map` exists.
        value_dim: width of the values and outputs of a head; None = head_dim.
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
        """A pretrained model can be converted to it."""
        return not self.no_conversion_reason


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes a core is built for: `num_kv_heads` divides `num_heads`; `rope` is the base of RoPE, or the angles of
    one position (head_dim // 2 of them), or None.
    """

    dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    causal: bool = True
    rope: float | tuple[float, ...] | None = None

    @property
    def group(self) -> int:
        """Query heads that share a kv head."""
        return self.num_heads // self.num_kv_heads


class Hidden(NamedTuple):
    """For cores that receive hidden states: x (B, N, dim), and the layer's `keys_values(x, kv_heads=None)`."""

    x: Tensor
    project: Callable[..., tuple[Tensor, Tensor]]


class ParameterGroup(NamedTuple):
    """Parameters that want an optimiser setting of their own; None = the setting of the run."""

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
    """Groups for a torch optimiser: `decay`, `plain`, and those that mechanisms declare, one for each name.

    Args:
        parameters: what is trained.
        decaying: weights that decay, those of mechanisms' own groups aside.
        cores: the mechanisms of all layers.
        lr, weight_decay: of the run, where a group has none of its own.
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
    """A mechanism itself: q, k, v before positions in, the attended values and the next state out.

    A subclass sets `Config` (a frozen keyword-only dataclass whose every field has a default) and `examples`, and
    writes `traits`, `forward`, `init_state`, `state_nbytes`, `flops` and `pairs`.
    """

    Config: ClassVar[type]
    examples: ClassVar[tuple[dict[str, Any], ...]] = ({},)
    """Small field sets that show every form of the mechanism: what the law matrix and the pictures run."""
    conversion_fields: ClassVar[dict[str, Any]] = {}
    """Fields with which a converted pretrained model begins, where they are not given."""

    def __init__(self, shape: Shape, config: Any) -> None:
        super().__init__()
        self.shape, self.config = shape, config

    @property
    def traits(self) -> Traits:
        """The facts about this instance, which never change; a subclass makes them once (a `cached_property`)."""
        raise NotImplementedError

    @property
    def value_dim(self) -> int:
        """Width of the values and outputs of a head."""
        return self.traits.value_dim or self.shape.head_dim

    @classmethod
    def about(cls) -> str:
        """Its equations and where they come from: the docstring of its module (of the folder, where that is `layer`),
        its own where that has none.
        """
        folder, _, name = cls.__module__.rpartition(".")
        module = sys.modules[folder if name == "layer" else cls.__module__]
        return (module.__doc__ or cls.__doc__ or "").strip()

    def head_traits(self) -> list[Traits]:
        """What each query head promises, one entry a head: they differ only where mechanisms stand side by side."""
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
        """Attend.

        Args:
            q: (B, heads, N, head_dim), contiguous rows as `rows` gathered them.
            k: (B, kv_heads, N, head_dim).
            v: (B, kv_heads, N, value_dim).
            state: what the last call returned; None = empty past.
            rows: lengths, documents and positions of this call.
            hidden: given where `traits.receives_hidden`.
            aux_losses: a list to which auxiliary losses are appended.

        Returns:
            (B, heads, N, value_dim), arbitrary behind a row's real tokens, and the next state.
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
        """What layers call: `forward` with the state in the types of this call, and a gradient for every parameter.

        torch.compile is to leave it alone, as tiles depend on values that the host has read.
        """
        state = self.fit(state, k, hidden)
        out, state = self(q, k, v, state, rows, hidden=hidden, aux_losses=collected(aux_losses, self))
        if torch.is_grad_enabled():
            out = with_gradients(out, [*self.parameters(), *(() if out.numel() else (q, k, v))])
        return out, state

    def layout_inputs(self, state: Any) -> dict[Hashable, Tensor]:
        """Small tensors (spans, draws, counts of a state) whose values the host needs to lay a call out, by names.

        A model reads those of all its layers in one transfer; `forward` gets them by `rows.read(layout_inputs(state))`.
        """
        return {}

    def init_state(self, batch_size: int, device: torch.device | None, dtype: torch.dtype) -> Any:
        """The state of an empty past."""
        raise NotImplementedError

    def fit(self, state: Any, k: Tensor, hidden: Hidden | None = None) -> Any:
        """The state in the types of this call, whatever precision the last one ran in (autocast, a lowered model);
        arguments as of `forward`.
        """
        return states.fit(state, k.dtype)

    def state_nbytes(self, batch_size: int, length: int, dtype: torch.dtype) -> int:
        """Exact bytes of the state after `length` live tokens."""
        raise NotImplementedError

    def state_columns(self, length: int) -> int:
        """Columns of a state's growing tensors after `length` live tokens: one a token, unless most are evicted."""
        return length

    def flops(self, length: int, batch_size: int = 1) -> int:
        """FLOPs of the core for `batch_size` rows of `length` tokens from an empty past."""
        raise NotImplementedError

    def pairs(self, length: int) -> int:
        """Attended (query, key) pairs of the definition, summed over query heads."""
        raise NotImplementedError

    def after_step(self, step: int, generator: torch.Generator | None = None) -> None:
        """Called after each optimiser step: clamps, redraws, statistics. Nothing by default."""

    def why_no_stream(self) -> str:
        """Why this instance does not stream, where it does not."""
        if self.shape.causal:
            return self.traits.no_stream_reason
        return "a bidirectional mixer sees the future and does not stream"

    @property
    def redraw_count(self) -> int:
        """How often random projections were redrawn; a state of another draw is void."""
        return 0

    def parameter_groups(self) -> list[ParameterGroup]:
        """Parameters with optimiser settings of their own."""
        return []

    def rotate(self, q: Tensor, k: Tensor, rows: BatchLayout) -> tuple[Tensor, Tensor]:
        """q and k turned by RoPE to their positions, or as they are where the model has no RoPE."""
        base, dtype = self.shape.rope, q.dtype
        if base is None or not rows.length:
            return q, k
        key = ("rotary", base, q.shape[-1], dtype)
        table = rows.cached(key, lambda: ops.rotary_table(rows.positions, q.shape[-1], base=base, dtype=dtype))
        return ops.rotate(q, *table), ops.rotate(k, *table)


class Mixer(nn.Module):
    """One mechanism as a layer: a function of a sequence and a state.

    Made by `longspan.mixers.build`. Calling it:

    Args of a call:
        x: (batch, length, dim).
        state: what the last call returned, or `init_state`; None = empty past (no keys, not zero keys).
        mask: (batch, length) bool, True = real token. Padding changes nothing and gets y = 0.
        reset: (batch, length) bool, True = a new document starts here; on padding it acts on the next real token.
        aux_losses: a list to which auxiliary losses are appended.

    Returns of a call:
        y (batch, length, dim) and the next state (None where the mixer does not stream).

    Raises of a call:
        ConfigError: shapes or types that do not fit.
        UnsupportedError: a state given to a mixer that does not stream.
    """

    def __init__(self, name: str, core: Mechanism, projections: Projections, dropout: float = 0.0) -> None:
        super().__init__()
        self.name, self.core, self.projections = name, core, projections
        self.dropout = nn.Dropout(dropout)

    @property
    def shape(self) -> Shape:
        """The sizes this mixer was built for."""
        return self.core.shape

    @property
    def causal(self) -> bool:
        """Built causal (True) or bidirectional."""
        return self.core.shape.causal

    @property
    def traits(self) -> Traits:
        """The facts about this instance."""
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
        """See the class."""
        if x.ndim != 3 or x.shape[-1] != self.shape.dim:
            raise ConfigError(f"{self.name}: x is {tuple(x.shape)}, expected (batch, length, {self.shape.dim})")
        offset = self._offset(x, state)
        rows = BatchLayout(offset, x.shape[1], mask, reset, reads=self.core.layout_inputs(state))
        with states.all_or_nothing():
            y, state = self.mix(rows.gather(x), state, rows, aux_losses)
            return rows.scatter(y), state

    def _offset(self, x: Tensor, state: Any) -> Tensor:
        if state is not None and not self.traits.streams:
            raise UnsupportedError(f"{self.name}: {self.core.why_no_stream()}; call it with state=None")
        offset = states.live(state, x.shape[0], x.device)
        if offset.shape[0] != x.shape[0]:
            raise ConfigError(f"{self.name}: x has {x.shape[0]} rows, the state {offset.shape[0]}")
        return offset

    def _hidden(self, x: Tensor) -> Hidden | None:
        return Hidden(x, self.projections.keys_values) if self.traits.receives_hidden else None

    def mix(
        self, x: Tensor, state: Any, rows: BatchLayout, aux_losses: list[Tensor] | None = None
    ) -> tuple[Tensor, Any]:
        """The layer on contiguous rows: what a model calls, so that gathering is done once for all layers.

        Args:
            x: (B, N, dim), as `rows.gather` gives it.
            state, penalties: as in a call.
            rows: the layout of the call; its offsets are the state's.

        Returns:
            (B, N, dim), arbitrary behind a row's real tokens, and the next state.
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
        """The state of an empty past; device and dtype default to those of the parameters.

        Raises:
            UnsupportedError: the mixer does not stream.
        """
        if not self.traits.streams:
            raise UnsupportedError(f"{self.name}: {self.core.why_no_stream()}, so it has no state")
        like = place_of(self)
        return self.core.init_state(batch_size, torch.device(device or like.device), dtype or like.dtype)

    def state_nbytes(self, batch_size: int, length: int, dtype: torch.dtype = torch.float32) -> int:
        """Exact bytes of the state, counts included.

        Args:
            batch_size: rows.
            length: the largest number of live tokens (real, since the last reset) of any row.
            dtype: of the activations.
        """
        return self.core.state_nbytes(batch_size, length, dtype) if self.traits.streams else 0

    def state_columns(self, length: int) -> int:
        """Columns of a state's growing tensors after `length` live tokens; see `Mechanism.state_columns`."""
        return self.core.state_columns(length)

    def flops(self, length: int, *, batch_size: int = 1) -> int:
        """FLOPs (2 per multiply-add) of one forward of `length` tokens from an empty past, projections included."""
        return batch_size * self.projections.flops(length) + self.core.flops(length, batch_size)

    def pairs(self, length: int) -> int:
        """Attended (query, key) pairs of the definition for one row from an empty past, summed over query heads."""
        return self.core.pairs(length)

    def after_step(self, step: int, generator: torch.Generator | None = None) -> None:
        """Called after each optimiser step (1, 2, ...): clamps, redraws, statistics; `generator` draws, none else."""
        self.core.after_step(step, generator)

    @property
    def redraw_count(self) -> int:
        """How often random projections were redrawn; a state of another draw is void."""
        return self.core.redraw_count

    @torch.no_grad()
    def attention_map(self, x: Tensor) -> Tensor:
        """The weights (batch, heads, length, length) by which values reach outputs; rows sum to 1 or 0.

        Found by sending unit vectors through the mechanism as values, so it is what the fast operation really does.

        Raises:
            UnsupportedError: the mechanism is not linear in its values.
        """
        if not self.traits.linear_in_values:
            raise UnsupportedError(f"{self.name}: its output is not a map times the values")
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
        """What `repr` shows."""
        return f"{self.name}, {self.core.config}, {self.shape}"


def sum_nbytes(batch_size: int, dtype: torch.dtype, floats: int, counts: int = 1) -> int:
    """Bytes of a state of `floats` numbers of `dtype` and `counts` int64 counts a row."""
    return batch_size * (floats * dtype.itemsize + counts * 8)


def with_aux_losses(loss: Tensor, aux_losses: list[Tensor] | None, calls: int = 1) -> Tensor:
    """A loss and the auxiliary ones that `calls` calls have appended: their sum, over so many."""
    return loss + torch.stack(aux_losses).sum() / calls if aux_losses else loss


def why_no_stream(cores: Sequence[Mechanism]) -> str:
    """Which layer of a model is the first that does not stream, and why; "" where all of them do."""
    for index, core in enumerate(cores):
        if not core.traits.streams:
            return f"layer {index} (of 0 to {len(cores) - 1}): {core.why_no_stream()}"
    return ""


def merge_traits(parts: Sequence[Traits]) -> Traits:
    """The traits of several mechanisms side by side: what all of them promise and any of them needs; the horizon is the
    farthest reach of any, a reason that of the first which has one, `value_dim` None where they differ.
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
