"""Small mixers that break one law each. The matrix is worth what it catches: see test_mutants.py."""

from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longspan import reference
from longspan.state import may_overwrite

from .tiny import Keys, Memory, Tiny, TinySegments
from .tools import HEADS

# law 1 -------------------------------------------------------------------------------------------------------


class ChunkMaximum(Tiny):
    """Performer's positive features, causal, stabilised by the maximum over the whole chunk: the usual code."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        features = torch.exp(k - k.amax()) + 1e-4
        queries = torch.exp(q - q.amax(-1, keepdim=True))
        causal = torch.ones(q.shape[2], k.shape[2]).tril(k.shape[2] - q.shape[2]).to(q.dtype)
        weights = queries @ features.transpose(-1, -2) * causal
        return weights @ v / weights.sum(-1, keepdim=True)


class TopOfTheCall(Tiny):
    """Values are kept or dropped by a threshold that the whole call decides."""

    def document(self, x: Tensor, past: Keys) -> tuple[Tensor, Keys]:
        y, past = super().document(x, past)
        return y * (1 + 1e-3 * (x.abs().amax() > 3)), past


class RoundedByLaterTokens(Tiny):
    """The last bits depend on a later token: scaled there and back."""

    def document(self, x: Tensor, past: Keys) -> tuple[Tensor, Keys]:
        y, past = super().document(x, past)
        return y * x.abs().max() / x.abs().max(), past


class SeesNext(Tiny):
    """Outputs are causal, the map that is shown is not."""

    def attention_map(self, x: Tensor) -> Tensor:
        return super().attention_map(x) + 1e-9


# law 2 -------------------------------------------------------------------------------------------------------


class CallBorders(TinySegments):
    """Segments begin where calls begin."""

    def opened(self, count: int, past: int) -> bool:
        return (count - past) % self.segment == 0


class ForgetsPosition(Tiny):
    """Rotation counts from the start of the call."""

    def positions(self, length: int, past: Keys) -> Tensor:
        return torch.arange(length)


class ZeroKeys(Tiny):
    """An empty past of zero keys, which take their share of the softmax."""

    def filled(self, past: Keys) -> Keys:
        return past


class HiddenState(Tiny):
    """Part of the state lives on the module."""

    calls = 0

    def begin(self, x: Tensor) -> None:
        self.calls += 1

    def positions(self, length: int, past: Keys) -> Tensor:
        return super().positions(length, past) * (1 + 0.01 * self.calls)


class KeepsTheTypeOfThePast(Tiny):
    """A state that was lowered once stays lowered."""

    def taken_up(self, past: Keys, dtype: torch.dtype) -> Keys:
        self.kind = past.k.dtype
        return super().taken_up(past, dtype)

    def keep(self, k: Tensor, v: Tensor, count: Tensor) -> Keys:
        return super().keep(k.to(self.kind), v.to(self.kind), count)


class Unmarked(NamedTuple):
    memory: Tensor
    total: Tensor
    seen: Tensor


class AccumulatorsSink(TinySegments):
    """Nothing says which fields are accumulators."""

    def document(self, x: Tensor, past: Any) -> tuple[Tensor, Any]:
        y, past = super().document(x, past)
        return y, Unmarked(*past)

    def init_state(self, *args: Any, **keywords: Any) -> Any:
        return Unmarked(*super().init_state(*args, **keywords))


def single_angles(mixer: Tiny, positions: Tensor) -> Tensor:
    frequencies: Tensor = mixer.rope ** (-torch.arange(0, mixer.head_dim, 2) / mixer.head_dim)
    return positions.float()[:, None] * frequencies


class SingleAngles(Tiny):
    """Angles in fp32 in every model."""

    def angles(self, positions: Tensor) -> Tensor:
        return single_angles(self, positions)


class AnglesOfTheModel(Tiny):
    """Angles in the dtype of the model: right in fp64, wrong in fp32."""

    def angles(self, positions: Tensor) -> Tensor:
        return super().angles(positions) if self.q.weight.dtype == torch.float64 else single_angles(self, positions)


class SinglePrecision(Tiny):
    """Attends in fp32 whatever comes in."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return super().attend(q.float(), k.float(), v.float()).to(q.dtype)


# law 3 -------------------------------------------------------------------------------------------------------


class ForgetsCounts(Tiny):
    """state_nbytes without the 8 bytes of a row's count."""

    def state_nbytes(self, batch_size: int, length: int, dtype: torch.dtype = torch.float32) -> int:
        return super().state_nbytes(batch_size, length, dtype) - 8 * batch_size


class OneDtype(TinySegments):
    """state_nbytes as if accumulators had the dtype of the input."""

    def state_nbytes(self, batch_size: int, length: int, dtype: torch.dtype = torch.float32) -> int:
        return batch_size * (2 * self.q.in_features * dtype.itemsize + 8)


class WritesInPlace(Tiny):
    """The ring of the passed state is rotated in place."""

    def keep(self, k: Tensor, v: Tensor, count: Tensor) -> Keys:
        keys = super().keep(k, v, count)
        with torch.no_grad():
            self.past_keys.copy_(keys.k)
        return keys

    def document(self, x: Tensor, past: Keys) -> tuple[Tensor, Keys]:
        self.past_keys = past.k
        return super().document(x, past)


