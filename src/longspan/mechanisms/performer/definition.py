"""Reference implementation of FAVOR+: features by the paper's formulas, and attention over the dense feature
products.
"""

import math
from typing import Any

import torch
from torch import Tensor

from longspan.engine.definitions.linear import linear_attention


def favor_features(
    x: Tensor, projection: Tensor, *, kind: str = "positive", bound: Any = None
) -> tuple[Tensor, Tensor]:
    """Return random features of x for the softmax kernel exp(x . y), without stabilization, and zero log-scales.

    Formulas: Choromanski et al. 2021, lemma 1 (positive, hyperbolic), equation 5 (trigonometric), section 2.1
    (generalized kernels); Likhosherstov et al. 2022 (bounded). x is (batch, heads, length, head_dim), `projection` (m,
    head_dim); features are (batch, heads, length, m or 2m), log-scales (batch, heads, length).
    """
    w, m, norm = x @ projection.mT, projection.shape[0], (x * x).sum(-1, keepdim=True)
    if kind == "positive":
        phi = (w - norm / 2).exp() / m**0.5
    elif kind == "hyperbolic":
        phi = torch.cat([(w - norm / 2).exp(), (-w - norm / 2).exp()], -1) / (2 * m) ** 0.5
    elif kind == "trigonometric":
        phi = (norm / 2).exp() * torch.cat([w.cos(), w.sin()], -1) / m**0.5
    elif kind == "bounded":
        a, d = bound, x.shape[-1]
        square = (projection * projection).sum(-1)
        phi = (1 - 4 * a) ** (d / 4) * (a * square + (1 - 4 * a) ** 0.5 * w - norm / 2).exp() / m**0.5
    elif kind == "relu":
        phi = w.clamp(min=0) + 1e-3
    else:
        known = "positive, hyperbolic, trigonometric, bounded or relu"
        raise ValueError(f"random features: kind = {kind!r}: must be {known}")
    return phi, torch.zeros_like(phi[..., 0])


def favor_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    projection: Tensor,
    *,
    kind: str = "positive",
    bound: Any = None,
    causal: bool = True,
    state: Any = None,
    lengths: Tensor | None = None,
    start: Tensor | None = None,
) -> tuple[Tensor, Any]:
    """Return FAVOR+ attention outputs (batch, heads, length, head_dim) and the sums after the call.

    q and k are scaled by head_dim ** -0.25 for softmax kernels. Arguments are those of `longspan.ops.favor_attention`.
    """
    more: dict[str, Any] = {"causal": causal, "state": state, "lengths": lengths, "start": start}
    generalized = kind == "relu"
    scale = 1.0 if generalized else q.shape[-1] ** -0.25
    phi_q, _ = favor_features(q * scale, projection, kind=kind, bound=bound)
    phi_k, log_scale = favor_features(k * scale, projection, kind=kind, bound=bound)
    if generalized:
        return linear_attention(phi_q, phi_k, v, **more)
    # sums are stored in units of a key's largest feature (trigonometric: of its common factor)
    if kind == "trigonometric":
        unit = (k * scale).square().sum(-1) / 2 - math.log(projection.shape[0]) / 2
    else:
        unit = phi_k.detach().amax(-1).log()
    return linear_attention(phi_q, phi_k / unit.exp()[..., None], v, log_scale=log_scale + unit, **more)
