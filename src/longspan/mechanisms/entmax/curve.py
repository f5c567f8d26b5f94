"""The threshold of alpha-entmax: weights as a function of the threshold, and a root finder that makes them sum to one.

With a = alpha - 1, scores z and a threshold t, the weights are

    p = [1 + a (z - t)]_+ ^ (1 / a) = exp(log1p(a (z - t)) / a),     a = 0: p = exp(z - t), the softmax

The threshold t lies between max(z) and max(z) + (1 - n^-a) / a and becomes the log-sum-exp as a goes to 0. The code
works in units of a: x = a (z - max(z)) (a = 0: x = z - max(z)), y = x - t, and w = p^(2 - alpha) = -dp/dt.

S(t) = sum p is decreasing and convex. If S were C (T - t)^(1/b), the step S / D * (1 - S^-b) / b with D = sum w would
reach S = 1 exactly. With b = a this is Newton's step on the 1/a-norm of [1 + y]_+, which never overshoots. Estimating b
from the last two points converges much faster where few of many nearly equal scores survive; the step is then clamped
to the bounds found so far. The number of steps is fixed: it may depend on parameters, not on what a row contains.

Most of the time of a step goes into a logarithm and two exponentials per score. Where 1 / a is near a whole number n,
[1 + y]_+ ^ n is a few products, and its threshold a start from which two or three steps with the true exponent suffice.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

LOG2E = 1 / math.log(2)
TINY = 1e-6  # lower limit of |b|; smaller exponents make no difference
SERIES = {torch.float32: 5e-3, torch.float64: 1e-4}  # below: use the series of d log p / d alpha, against cancellation

NEAR = 0.1, 0.67  # a for which the steps start from a whole exponent, and 1 + y needs no log1p to be precise enough
WHOLE_STEPS, SAVED_STEPS = 5, 4  # steps with the whole exponent, and how many fewer with the true one
CLOSE = 0.05  # distance of 1 / a from a whole number within which one more step is saved
# lower limits of 1 + y, whose logarithm is then finite and as fast as others, and whose power p is zero
SMALLEST = {torch.float32: 1e-37, torch.float64: 1e-300}

Sums = Callable[[Tensor], tuple[Tensor, Tensor]]


def num_steps(a: float, dtype: torch.dtype) -> int:
    """Return the number of root-finding steps that gives every tested row its threshold to rounding, plus one to spare.

    Fewer steps are needed near the softmax (a = 0).
    """
    base = 3 if a <= 0.06 else 4 if a <= 0.21 else 6 if a <= 0.75 else 8
    return base + 1 if dtype == torch.float32 else base + 3


def solve(sums: Sums, rows: Tensor, keys: int, a: float | Tensor, steps: int, start: Tensor | None = None) -> Tensor:
    """Return the threshold t of every row, (..., 1), exact to rounding.

    It belongs to scores from which the row's maximum is subtracted, times a (times 1 where a is 0); see the module.

    Args:
        sums: returns the sums (..., 1) of p and of w of all rows for thresholds t (..., 1); called `steps` times.
        rows: zeros (..., 1), one per row.
        keys: number of keys of a row.
        a: alpha - 1, a number or a tensor broadcastable to `rows`.
        steps: number of steps, from `num_steps`.
        start: (..., 1) a first guess; None = the row's maximum.
    """
    unit: Any
    largest_b: Any
    if isinstance(a, Tensor):
        unit, largest_b = torch.where(a > 0, a, 1.0), a.clamp(min=TINY)
        high = torch.where(a > 0, -torch.expm1(-a * math.log(keys)), math.log(keys)).expand_as(rows)
    else:
        unit, largest_b = a or 1.0, max(a, TINY)
        high = torch.full_like(rows, -math.expm1(-a * math.log(keys)) if a else math.log(keys))
    low = rows
    t = rows if start is None else torch.minimum(start, high)
    b = largest_b + rows
    previous = None
    for _ in range(steps):
        total, slope = sums(t)
        logs, newton_step = torch.log(total), total / slope * unit
        low = torch.maximum(low, t - newton_step * torch.expm1(-largest_b * logs) / largest_b)
        high = torch.where(total < 1, t, high)
        if previous is not None:
            change = logs - previous[0]
            estimate = 1 - (torch.log(slope) - previous[1]) / change
            b = torch.where(change.abs() > TINY, estimate, b)
            b = torch.minimum(b, largest_b) if isinstance(largest_b, Tensor) else b.clamp_(max=largest_b)
            b = b.clamp_(min=-1.0)
            b = b.masked_fill_(b.abs() < TINY, TINY)
        previous = logs, torch.log(slope)
        step = newton_step * torch.expm1(-b * logs) / b
        t = torch.minimum(torch.maximum(t - step, low), torch.maximum(high, low))
    return t


def whole_exponent(a: float) -> int | None:
    """Return the whole number next to 1 / a whose threshold is the start of the steps for `a`; None = none is."""
    return None if a in (0, 0.5, 1) or not NEAR[0] <= a <= NEAR[1] else round(1 / a)


class Exponents(NamedTuple):
    """What a `Curve` needs of the alphas of its heads; see its attributes."""

    a: float | Tensor
    largest: float
    whole: int | None
    is_close: bool

    @classmethod
    def of(cls, values: list[float], like: Tensor) -> "Exponents":
        """Return the exponents of heads with a = `values`, which share a `whole_exponent` or are equal."""
        whole = whole_exponent(values[0])
        is_close = whole is not None and all(abs(1 / a - whole) <= CLOSE for a in values)
        a = (
            values[0]
            if min(values) == max(values)
            else torch.tensor(values, dtype=like.dtype).to(like.device)[:, None, None]
        )
        return cls(a=a, largest=max(values), whole=whole, is_close=is_close)


class Curve:
    """The weights of a tile of rows for some heads, in reusable buffers.

    Attributes:
        a: alpha - 1, a number; or (heads, 1, 1) if it differs, for heads with one `whole_exponent`.
        largest: the largest a of the heads.
        whole: their `whole_exponent`.
        is_close: whether 1 / a is close to it for all heads.
        unit: factor of the scores: a, or 1 where a is 0.
        x: (items, heads, rows, keys), input: unit * scores.
        y: x - t, at least -1 where a > 0.
        log2: log2(p), where a is not 0, 0.5 or 1.
        p: the weights, not normalized.
        w: p ** (2 - alpha), zero where p is zero.
    """

    def __init__(self, buffers: list[Tensor], exponents: "Exponents") -> None:
        self.a, self.largest, self.whole, self.is_close = exponents
        self.unit = self.a if isinstance(self.a, Tensor) else self.a or 1.0
        self.x, self.y, self.log2, self.p, self.w = buffers

    def at(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weights p, and p ** (2 - alpha), at thresholds t (..., rows, 1); both (..., rows, keys)."""
        a, y, p, w = self.a, self.y, self.p, self.w
        if self.whole is not None:
            p = self.weights(t)
            torch.div(p, y, out=w)
            y.sub_(1.0)
            return p, w
        assert not isinstance(a, Tensor)
        torch.sub(self.x, t, out=y)
        if a == 0:
            torch.mul(y, LOG2E, out=p).exp2_()
            return p, p
        y.clamp_(min=-1.0)
        if a == 1:
            torch.add(y, 1.0, out=p)
            return p, torch.ceil(p, out=w)
        if a == 0.5:
            torch.add(y, 1.0, out=w)
            return torch.mul(w, w, out=p), w
        # log1p and exp2 handle -1 and -inf at full speed, log and exp do not
        torch.log1p(y, out=self.log2).mul_(LOG2E / a)
        torch.exp2(self.log2, out=p)
        return p, torch.mul(self.log2, 1 - a, out=w).exp2_()

    def weights(self, t: Tensor) -> Tensor:
        """Return the weights p at thresholds t alone; see `at`."""
        if self.whole is not None:
            root = torch.sub(self.x, t - 1, out=self.y).clamp_(min=SMALLEST[t.dtype])
            torch.log2(root, out=self.log2).mul_(1 / self.a)
            return torch.exp2(self.log2, out=self.p)
        if self.a in (0, 0.5, 1):
            return self.at(t)[0]
        torch.sub(self.x, t, out=self.y).clamp_(min=-1.0)
        return torch.log1p(self.y, out=self.p).mul_(LOG2E / self.a).exp2_()

    def solve(self) -> Tensor:
        """Return the thresholds (..., rows, 1) relative to the row maxima of x, which are subtracted from x."""
        top = self.x.amax(-1, keepdim=True)
        self.x.sub_(top)
        rows, keys, steps = torch.zeros_like(top), self.x.shape[-1], num_steps(self.largest, self.x.dtype)
        if self.whole is None:
            return solve(self._sums, rows, keys, self.a, steps)
        start = self._whole_start(rows, self.whole)
        return solve(self._near_sums, rows, keys, self.a, max(3, steps - SAVED_STEPS) - self.is_close, start)

    def _sums(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return the sums of both results of `at`."""
        p, w = self.at(t)
        total = p.sum(-1, keepdim=True)
        return total, total if w is p else w.sum(-1, keepdim=True)

    def _near_sums(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return the sums of p and w, with one exponential; for steps from a whole exponent."""
        p = self.weights(t)
        return p.sum(-1, keepdim=True), torch.div(p, self.y, out=self.w).sum(-1, keepdim=True)

    def _whole_start(self, rows: Tensor, exponent: int) -> Tensor:
        """Return the thresholds (..., 1) for a whole exponent, by products and Newton's steps alone.

        rows: zeros (..., 1), one per row.
        """
        t = rows
        for _ in range(WHOLE_STEPS):
            root = w = torch.sub(self.x, t - 1, out=self.y).clamp_(min=0.0)
            if exponent == 2:  # the sum of squares without a product of its own
                norm = torch.linalg.vector_norm(root, dim=-1, keepdim=True)
                t = torch.addcmul(t, norm / root.sum(-1, keepdim=True), norm - 1)
                continue
            for _ in range(exponent - 2):
                w = torch.mul(w, root, out=self.w)
            total, slope = torch.mul(w, root, out=self.p).sum(-1, keepdim=True), w.sum(-1, keepdim=True)
            t = torch.addcmul(t, total / slope, 1 - total.pow(-1 / exponent))
        return t

    def slope(self, gradient: Tensor, weighted: Tensor) -> Tensor:
        """Return a tile's contribution to the gradient of alpha of each head, (heads,); overwrites the buffers.

        At fixed t the derivative of log p by alpha is h = (y / (1 + y) - log1p(y)) / a^2. The part through t vanishes
        once the mean of the gradient under w is subtracted.

        Args:
            gradient: dL/dp minus its mean under w.
            weighted: w times `gradient`.
        """
        a, y, p, others = self.a, self.y, self.p, (0, 2, 3)
        if isinstance(a, Tensor):
            a = a.flatten()
        elif a < SERIES[y.dtype]:
            x = y.clamp(min=-1e4) if a == 0 else y / a
            rate = series(x, y if a else torch.zeros_like(y)).mul_(p)
            return rate.mul_(gradient).sum(others)
        elif a in (0.5, 1.0):
            torch.log1p(y, out=self.log2).mul_(LOG2E / a)
        log = self.log2.clamp_(min=-1e4).mul_(p).mul_(gradient)
        return (y.mul_(weighted).sum(others) / a - log.sum(others) / LOG2E) / a


def series(x: Tensor, y: Tensor) -> Tensor:
    """Return d log p / d alpha at a fixed threshold, by its Taylor series for small a = alpha - 1.

    It is h = -x^2 (1/2 - 2/3 y + 3/4 y^2 - ...), without the cancellation that the formula in `Curve.slope` has there.

    Args:
        x: scores minus their row's threshold, any shape.
        y: a * x, like x.
    """
    factor = y * (5 / 6) - 4 / 5
    for term in (3 / 4, -2 / 3, 1 / 2):
        factor = factor.mul_(y).add_(term)
    return factor.mul_(x).mul_(x).neg_()


def dense_weights(z: Tensor, a: Tensor, largest_a: float) -> Tensor:
    """Return the alpha-entmax weights of the rows of z (..., keys), without autograd.

    Args:
        z: scores; -inf hides a key. A row without visible keys gives zeros.
        a: alpha - 1, broadcastable to (..., 1).
        largest_a: an upper bound of the entries of a.
    """
    is_softmax = a <= 0
    unit = torch.where(is_softmax, 1.0, a)
    top = z.amax(-1, keepdim=True)
    all_hidden = top == -math.inf
    x = (z - top).masked_fill(all_hidden, 0.0) * unit

    def weigh(t: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weights p and p ** (2 - alpha) at thresholds t (..., 1)."""
        y = x - t
        log = torch.where(is_softmax, y, torch.log1p(y.clamp(min=-1.0)) / unit)
        p = log.exp()
        return p, torch.where(p > 0, ((1 - a) * log.clamp(min=-1e4)).exp(), 0.0)

    steps = max(num_steps(value, z.dtype) for value in (0.0, largest_a))

    def sums(t: Tensor) -> tuple[Tensor, Tensor]:
        """Return the sums of both over the keys."""
        p, w = weigh(t)
        return p.sum(-1, keepdim=True), w.sum(-1, keepdim=True)

    p = weigh(solve(sums, torch.zeros_like(top + a), z.shape[-1], a, steps))[0]
    return (p / p.sum(-1, keepdim=True)).masked_fill(all_hidden, 0.0)


def dense_slopes(p: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """Return p ** (2 - alpha), and p times d log p / d alpha at a fixed threshold (h of `Curve.slope`).

    Args:
        p: alpha-entmax weights, (..., keys).
        a: alpha - 1, broadcastable to p.
    """
    log = torch.where(p > 0, p, 1.0).log()
    w = torch.where(p > 0, ((1 - a) * log).exp(), 0.0)
    small = a < SERIES[p.dtype]
    unit = torch.where(small, 1.0, a)
    y = torch.expm1(a * log)
    x = torch.where(a > 0, y / torch.where(a > 0, a, 1.0), log)
    return w, torch.where(small, series(x, y) * p, (y * w / unit - p * log) / unit)
