"""Definition of FAVOR+: its features by the paper's formulas, and attention over their whole (query, key) matrix."""

import math
from typing import Any

import torch
from torch import Tensor

from longspan.engine.definitions.linear import linear_attention


def favor_features(
    x: Tensor, projection: Tensor, *, kind: str = "positive", bound: Any = None
) -> tuple[Tensor, Tensor]:
    """Features of a softmax kernel exp(x . y) and their log-scale (zeros): the paper's formulas, unstabilised.

    Choromanski et al. 2021, lemma 1 (positive, hyperbolic), equation 5 (trigonometric), section 2.1 (generalised);
    Likhosherstov et al. 2022 (bounded).
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
        raise ValueError(kind)
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
    """Attention by those features, q and k scaled by head_dim ** -0.25 where the kernel is softmax's."""
    more: dict[str, Any] = {"causal": causal, "state": state, "lengths": lengths, "start": start}
    generalised = kind == "relu"
    scale = 1.0 if generalised else q.shape[-1] ** -0.25
    phi_q, _ = favor_features(q * scale, projection, kind=kind, bound=bound)
    phi_k, log_scale = favor_features(k * scale, projection, kind=kind, bound=bound)
    if generalised:
        return linear_attention(phi_q, phi_k, v, **more)
    # sums are kept in units of the largest feature of a key (trigonometric: of its common factor)
    if kind == "trigonometric":
        unit = (k * scale).square().sum(-1) / 2 - math.log(projection.shape[0]) / 2
    else:
        unit = phi_k.detach().amax(-1).log()
    return linear_attention(phi_q, phi_k / unit.exp()[..., None], v, log_scale=log_scale + unit, **more)
