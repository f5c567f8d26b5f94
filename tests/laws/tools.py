"""What the checks share: inputs, drawn cases, streams, the row-by-row oracle and comparisons.

Nothing here knows a mixer by name. A `Make` builds the mixer-like object under test: the same parameters on every
call, whatever the dtype.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.overrides import TorchFunctionMode

import longspan as ls
from longspan.errors import UnsupportedError

DIM, HEADS = 16, 4
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}

# make(causal=None, dtype=float64, dim=DIM, kv_heads=2, rope=10000.0, dropout=0.0) -> the mixer in eval mode; causal
# None: the causal form where it exists. Any, as the type of torch modules has none of what the contract adds
Make = Callable[..., Any]


@dataclass(frozen=True)
class Registered:
    """A `Make` of a registered mixer: the same parameters on every call, moved off their initial values."""

    name: str
    fields: dict[str, Any]

    def __call__(
        self,
        *,
        causal: bool | None = None,
        dtype: torch.dtype = torch.float64,
        dim: int = DIM,
        kv_heads: int = 2,
        rope: float | None = 10000.0,
        dropout: float = 0.0,
    ) -> Any:
        torch.manual_seed(0)
        mixer = ls.mixers.build(
            self.name,
            dim=dim,
            num_heads=HEADS,
            num_kv_heads=kv_heads,
            causal=causal is not False,
            rope=rope,
            dropout=dropout,
            **self.fields,
        )
        return perturb(mixer).to(dtype).eval()


def forms(make: Make) -> list[dict[str, Any]]:
    """Keywords of `make` for every form that exists."""
    return [{}, {"causal": False}] if make().traits.bidirectional else [{}]


def inputs(
    seed: int, batch: int, length: int, *, dim: int = DIM, dtype: torch.dtype = torch.float64, scale: float = 1.0
) -> Tensor:
    """Normal numbers of a generator of their own; drawn in fp32, so every dtype sees the same ones."""
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(batch, length, dim, generator=generator)).to(dtype)


def perturb(mixer: Any, noise: float = 0.1) -> Any:
    """Move every parameter a little, so that nothing is trivially zero, one or equal."""
    generator = torch.Generator().manual_seed(17)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(noise * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return mixer


def trains(mixer: Any) -> bool:
    """Some forms are for inference only, and raise UnsupportedError where a gradient is needed."""
    try:
        mixer(inputs(0, 1, 2, dtype=next(mixer.parameters()).dtype))
    except UnsupportedError:
        return False
    return True


class Interrupting(TorchFunctionMode):
    """Raises KeyboardInterrupt in place of one torch call, by its number from 1 (0: none), and counts them all."""

    def __init__(self, at: int = 0) -> None:
        super().__init__()
        self.at, self.count = at, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # settings that contexts of torch put back on their way out are not calls of the mixer
        if not any(setting in getattr(func, "__name__", "") for setting in ("grad_enabled", "autocast")):
            self.count += 1
            if self.count == self.at:
                raise KeyboardInterrupt
        return func(*args, **(kwargs or {}))


# states ------------------------------------------------------------------------------------------------------


def leaves(state: Any, prefix: str = "") -> dict[str, Tensor]:
    """The tensors of a state by name, whatever the nesting; written here so that it is independent of the library."""
    if isinstance(state, Tensor):
        return {prefix: state}
    if state is None and not prefix:
        return {}  # a mixer that does not stream
    assert isinstance(state, tuple), f"a state is a NamedTuple of tensors, found {type(state).__name__} at {prefix!r}"
    names = getattr(state, "_fields", [str(i) for i in range(len(state))])
    tensors: dict[str, Tensor] = {}
    for name, part in zip(names, state, strict=True):
        tensors |= leaves(part, f"{prefix}.{name}" if prefix else name)
    return tensors


def map_state(state: Any, function: Callable[[str, Tensor], Tensor], prefix: str = "") -> Any:
    """The same structure with every tensor replaced by function(name, tensor)."""
    if isinstance(state, Tensor):
        return function(prefix, state)
    names = getattr(state, "_fields", [str(i) for i in range(len(state))])
    parts = [
        map_state(part, function, f"{prefix}.{name}" if prefix else name)
        for name, part in zip(names, state, strict=True)
    ]
    return type(state)(*parts) if hasattr(state, "_fields") else tuple(parts)


def copy_state(state: Any) -> Any:
    return map_state(state, lambda _, t: t.detach().clone())


def state_row(state: Any, row: int) -> Any:
    return None if state is None else ls.state.select(state, torch.tensor([row]))


def state_bytes(state: Any) -> int:
    return sum(t.numel() * t.element_size() for t in leaves(state).values())


def growing_leaves(mixer: Any, dim: int = DIM) -> list[str]:
    """Names of the tensors that have no column in an empty state and get some as segments (or tokens) come."""
    with torch.no_grad():
        empty = leaves(mixer.init_state(1))
        parameter = next(mixer.parameters())
        length = max(3, mixer.traits.segment or 0)
        later = leaves(mixer(inputs(3, 1, length, dim=dim, dtype=parameter.dtype))[1])
    return [name for name, t in later.items() if t.shape != empty[name].shape]


def columns_of(mixer: Any, length: int) -> int:
    """Columns that growing tensors hold after so many live tokens: one a token, unless the mixer evicts some."""
    counted = getattr(mixer, "state_columns", None)
    return length if counted is None else counted(length)


# comparisons -------------------------------------------------------------------------------------------------


def close(a: Tensor, b: Tensor, tolerance: float, what: str) -> None:
    """Law 2's measure: max|a - b| <= tolerance * max(1, max|b|), and nothing infinite."""
    assert a.shape == b.shape, f"{what}: shape {tuple(a.shape)}, expected {tuple(b.shape)}"
    if b.numel() == 0:
        return
    if not a.is_floating_point():
        assert torch.equal(a, b), f"{what}: {a.tolist()}, expected {b.tolist()}"
        return
    assert torch.isfinite(a).all(), f"{what}: not finite"
    a, b = a.detach().double(), b.detach().double()
    difference, limit = (a - b).abs().max().item(), tolerance * max(1.0, b.abs().max().item())
    assert difference <= limit, f"{what}: differs by {difference:.3g}, allowed {limit:.3g}"