class OwnsInPlace(WritesInPlace):
    """Only the ring of a state that its caller has given up, but no step is recorded that takes it back."""

    def keep(self, k: Tensor, v: Tensor, count: Tensor) -> Keys:
        return super().keep(k, v, count) if may_overwrite(k) else Tiny.keep(self, k, v, count)


class CountsInPlace(Tiny):
    """The count of the passed state is incremented in place."""

    def document(self, x: Tensor, past: Keys) -> tuple[Tensor, Keys]:
        y, new = super().document(x, past)
        return y, new._replace(seen=past.seen.add_(len(x)))


class KeepsTheCallAlive(Tiny):
    """The state is a view of everything the call computed."""

    def join(self, rows: list[Keys]) -> Keys:
        assert self.window is not None
        whole = Keys(*super().join(rows))
        long = torch.zeros(len(rows), self.kv_heads, 600 + self.window, self.head_dim, dtype=whole.k.dtype)
        long[:, :, : self.window - 1] = whole.k
        return whole._replace(k=long[:, :, : self.window - 1])


class HoldsDeadColumns(Tiny):
    """A growing state that never shrinks below what it was."""

    def join(self, rows: list[Keys]) -> Keys:
        most = 1 + max(int(row.seen) for row in rows)
        return Keys(*(torch.cat(parts) for parts in zip(*(self.widened(row, most) for row in rows), strict=True)))


class PadsBehind(Tiny):
    """Short rows of a growing state have their empty columns last."""

    def widened(self, row: Keys, columns: int) -> Keys:
        row = super().widened(row, columns)
        surplus = columns - int(row.seen)
        return Keys(row.k.roll(-surplus, 2), row.v.roll(-surplus, 2), row.seen)

    def filled(self, past: Keys) -> Keys:
        return Keys(past.k[:, :, : int(past.seen)], past.v[:, :, : int(past.seen)], past.seen)


# law 4 -------------------------------------------------------------------------------------------------------


def one_too_far(q: Tensor, k: Tensor, v: Tensor, *, window: int, **keywords: Any) -> Tensor:
    return reference.window_attention(q, k, v, window=window + 1, **keywords)


def cold_keys(q: Tensor, k: Tensor, v: Tensor, **keywords: Any) -> Tensor:
    """Right outputs, no gradient to the keys."""
    return reference.window_attention(q, k.detach(), v, **keywords)


class OneTooFar(Tiny):
    ops = module = SimpleNamespace(window_attention=one_too_far)


class ColdKeys(Tiny):
    ops = module = SimpleNamespace(window_attention=cold_keys)


class OwnOp(Tiny):
    """Does not call the op through the module, so no definition can be put in its place."""

    ops = SimpleNamespace(window_attention=reference.window_attention)


class ShortcutInEvaluation(Tiny):
    """Another code path where no gradient is needed, and a wrong one."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = super().attend(q, k, v)
        return out if torch.is_grad_enabled() else out * (1 + 1e-6)


# law 5 -------------------------------------------------------------------------------------------------------


class PaddingCounts(Tiny):
    """Padding takes positions."""

    def row(self, x: Tensor, real: Tensor, fresh: Tensor, past: Keys) -> tuple[Tensor, Keys]:
        y, new = super().row(x, real, fresh, past)
        return y, new._replace(seen=new.seen + (~real).sum() * (real.any()))


class PaddingNormalizes(Tiny):
    """Padding takes a share of a normalizer."""

    def row(self, x: Tensor, real: Tensor, fresh: Tensor, past: Keys) -> tuple[Tensor, Keys]:
        y, new = super().row(x, real, fresh, past)
        return y / (1 + 1e-3 * (~real).cumsum(0)[:, None]), new


class PaddingSpeaks(Tiny):
    """Outputs at padding are not zero."""

    def row(self, x: Tensor, real: Tensor, fresh: Tensor, past: Keys) -> tuple[Tensor, Keys]:
        y, new = super().row(x, real, fresh, past)
        return y + 1e-3 * (~real)[:, None], new


class ResetLeaks(Tiny):
    """A reset restarts positions and leaves the keys where they are."""

    def row(self, x: Tensor, real: Tensor, fresh: Tensor, past: Keys) -> tuple[Tensor, Keys]:
        y, new = super().row(x, real, fresh, past)
        if not fresh.any():
            return y, new
        leak = self.document(x[real], past)[0] if real.any() else y[real]
        return y + 1e-3 * torch.zeros_like(y).index_copy(0, real.nonzero()[:, 0], leak), new


class LateReset(Tiny):
    """A reset on padding at the end of a call is forgotten."""

    def row(self, x: Tensor, real: Tensor, fresh: Tensor, past: Keys) -> tuple[Tensor, Keys]:
        last = int(real.nonzero().max()) + 1 if real.any() else 0
        fresh = fresh.clone()
        fresh[last:] = False
        return super().row(x, real, fresh, past)


class ResetOnRealTokensOnly(Tiny):
    """A reset on padding is lost wherever it is."""

    def row(self, x: Tensor, real: Tensor, fresh: Tensor, past: Keys) -> tuple[Tensor, Keys]:
        return super().row(x, real, fresh & real, past)


class NothingIsNaN(Tiny):
    """A row without visible keys divides by zero."""

    def row(self, x: Tensor, real: Tensor, fresh: Tensor, past: Keys) -> tuple[Tensor, Keys]:
        y, new = super().row(x, real, fresh, past)
        return (y if real.any() else y / 0), new


class BlankRowAges(Tiny):
    """A call of padding counts as one token."""

    def row(self, x: Tensor, real: Tensor, fresh: Tensor, past: Keys) -> tuple[Tensor, Keys]:
        y, new = super().row(x, real, fresh, past)
        return y, new if real.any() else new._replace(seen=new.seen + 1)


class BidirectionalLeak(Tiny):
    """Bidirectional, but resets are ignored."""

    def row(self, x: Tensor, real: Tensor, fresh: Tensor, past: Keys) -> tuple[Tensor, Keys]:
        return super().row(x, real, fresh if self.causal else torch.zeros_like(fresh), past)


class GradientOfPadding(Tiny):
    """Values come out right, but an infinite branch that was masked away makes the gradient NaN."""

    def row(self, x: Tensor, real: Tensor, fresh: Tensor, past: Keys) -> tuple[Tensor, Keys]:
        y, new = super().row(x, real, fresh, past)
        root = (x * real[:, None]).pow(2).sum(-1, keepdim=True).sqrt()
        return y + 0 * torch.where(real[:, None], root, 0.0), new


# law 6 -------------------------------------------------------------------------------------------------------


class StopsAtCalls(Tiny):
    """The keys of earlier calls are detached, though the horizon is unlimited."""

    def filled(self, past: Keys) -> Keys:
        return Keys(*(t.detach() for t in super().filled(past)))


class Recomputed(torch.autograd.Function):
    """tanh with a backward that is a little off, as a hand-written recomputation may be."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        x: Tensor = ctx.saved_tensors[0]
        return grad * (1 - x.tanh() ** 2) * 1.01


