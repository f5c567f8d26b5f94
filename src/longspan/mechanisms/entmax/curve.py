"""The threshold of alpha-entmax: weights as a function of it, and the root that makes a row of them sum to one.

With a = alpha - 1, scores z and a threshold t, the weights are

    p = [1 + a (z - t)]_+ ^ (1 / a) = exp(log1p(a (z - t)) / a),     a = 0: p = exp(z - t), the softmax

and t, which lies between max(z) and max(z) + (1 - n^-a) / a, goes over into the log-sum-exp as a goes to 0. Here all is
in units of a: x = a (z - max(z)) (a = 0: x = z - max(z)), y = x - t, and w = p^(2 - alpha) = -dp/dt.

S(t) = sum p falls and is convex. If S were C (T - t)^(1/b), S / D * (1 - S^-b) / b were the whole way to S = 1, where
D = sum w. With b = a this is Newton's step on the 1/a-norm of [1 + y]_+, which never goes too far; b from the last two
points converges much faster where few of many nearly equal scores survive, and is kept between the bounds found so
far. The number of steps is fixed: it may depend on parameters, not on what a row contains.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

LOG2E = 1 / math.log(2)
TINY = 1e-6  # an exponent b nearer to zero than this is as good as this
SERIES = {torch.float32: 5e-3, torch.float64: 1e-4}  # below: the slope in alpha by its series, cancellation else

Weigh = Callable[[Tensor], tuple[Tensor, Tensor]]


def num_steps(a: float, dtype: torch.dtype) -> int:
    """Steps after which every row tried has its threshold to rounding, with one to spare; fewer near the softmax."""
    few = 3 if a <= 0.06 else 4 if a <= 0.21 else 6 if a <= 0.75 else 8
    return few + 1 if dtype == torch.float32 else few + 3


def solve(weigh: Weigh, rows: Tensor, keys: int, a: float | Tensor, steps: int) -> Tensor:
    """The threshold of every row, in units of a above its maximum, to rounding.

    `weigh` gives (p, w) of all rows at thresholds t (..., 1) and is evaluated `steps` times. `rows` (..., 1) are zeros,
    one a row of so many keys; a = alpha - 1 is a number or broadcastable to them.
    """
    unit: Any
    most: Any
    if isinstance(a, Tensor):
        unit, most = torch.where(a > 0, a, 1.0), a.clamp(min=TINY)
        high = torch.where(a > 0, -torch.expm1(-a * math.log(keys)), math.log(keys)).expand_as(rows)
    else:
        unit, most = a or 1.0, max(a, TINY)
        high = torch.full_like(rows, -math.expm1(-a * math.log(keys)) if a else math.log(keys))
    t = low = rows
    bend = most + rows
    before = None
    for _ in range(steps):
        p, w = weigh(t)
        total, fall = p.sum(-1, keepdim=True), w.sum(-1, keepdim=True)
        logs, way = torch.log(total), total / fall * unit
        low = torch.maximum(low, t - way * torch.expm1(-most * logs) / most)
        high = torch.where(total < 1, t, high)
        if before is not None:
            change = logs - before[0]
            estimate = 1 - (torch.log(fall) - before[1]) / change
            bend = torch.where(change.abs() > TINY, estimate, bend)
            bend = torch.minimum(bend, most) if isinstance(most, Tensor) else bend.clamp_(max=most)
            bend = bend.clamp_(min=-1.0)
            bend = bend.masked_fill_(bend.abs() < TINY, TINY)
        before = logs, torch.log(fall)
        step = way * torch.expm1(-bend * logs) / bend
        t = torch.minimum(torch.maximum(t - step, low), torch.maximum(high, low))
    return t


class Curve:
    """The weights of a tile of rows for one alpha, in buffers that are used again and again.

    Attributes:
        a: alpha - 1.
        unit: factor of the scores: a, or 1 where a is 0.
        x: (items, rows, keys), to be filled with unit * scores.
        y: x - t, at least -1 where a > 0.
        log2: log2(p), where a is none of 0, 0.5, 1.
        p: the weights, not normalised.
        w: p ** (2 - alpha), zero where p is.
    """

    def __init__(self, buffers: list[Tensor], a: float) -> None:
        self.a, self.unit = a, a or 1.0
        self.x, self.y, self.log2, self.p, self.w = buffers

    def at(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(p, w) at thresholds t (items, rows, 1)."""
        a, y, p, w = self.a, self.y, self.p, self.w
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
        # log1p and exp2 take -1 and -inf at full speed, log and exp do not
        torch.log1p(y, out=self.log2).mul_(LOG2E / a)
        torch.exp2(self.log2, out=p)
        return p, torch.mul(self.log2, 1 - a, out=w).exp2_()

    def solve(self) -> Tensor:
        """The threshold (items, rows, 1) above the maxima of x, which are taken off x."""
        top = self.x.amax(-1, keepdim=True)
        self.x.sub_(top)
        steps = num_steps(self.a, self.x.dtype)
        return solve(self.at, torch.zeros_like(top), self.x.shape[-1], self.a, steps)

    def slope(self, gradient: Tensor, weighted: Tensor) -> Tensor:
        """Sum over a tile of the gradient of alpha, from dL/dp less its mean under w, and w times that.

        The derivative of log p by alpha with t held is h = (y / (1 + y) - log1p(y)) / a^2; what moves with t adds
        nothing once the mean under w is off. Spoils the buffers.
        """
        a, y, p = self.a, self.y, self.p
        if a < SERIES[y.dtype]:
            x = y.clamp(min=-1e4) if a == 0 else y / a
            rate = series(x, y if a else torch.zeros_like(y)).mul_(p)
            return rate.mul_(gradient).sum()
        if a in (0.5, 1.0):
            torch.log1p(y, out=self.log2).mul_(LOG2E / a)
        log = self.log2.clamp_(min=-1e4).mul_(p).mul_(gradient)
        return (y.mul_(weighted).sum() / a - log.sum() / LOG2E) / a


