"""Reference implementations of alpha-entmax and of attention with it (Peters et al. 2019; Correia et al. 2019)."""

import math

import torch
from torch import Tensor

from longspan.engine.definitions.softmax import visible_keys


def entmax(scores: Tensor, alpha: Tensor | float, dim: int = -1) -> Tensor:
    """Return alpha-entmax weights: p = [1 + (alpha - 1) (z - t)]_+ ^ (1 / (alpha - 1)), t such that sum p = 1.

    The threshold t is found by bisection. One Newton step follows, which does not change the value but gives autograd
    the derivative of t by scores and alpha. At alpha = 1 the weights are exp(z - t), the softmax.

    Args:
        scores: any shape; -inf hides an entry.
        alpha: in [1, 2]; a number, or a tensor broadcastable to the scores with size 1 at `dim`.
        dim: the dimension along which the weights sum to one.
    """
    if not isinstance(alpha, Tensor):
        alpha = torch.tensor(float(alpha), dtype=scores.dtype, device=scores.device)
    a = (alpha - 1).to(scores.dtype)
    seen = scores > -math.inf
    z = torch.where(seen, scores, 0.0)

    def weights(t: Tensor) -> Tensor:
        """Return the weights p at threshold t."""
        x = z - t
        inside = seen & (1 + a * x > 0)
        y = torch.where(inside, a * x, 0.0)
        divisor = torch.where(a > 0, a, 1.0)
        # at a = 0 the second term is zero, but has the right derivative by a
        log = torch.where(a > 0, torch.log1p(y) / divisor, x - a * x.square() / 2)
        return torch.where(inside, torch.where(inside, log, 0.0).exp(), 0.0)

    with torch.no_grad():
        low = torch.where(seen, z, -math.inf).amax(dim, keepdim=True)
        low = torch.where(low > -math.inf, low, 0.0) + torch.zeros_like(a)
        high = low + math.log(scores.shape[dim]) + 1
        for _ in range(60):
            middle = (low + high) / 2
            above = weights(middle).sum(dim, keepdim=True) >= 1
            low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    p = weights(low)
    slope = torch.where(p > 0, p / (1 + a * (z - low)), 0.0)  # p ** (2 - alpha), which is -dp/dt
    total = slope.detach().sum(dim, keepdim=True)
    t = low + (p.sum(dim, keepdim=True) - 1) / torch.where(total > 0, total, 1.0)
    return weights(t)


def entmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor,
    *,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    lengths: Tensor | None = None,
    start: Tensor | None = None,
    memory_lengths: Tensor | None = None,
) -> Tensor:
    """Return attention outputs (batch, heads, length, head_dim) with alpha-entmax weights, alpha (heads,).

    (Correia et al. 2019, section 3.) With a window, a query sees 0 <= i - j < window if causal, else |i - j| < window.
    Arguments are those of `longspan.ops.entmax_attention`.
    """
    visible = visible_keys(q, k, causal=causal, lengths=lengths, start=start, memory_lengths=memory_lengths)
    if window is not None:
        i = torch.arange(q.shape[2], device=q.device)[:, None]
        j = torch.arange(q.shape[2] - k.shape[2], q.shape[2], device=q.device)[None, :]
        visible = visible & ((i - j).abs() < window)
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    return entmax(scores.masked_fill(~visible[:, None], -math.inf), alpha[:, None, None]) @ v
