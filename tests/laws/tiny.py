"""Two small mixers that obey every law, row by row and document by document: what the mutants are derived from.

`Tiny` is softmax attention with RoPE, within a window (bounded) or without (growing). `TinySegments` is a recurrence
over segments, with a memory in fp32 and a horizon. Both are slow on purpose: every step is a method to be broken.
"""

from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from longspan import reference
from longspan.errors import UnsupportedError

from .tools import DIM, HEADS, Make, documents, perturb


class Traits(NamedTuple):
    causal: bool
    bidirectional: bool
    streams: bool
    bounded: bool
    selects: bool = False
    sparse: bool = False
    segment: int | None = None
    horizon: int | None = None
    value_causal: bool = False
    linear_in_values: bool = True


# A fast op and its definition, as longspan.ops and longspan.reference would hold them.
FAST = SimpleNamespace(window_attention=reference.window_attention)
SLOW = SimpleNamespace(window_attention=reference.window_attention, __all__=["window_attention"])


class Keys(NamedTuple):
    k: Tensor  # (batch, kv_heads, columns, head_dim), rotated, newest last
    v: Tensor
    seen: Tensor  # (batch,) int64, tokens of the document so far


class Rowwise(nn.Module):
    """Every row and every document of it alone; subclasses say what one document does to one row's state."""

    traits: Traits

    def begin(self, x: Tensor) -> None:
        """Before the rows of a call."""

    def document(self, x: Tensor, past: Any) -> tuple[Tensor, Any]:
        """(length, dim) after this past of batch 1."""
        raise NotImplementedError

    def init_state(self, batch_size: int, *, device: str | None = None, dtype: torch.dtype | None = None) -> Any:
        raise NotImplementedError

    def join(self, rows: list[Any]) -> Any:
        return type(rows[0])(*(torch.cat(parts) for parts in zip(*rows, strict=True)))

    def row(self, x: Tensor, real: Tensor, fresh: Tensor, past: Any) -> tuple[Tensor, Any]:
        y = torch.zeros_like(x)
        for number, positions in enumerate(documents(real, fresh)):
            if number:
                past = self.init_state(1)
            if positions:
                out, past = self.document(x[positions], past)
                y = y.index_copy(0, torch.tensor(positions), out.to(y.dtype))
        return y, past

    def forward(
        self,
        x: Tensor,
        state: Any = None,
        *,
        mask: Tensor | None = None,
        reset: Tensor | None = None,
        aux_losses: list[Tensor] | None = None,
    ) -> tuple[Tensor, Any]:
        if state is not None and not self.traits.streams:
            raise UnsupportedError("no state without causality")
        batch, length, _ = x.shape
        state = self.init_state(batch) if state is None else state
        mask = torch.ones(batch, length, dtype=torch.bool) if mask is None else mask
        reset = torch.zeros(batch, length, dtype=torch.bool) if reset is None else reset
        self.begin(x)
        if not batch:
            return torch.zeros_like(x), state if self.traits.streams else None
        outs, states = [], []
        for row in range(batch):
            y, past = self.row(x[row], mask[row], reset[row], type(state)(*(t[row : row + 1] for t in state)))
            outs.append(y)
            states.append(past)
        return torch.stack(outs), self.join(states) if self.traits.streams else None

    def state_nbytes(self, batch_size: int, length: int, dtype: torch.dtype = torch.float32) -> int:
        state = self.init_state(1, dtype=dtype)
        nbytes: int = batch_size * sum(t.numel() * t.element_size() for t in state)
        return nbytes


