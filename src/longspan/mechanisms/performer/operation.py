"""FAVOR+: random features whose products are, on average, the kernel of softmax attention (Choromanski et al. 2021).

With x = q d^(-1/4), y = k d^(-1/4) the kernel is exp(x . y). Features, with rows w of a projection:

    positive        exp(w . x - |x|^2 / 2) / sqrt(m)                                      unbiased, never negative
    hyperbolic      the same for w and -w, 2m features                                    half the variance
    trigonometric   exp(|x|^2 / 2) [cos(w . x), sin(w . x)] / sqrt(m)                    for comparison: may be negative
    bounded         (1 - 4A)^(d/4) exp(A |w|^2 + sqrt(1 - 4A) w . x - |x|^2 / 2) / sqrt(m), A < 0   FAVOR++
    relu, ...       f(w . x) + 0.001: generalised kernels, of q and k as they are

Every feature vector of the first kinds is stabilised by itself: its largest exponent is taken out. For a query it
cancels; for a key it is its log-scale, which `linear_attention` applies without looking ahead.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from longspan import host
from longspan.engine.arguments import check_floating
from longspan.engine.linear import LinearSums, check_call, elu_features, feature_attention
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
"""Generalised kernels (section 2.1): f of f(w . x) + 0.001."""
SOFTMAX = ("positive", "hyperbolic", "trigonometric", "bounded")
KERNEL_EPSILON = 1e-3


def favor_features(
    x: Tensor, projection: Tensor, *, kind: str = "positive", bound: Tensor | float | None = None
) -> tuple[Tensor, Tensor | None]:
    """Features and the log of what they are to be multiplied with.

    Args:
        x: (batch, heads, length, head_dim), for the softmax kernels already scaled by head_dim ** -0.25.
        projection: (features, head_dim), the same for queries and keys.
        kind: "positive", "hyperbolic", "trigonometric", "bounded" or a name of `KERNELS`.
        bound: A of "bounded", below 0.

    Returns:
        (batch, heads, length, m), m = 2 features for "hyperbolic" and "trigonometric", and (batch, heads, length); None
        for generalised kernels.

    Raises:
        ConfigError: no such kind, or no bound for "bounded".
    """
    check_floating(x=x)
    if kind in KERNELS:
        return KERNELS[kind](x @ projection.mT.to(x.dtype)) + KERNEL_EPSILON, None
    if kind not in SOFTMAX:
        raise ConfigError(f"performer: kind = {kind!r}; known: {', '.join([*SOFTMAX, *KERNELS])}")
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
            raise ConfigError("performer: kind = 'bounded' needs its bound A; see bounded_constant")
        a = torch.as_tensor(bound, dtype=x.dtype, device=x.device)
        w = (1 - 4 * a).sqrt() * w + a * projection.square().sum(-1)
        extra = x.shape[-1] / 4 * torch.log(1 - 4 * a)
    most = w.detach().amax(-1, keepdim=True)
    return torch.exp(w - most), most[..., 0] - half + extra - math.log(w.shape[-1]) / 2


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
    """Attention by random features, which are made block by block and recomputed in the backward pass.

    Args:
        q: (batch, heads, length, head_dim).
        k: (batch, kv_heads, length, head_dim), kv_heads dividing heads.
        v: like k.
        projection: (features, head_dim), see `orthogonal_projection`.
        kind: see `favor_features`.
        bound: see `favor_features`.
        causal, state, lengths, start: as in `linear_attention`.

    Returns:
        (batch, heads, length, head_dim) and the sums after the call, as `linear_attention` gives them.
    """
    check_call(q, k, v, causal, state)
    scale = q.shape[-1] ** -0.25 if kind in SOFTMAX else 1.0

    def features(x: Tensor, keys: bool) -> tuple[Tensor, Tensor | None]:
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
    """Entries of a feature vector, given the rows of the projection."""
    return 2 * rows if kind in ("hyperbolic", "trigonometric") else rows


def orthogonal_projection(
    num_features: int, dim: int, *, generator: torch.Generator | None, regularized: bool = False
) -> Tensor:
    """(num_features, dim) fp32: blocks of orthogonal directions, each Haar distributed, with the norms of normal rows.

    On torch's default device, wherever the generator is.

    The orthogonal matrix of a QR decomposition is Haar only with the signs of R's diagonal moved into it; without them
    positive features are biased.

    Args:
        num_features: rows; whole blocks of `dim` and a part of one.
        dim: of queries and keys.
        generator: draws, on any device; None = torch's.
        regularized: norms sqrt(dim) in place of chi-distributed ones: biased low, less variance (SMREG).
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
    """The A of FAVOR++ that minimises the variance (Likhosherstov et al. 2022, theorem 3.3), below 0.

    Args:
        square: mean of |x + y|^2 over queries and keys, scaled as `favor_features` wants them.
        dim: of queries and keys.
    """
    square = square.clamp(min=1e-6)
    total = 2 * square + dim
    rho = ((total.square() + 8 * dim * square).sqrt() - total) / (4 * square)
    return (1 - 1 / rho) / 8