def same(a: Tensor, b: Tensor, what: str) -> None:
    """Bit for bit (signed zeros aside)."""
    assert a.shape == b.shape, f"{what}: shape {tuple(a.shape)}, expected {tuple(b.shape)}"
    assert a.dtype == b.dtype, f"{what}: {a.dtype}, expected {b.dtype}"
    wrong = (a != b).nonzero()
    assert len(wrong) == 0, f"{what}: {len(wrong)} numbers differ, the first at {wrong[0].tolist()}"


def states_close(a: Any, b: Any, tolerance: float, what: str, *, newest: bool = False) -> None:
    """Every tensor of two states, counts exactly. `newest`: of more columns in a than in b, the newest."""
    mine, reference = leaves(a), leaves(b)
    assert list(mine) == list(reference), f"{what}: fields {list(mine)}, expected {list(reference)}"
    for name, t in mine.items():
        u = reference[name]
        if newest and t.dim() > 2 and t.shape[-2] > u.shape[-2]:
            t = t[..., t.shape[-2] - u.shape[-2] :, :]
        assert t.dtype == u.dtype, f"{what}, {name}: {t.dtype}, expected {u.dtype}"
        close(t, u, tolerance, f"{what}, {name}")


def states_same(a: Any, b: Any, what: str) -> None:
    mine, reference = leaves(a), leaves(b)
    assert list(mine) == list(reference), f"{what}: fields {list(mine)}, expected {list(reference)}"
    for name, t in mine.items():
        same(t, reference[name], f"{what}, {name}")


# cases -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A batch of rows and a way to cut it into calls."""

    seed: int
    length: int
    mask: Tensor | None
    reset: Tensor | None
    cuts: tuple[int, ...]  # lengths of the calls, their sum is `length`; a call may be empty

    @property
    def real(self) -> Tensor:
        return torch.ones(BATCH, self.length, dtype=torch.bool) if self.mask is None else self.mask

    @property
    def fresh(self) -> Tensor:
        return torch.zeros(BATCH, self.length, dtype=torch.bool) if self.reset is None else self.reset

    def __repr__(self) -> str:
        def bits(t: Tensor | None) -> str:
            return "None" if t is None else "|".join("".join("01"[int(b)] for b in row) for row in t)

        return f"Case(seed={self.seed}, mask={bits(self.mask)}, reset={bits(self.reset)}, cuts={self.cuts})"


BATCH = 3


@st.composite
def masks(draw: st.DrawFn, length: int) -> Tensor:
    """Rows that are whole, padded left, right, in between, anywhere, or nothing but padding."""
    rows = []
    for _ in range(BATCH):
        kind = draw(st.sampled_from(["random", "left", "right", "between", "whole", "blank"]))
        position = torch.arange(length)
        if kind == "random":
            generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
            rows.append(torch.rand(length, generator=generator) < 0.5)
            continue
        a, b = sorted((draw(st.integers(0, length)), draw(st.integers(0, length))))
        rows.append(
            {
                "whole": position >= 0,
                "blank": position < 0,
                "left": position >= a,
                "right": position < b,
                "between": (position < a) | (position >= b),
            }[kind]
        )
    return torch.stack(rows)