def series(x: Tensor, y: Tensor) -> Tensor:
    """h of `Curve.slope` for small a: -x^2 (1/2 - 2/3 y + 3/4 y^2 - ...), with x = z - t and y = a x."""
    factor = y * (5 / 6) - 4 / 5
    for term in (3 / 4, -2 / 3, 1 / 2):
        factor = factor.mul_(y).add_(term)
    return factor.mul_(x).mul_(x).neg_()


def dense_weights(z: Tensor, a: Tensor, most: float) -> Tensor:
    """alpha-entmax of the rows of z (..., keys) for a = alpha - 1 broadcastable to (..., 1); without autograd.

    `most` is at least the largest entry of a. -inf hides a key; a row that sees none gives zeros.
    """
    soft = a <= 0
    unit = torch.where(soft, 1.0, a)
    top = z.amax(-1, keepdim=True)
    blank = top == -math.inf
    x = (z - top).masked_fill(blank, 0.0) * unit

    def weigh(t: Tensor) -> tuple[Tensor, Tensor]:
        y = x - t
        log = torch.where(soft, y, torch.log1p(y.clamp(min=-1.0)) / unit)
        p = log.exp()
        return p, torch.where(p > 0, ((1 - a) * log.clamp(min=-1e4)).exp(), 0.0)

    steps = max(num_steps(value, z.dtype) for value in (0.0, most))
    p = weigh(solve(weigh, torch.zeros_like(top + a), z.shape[-1], a, steps))[0]
    return (p / p.sum(-1, keepdim=True)).masked_fill(blank, 0.0)


def dense_slopes(p: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """p^(2 - alpha), and p times the h of `Curve.slope`, from the weights alone."""
    log = torch.where(p > 0, p, 1.0).log()
    w = torch.where(p > 0, ((1 - a) * log).exp(), 0.0)
    small = a < SERIES[p.dtype]
    unit = torch.where(small, 1.0, a)
    y = torch.expm1(a * log)
    x = torch.where(a > 0, y / torch.where(a > 0, a, 1.0), log)
    return w, torch.where(small, series(x, y) * p, (y * w / unit - p * log) / unit)
