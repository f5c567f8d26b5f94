"""FAVOR+: random features whose expected product is the kernel of softmax attention (Choromanski et al. 2021).

With x = q d^(-1/4), y = k d^(-1/4) the kernel is exp(x . y). Features, with the rows w of a random projection:

    positive        exp(w . x - |x|^2 / 2) / sqrt(m)                                      unbiased, never negative
    hyperbolic      the positive features of w and of -w, 2m in all                       half the variance
    trigonometric   exp(|x|^2 / 2) [cos(w . x), sin(w . x)] / sqrt(m)                    for comparison: may be negative
    bounded         (1 - 4A)^(d/4) exp(A |w|^2 + sqrt(1 - 4A) w . x - |x|^2 / 2) / sqrt(m), A < 0   FAVOR++
    relu, ...       f(w . x) + 0.001: generalized kernels, on unscaled q and k

The first four kinds are stabilized per vector: its largest exponent is factored out. For a query this factor cancels;
for a key it is the log-scale, which `linear_attention` applies without looking at later keys.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from longspan import host
from longspan.engine.arguments import check_floating
from longspan.engine.linear import check_call, elu_features, feature_attention
from longspan.engine.linear_chunks import LinearSums
from longspan.errors import ConfigError

KERNELS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "abs": torch.abs,
    "exp": torch.exp,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "gelu": F.gelu,
    "cos": torch.cos,
    "sin": torch.sin,
    "square": lambda x: x.relu().square(),
    "elu": elu_features,
    "identity": lambda x: x,
}
"""Generalized kernels (Choromanski et al. 2021, section 2.1): the f in features f(w . x) + 0.001, by name."""
SOFTMAX = ("positive", "hyperbolic", "trigonometric", "bounded")
KERNEL_EPSILON = 1e-3


def favor_features(
    x: Tensor, projection: Tensor, *, kind: str = "positive", bound: Tensor | float | None = None
) -> tuple[Tensor, Tensor | None]:
    """Return the random features of x, and the log of the factor they have to be multiplied by.

    Args:
        x: (batch, heads, length, head_dim), for the softmax kernels already scaled by head_dim ** -0.25.
        projection: (features, head_dim), the same for queries and keys.
        kind: "positive", "hyperbolic", "trigonometric", "bounded" or a name in `KERNELS`.
        bound: the constant A < 0 of "bounded".

    Returns:
        Features (batch, heads, length, m), with m = features, or 2 * features for "hyperbolic" and "trigonometric", and
        log-scales (batch, heads, length), which are None for generalized kernels.

    Raises:
        ConfigError: unknown kind, or no bound for "bounded".
    """
    check_floating(x=x)
    if kind in KERNELS:
        return KERNELS[kind](x @ projection.mT.to(x.dtype)) + KERNEL_EPSILON, None
    if kind not in SOFTMAX:
        raise ConfigError(f"performer: kind = {kind!r}: unknown kind; known: {', '.join([*SOFTMAX, *KERNELS])}")
    projection = projection.to(x.dtype)
    w, half = x @ projection.mT, x.square().sum(-1) / 2
    count = projection.shape[0]
    if kind == "trigonometric":
        return torch.cat([w.cos(), w.sin()], -1), half - math.log(count) / 2
    if kind == "hyperbolic":
        w = torch.cat([w, -w], -1)
    extra: Any = 0.0
    if kind == "bounded":
        if bound is None:
            raise ConfigError(
                "performer: bound is missing for kind = 'bounded'; pass bound=A, computed by bounded_constant"
            )
        a = torch.as_tensor(bound, dtype=x.dtype, device=x.device)
        w = (1 - 4 * a).sqrt() * w + a * projection.square().sum(-1)
        extra = x.shape[-1] / 4 * torch.log(1 - 4 * a)
    largest = w.detach().amax(-1, keepdim=True)
    return torch.exp(w - largest), largest[..., 0] - half + extra - math.log(w.shape[-1]) / 2


def favor_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    projection: Tensor,
    *,
    kind: str = "positive",
    bound: Tensor | float | None = None,
    causal: bool = True,
    state: LinearSums | None = None,
    lengths: Tensor | None = None,
    start: Tensor | None = None,
) -> tuple[Tensor, LinearSums | None]:
    """Return attention by random features, computed block by block; the backward pass recomputes the features.

    Args:
        q: (batch, heads, length, head_dim).
        k: (batch, kv_heads, length, head_dim), kv_heads dividing heads.
        v: (batch, kv_heads, length, head_dim).
        projection: (features, head_dim), from `orthogonal_projection`.
        kind, bound: kind of features and FAVOR++'s constant A; see `favor_features`.
        causal: each query sees only keys that are not after it.
        state: sums over the tokens before the call; None = empty.
        lengths: (batch,) number of real tokens of each row, which come first; None = all.
        start: (batch, length) column at which each token's document starts, negative if before the call; None = no
            document starts inside the call.

    Returns:
        Outputs (batch, heads, length, head_dim) and the sums after the call; the sums are None if not causal.
    """
    check_call(q, k, v, causal, state)
    scale = q.shape[-1] ** -0.25 if kind in SOFTMAX else 1.0

    def features(x: Tensor, keys: bool) -> tuple[Tensor, Tensor | None]:
        """Return features and log-scales of q or k (B, heads, n, head_dim), scaled for the kernel."""
        return favor_features(x * scale if scale != 1 else x, projection, kind=kind, bound=bound)

    return feature_attention(
        q,
        k,
        v,
        features,
        num_features_of(projection.shape[0], kind),
        causal=causal,
        state=state,
        lengths=lengths,
        start=start,
    )


def num_features_of(rows: int, kind: str) -> int:
    """Return the size of a feature vector for a projection with `rows` rows."""
    return 2 * rows if kind in ("hyperbolic", "trigonometric") else rows


def orthogonal_projection(
    num_features: int, dim: int, *, generator: torch.Generator | None, regularized: bool = False
) -> Tensor:
    """Draw a random projection (num_features, dim) in fp32: blocks of orthogonal rows with the norms of normal vectors.

    Directions are Haar distributed. The orthogonal matrix of a QR decomposition is so only if the signs of R's diagonal
    are moved into it; without them positive features are biased. The tensor is on torch's default device, wherever the
    generator is.

    Args:
        num_features: number of rows; whole blocks of `dim` rows and a part of one.
        dim: width of queries and keys.
        generator: source of random numbers, on any device; None = torch's.
        regularized: all norms are sqrt(dim) instead of chi-distributed: biased low, less variance (SMREG).
    """
    blocks = []
    for first in range(0, num_features, dim):
        normal = host.normal(dim, dim, generator=generator, dtype=torch.float64)
        q, r = torch.linalg.qr(normal)
        q = q * torch.where(r.diagonal() < 0, -1.0, 1.0)
        blocks.append(q.mT[: min(dim, num_features - first)])
    directions = torch.cat(blocks)
    norms = host.normal(num_features, dim, generator=generator, dtype=torch.float64).norm(dim=-1)
    if regularized:
        norms = torch.full_like(norms, dim**0.5)
    projections: Tensor = (directions * norms[:, None]).to(torch.get_default_device(), torch.float32)
    return projections


def bounded_constant(square: Tensor, dim: int) -> Tensor:
    """Return FAVOR++'s constant A < 0 that minimizes the variance (Likhosherstov et al. 2022, theorem 3.3).

    Args:
        square: mean of |x + y|^2 over queries x and keys y, both scaled by head_dim ** -0.25.
        dim: width of queries and keys.
    """
    square = square.clamp(min=1e-6)
    total = 2 * square + dim
    rho = ((total.square() + 8 * dim * square).sqrt() - total) / (4 * square)
    return (1 - 1 / rho) / 8