class Tiny(Rowwise):
    """Softmax attention with grouped queries and RoPE; window None sees everything and its state grows."""

    ops = FAST

    def __init__(
        self,
        window: int | None = 4,
        *,
        causal: bool = True,
        dim: int = DIM,
        kv_heads: int = 2,
        rope: float = 1e4,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.window, self.causal, self.rope, self.kv_heads = window, causal, rope, kv_heads
        self.head_dim = dim // HEADS
        self.traits = Traits(True, True, streams=causal, bounded=window is not None)
        kv = kv_heads * self.head_dim
        self.q, self.k, self.v, self.o = (nn.Linear(dim, n, bias=False) for n in (dim, kv, kv, dim))

    def angles(self, positions: Tensor) -> Tensor:
        frequencies = self.rope ** (-torch.arange(0, self.head_dim, 2, dtype=torch.float64) / self.head_dim)
        angles: Tensor = positions.double()[:, None] * frequencies
        return angles

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        angles = self.angles(positions)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)

    def heads(self, x: Tensor) -> Tensor:
        heads: Tensor = x.unflatten(-1, (-1, self.head_dim)).transpose(0, 1)[None]
        return heads

    def positions(self, length: int, past: Keys) -> Tensor:
        return past.seen + torch.arange(length)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = self.ops.window_attention(q, k, v, window=self.window or 10**9, causal=self.causal)
        return out

    def filled(self, past: Keys) -> Keys:
        """The columns of one row that hold tokens."""
        first = past.k.shape[2] - min(int(past.seen), past.k.shape[2])
        return Keys(past.k[:, :, first:], past.v[:, :, first:], past.seen)

    def taken_up(self, past: Keys, dtype: torch.dtype) -> Keys:
        """A past of another precision."""
        return Keys(past.k.to(dtype), past.v.to(dtype), past.seen)

    def document(self, x: Tensor, past: Keys) -> tuple[Tensor, Keys]:
        positions, old = self.positions(len(x), past), self.filled(past)
        q, k = (self.rotate(self.heads(part(x)), positions) for part in (self.q, self.k))
        old = self.taken_up(old, k.dtype)
        k, v = torch.cat([old.k, k], 2), torch.cat([old.v, self.heads(self.v(x))], 2)
        out = self.attend(q, k, v)
        return self.o(out[0].transpose(0, 1).flatten(1)), self.keep(k, v, past.seen + len(x))

    def keep(self, k: Tensor, v: Tensor, count: Tensor) -> Keys:
        if self.window is not None:
            surplus = k.shape[2] - (self.window - 1)
            k, v = (nn.functional.pad(t, (0, 0, max(0, -surplus), 0))[:, :, max(0, surplus) :] for t in (k, v))
            k, v = (t.clone() for t in (k, v))
        return Keys(k, v, count)

    def join(self, rows: list[Keys]) -> Keys:
        if self.window is None:
            most = max(int(row.seen) for row in rows)
            rows = [self.widened(row, most) for row in rows]
        return Keys(*super().join(rows))

    def widened(self, row: Keys, columns: int) -> Keys:
        row = self.filled(row)
        k, v = (nn.functional.pad(t, (0, 0, columns - t.shape[2], 0)) for t in row[:2])
        return Keys(k, v, row.seen)

    def init_state(self, batch_size: int, *, device: str | None = None, dtype: torch.dtype | None = None) -> Keys:
        columns = 0 if self.window is None else self.window - 1
        dtype = dtype or self.q.weight.dtype
        empty = torch.zeros(batch_size, self.kv_heads, columns, self.head_dim, dtype=dtype, device=device)
        return Keys(empty, empty.clone(), torch.zeros(batch_size, dtype=torch.int64))

    def state_nbytes(self, batch_size: int, length: int, dtype: torch.dtype = torch.float32) -> int:
        grown = 0 if self.window is not None else length * 2 * self.kv_heads * self.head_dim * dtype.itemsize
        return super().state_nbytes(batch_size, length, dtype) + batch_size * grown

    def flops(self, length: int, *, batch_size: int = 1) -> int:
        linear = sum(part.weight.numel() for part in (self.q, self.k, self.v, self.o))
        return 2 * batch_size * length * (linear + 2 * length * HEADS * self.head_dim)

    def pairs(self, length: int) -> int:
        window = self.window or length
        one_side = sum(min(i + 1, window) for i in range(length))
        return HEADS * (one_side if self.causal else 2 * one_side - length)

    def attention_map(self, x: Tensor) -> Tensor:
        maps = []
        for row in x:
            positions = torch.arange(len(row))
            q, k = (self.rotate(self.heads(part(row)), positions) for part in (self.q, self.k))
            one = torch.eye(len(row), dtype=x.dtype).expand(1, self.kv_heads, -1, -1)
            maps.append(self.attend(q, k, one))
        return torch.cat(maps)