class WrongBackward(Tiny):
    def document(self, x: Tensor, past: Keys) -> tuple[Tensor, Keys]:
        y, past = super().document(x, past)
        return Recomputed.apply(y), past  # type: ignore[no-untyped-call]


class OneSegmentFurther(TinySegments):
    """Memory is detached one segment too late."""

    def cut(self, memory: Tensor, border: int, last: int) -> Tensor:
        return super().cut(memory, border + 1, last)


class NoCut(TinySegments):
    """A horizon is announced and memory never detached."""

    def cut(self, memory: Tensor, border: int, last: int) -> Tensor:
        return memory


class CutEverywhere(TinySegments):
    """Memory is detached at every border, whatever the horizon."""

    def cut(self, memory: Tensor, border: int, last: int) -> Tensor:
        return memory.detach()


class CutInsideSegment(TinySegments):
    """The open segment that a state carries is detached too."""

    def document(self, x: Tensor, past: Memory) -> tuple[Tensor, Memory]:
        return super().document(x, past._replace(total=past.total.detach()))


class KeepsGraph(Tiny):
    """Gradients pass a detached state: the graph is kept on the module as well."""

    last: Tensor | None = None

    def document(self, x: Tensor, past: Keys) -> tuple[Tensor, Keys]:
        y, past = super().document(x, past)
        if self.last is not None and self.last.requires_grad:
            y = y + 0.1 * (self.last - self.last.detach())
        self.last = y.sum()
        return y, past


# law 7 -------------------------------------------------------------------------------------------------------


class UnusedWhenShort(Tiny):
    """A gate that only calls of more than a token need."""

    def __init__(self, **keywords: Any) -> None:
        super().__init__(**keywords)
        self.gate = torch.nn.Parameter(torch.ones(()))

    def document(self, x: Tensor, past: Keys) -> tuple[Tensor, Keys]:
        y, past = super().document(x, past)
        return (y * self.gate if len(x) > 1 else y), past


class KeepsWeights(Tiny):
    """A number computed from a weight is computed once."""

    weight_sum: Tensor | None = None

    def document(self, x: Tensor, past: Keys) -> tuple[Tensor, Keys]:
        y, past = super().document(x, past)
        self.weight_sum = self.o.weight.detach().square().sum() if self.weight_sum is None else self.weight_sum
        return y * self.weight_sum, past


class FivePercent(Tiny):
    def flops(self, length: int, *, batch_size: int = 1) -> int:
        return round(1.05 * super().flops(length, batch_size=batch_size))


class TriangleOnly(Tiny):
    """Counts the pairs it needs and computes the rectangle."""

    def flops(self, length: int, *, batch_size: int = 1) -> int:
        saved = 4 * batch_size * self.head_dim * (HEADS * length**2 - self.pairs(length))
        return super().flops(length, batch_size=batch_size) - saved


class OneHead(Tiny):
    """pairs of one head."""

    def pairs(self, length: int) -> int:
        return super().pairs(length) // HEADS