@st.composite
def resets(draw: st.DrawFn, length: int) -> Tensor:
    rows = torch.zeros(BATCH, length, dtype=torch.bool)
    for row in range(BATCH):
        for position in draw(st.lists(st.integers(0, length - 1), max_size=3)):
            rows[row, position] = True
    return rows


@st.composite
def cases(
    draw: st.DrawFn, *, max_length: int = 30, mask: bool | None = None, reset: bool | None = None, cut: bool = True
) -> Case:
    """Lengths, masks, resets and cuts; `mask` and `reset`: always, never, or (None) sometimes."""
    length = draw(st.integers(1, max_length))
    borders = draw(st.lists(st.integers(0, length), max_size=6)) if cut else []
    edges = [0, *sorted(borders), length]
    with_mask = draw(st.booleans()) if mask is None else mask
    with_reset = draw(st.booleans()) if reset is None else reset
    return Case(
        seed=draw(st.integers(0, 2**16)),
        length=length,
        mask=draw(masks(length)) if with_mask else None,
        reset=draw(resets(length)) if with_reset else None,
        cuts=tuple(b - a for a, b in pairwise(edges)),
    )


# running -----------------------------------------------------------------------------------------------------


def feed(
    mixer: Any,
    x: Tensor,
    cuts: Sequence[int],
    *,
    state: Any = None,
    mask: Tensor | None = None,
    reset: Tensor | None = None,
) -> tuple[Tensor, Any]:
    """The stream in calls of these lengths (in one where the mixer does not stream).

    A call that needs no mask or no reset gets none.
    """
    outputs, at = [], 0
    for size in cuts if mixer.traits.streams else [x.shape[1]]:
        now = slice(at, at + size)
        keywords: dict[str, Tensor] = {}
        if mask is not None and not mask[:, now].all():
            keywords["mask"] = mask[:, now]
        if reset is not None and reset[:, now].any():
            keywords["reset"] = reset[:, now]
        y, state = mixer(x[:, now], state, **keywords)
        assert y.shape == x[:, now].shape, f"a call of {size} tokens returns {tuple(y.shape)}"
        outputs.append(y)
        at += size
    assert at == x.shape[1]
    return torch.cat(outputs, 1), state


def documents(real: Tensor, fresh: Tensor) -> Iterator[list[int]]:
    """Positions of the real tokens of one row, document by document; the first continues the carried one."""
    positions: list[int] = []
    for position in range(len(real)):
        if fresh[position]:
            yield positions
            positions = []
        if real[position]:
            positions.append(position)
    yield positions


def alone(mixer: Any, x: Tensor, real: Tensor, fresh: Tensor, state: Any = None) -> tuple[Tensor, list[Any]]:
    """Law 5's oracle: each row's documents alone, without mask or reset; outputs, and each row's final state."""
    rows, states = [], []
    for row in range(x.shape[0]):
        y, past = torch.zeros_like(x[row]), None if state is None else state_row(state, row)
        for number, positions in enumerate(documents(real[row], fresh[row])):
            past = past if number == 0 else None
            if positions:
                out, past = mixer(x[row : row + 1, positions], past)
                y = y.index_copy(0, torch.tensor(positions), out[0])
        rows.append(y)
        states.append(mixer.init_state(1) if past is None and mixer.traits.streams else past)
    return torch.stack(rows), states


def live_tokens(real: Tensor, fresh: Tensor) -> int:
    """The largest number of real tokens since the last reset, of any row: what a growing state holds."""
    return max(len(list(documents(r, f))[-1]) for r, f in zip(real, fresh, strict=True))


def calm(make: Make, batch: int, length: int, *, seed: int = 0) -> Tensor:
    """An input without near-ties: small noise moves the outputs of the fp64 mixer by little."""
    mixer = make()
    if not mixer.traits.selects:
        return inputs(seed, batch, length)
    with torch.no_grad():
        for attempt in range(50):
            x = inputs(seed + 1000 * attempt, batch, length)
            noisy = [mixer(x + 1e-5 * inputs(seed + 7 + i, batch, length))[0] for i in range(3)]
            if max((y - mixer(x)[0]).abs().max().item() for y in noisy) < 1e-3:
                return x
    raise AssertionError("no input without near-ties found")