class Memory(NamedTuple):
    memory: Tensor  # (batch, dim) fp32 at least: decayed sum of the means of closed segments
    total: Tensor  # (batch, dim): sum of the open segment
    seen: Tensor  # (batch,)

    def accumulators(self) -> tuple[str, ...]:
        return "memory", "total"


class TinySegments(Rowwise):
    """y_i = W_o(tanh(W_q x_i) * (memory + mean of the open segment up to i)); memory is written as a segment closes."""

    segment = 4

    def __init__(self, horizon: int | None = None, *, dim: int = DIM) -> None:
        super().__init__()
        self.traits = Traits(True, False, True, True, segment=self.segment, horizon=horizon, linear_in_values=False)
        self.q, self.v, self.o = (nn.Linear(dim, dim, bias=False) for _ in range(3))

    def accumulator(self, dtype: torch.dtype) -> torch.dtype:
        return torch.promote_types(dtype, torch.float32)

    def cut(self, memory: Tensor, border: int, last: int) -> Tensor:
        """Memory is detached k, 2k, ... segments before the end of the call, whose segment is `last`."""
        horizon = self.traits.horizon
        return memory.detach() if horizon and (last - border + 1) % horizon == 0 else memory

    def combine(self, memory: Tensor, mean: Tensor) -> Tensor:
        return 0.9 * memory + mean

    def opened(self, count: int, past: int) -> bool:
        """Whether the token at this position is the first of a segment."""
        return count % self.segment == 0

    def document(self, x: Tensor, past: Memory) -> tuple[Tensor, Memory]:
        kind = self.accumulator(x.dtype)
        memory, total, first = past.memory.to(kind), past.total.to(kind), int(past.seen)
        last = (first + len(x) - 1) // self.segment
        values, outs = self.v(x).to(memory.dtype), []
        for index in range(len(x)):
            position = first + index
            if self.opened(position, first):
                memory = self.cut(memory, position // self.segment, last)
                size = 0
            else:
                size = position % self.segment if index == 0 else size
            total, size = total + values[index], size + 1
            outs.append(memory + total / size)
            if self.opened(position + 1, first):
                memory, total = self.combine(memory, total / size), torch.zeros_like(total)
        seen = torch.cat(outs).to(x.dtype)
        return self.o(torch.tanh(self.q(x)) * seen), Memory(memory, total, past.seen + len(x))

    def init_state(self, batch_size: int, *, device: str | None = None, dtype: torch.dtype | None = None) -> Memory:
        dtype = self.accumulator(dtype or self.q.weight.dtype)
        zeros = torch.zeros(batch_size, self.q.in_features, dtype=dtype, device=device)
        return Memory(zeros, zeros.clone(), torch.zeros(batch_size, dtype=torch.int64))

    def flops(self, length: int, *, batch_size: int = 1) -> int:
        return 2 * batch_size * length * 3 * self.q.weight.numel()

    def pairs(self, length: int) -> int:
        return length * (length + 1) // 2

    def attention_map(self, x: Tensor) -> Tensor:
        raise UnsupportedError("the map is not kept")


def maker(cls: type[Any], **fields: Any) -> Make:
    """A `Make` of a small mixer: parameters are the same on every call."""

    def make(*, causal: bool | None = None, dtype: torch.dtype = torch.float64, **keywords: Any) -> Any:
        torch.manual_seed(0)
        if issubclass(cls, TinySegments):
            if causal is False:
                raise UnsupportedError("causal only")
            mixer = cls(**fields, dim=keywords.get("dim", DIM))
        else:
            mixer = cls(**fields, causal=causal is not False, **keywords)
        return perturb(mixer).to(dtype).eval()

    return make
