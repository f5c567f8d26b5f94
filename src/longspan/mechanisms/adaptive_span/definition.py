"""Reference implementation of attention with a learned span (Adaptive Span), on the dense matrix of scores."""

import torch
from torch import Tensor

from longspan.engine.definitions.softmax import visible_keys


def adaptive_span_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    span: Tensor,
    *,
    ramp: int,
    window: int | None = None,
    include_self: bool = True,
    persistent: tuple[Tensor, Tensor] | None = None,
    scale: float | None = None,
    lengths: Tensor | None = None,
    start: Tensor | None = None,
    memory_lengths: Tensor | None = None,
) -> Tensor:
    """Return outputs (batch, heads, length, head_dim) of attention whose weights fall to zero at a learned span.

    m(x) = clamp((ramp + span - x) / ramp, 0, 1);  a_ij = m(i - j) exp(s_ij) / sum over j of m(i - j) exp(s_ij)

    (Sukhbaatar et al. 2019, section 2.2.) Arguments are those of `longspan.ops.adaptive_span_attention`.
    """
    visible = visible_keys(q, k, lengths=lengths, start=start, memory_lengths=memory_lengths)
    memory, group = k.shape[2] - q.shape[2], q.shape[1] // k.shape[1]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    distance = torch.arange(memory, memory + q.shape[2], device=q.device)[:, None]
    distance = distance - torch.arange(memory + q.shape[2], device=q.device)
    nearest = 0 if include_self else 1
    seen = visible & (distance >= nearest)
    if window is not None:
        seen = seen & (distance < nearest + window)
    reach = span[..., None, None] if span.ndim == 1 else span[..., None]
    mask = ((ramp + reach - distance) / ramp).clamp(0, 1)  # (heads or batch x heads, length, columns)
    seen = seen[:, None] & (mask > 0)
    # log m where m is 0 would make the span's gradient NaN, even though these entries are masked
    bias = torch.where(mask > 0, mask, torch.ones_like(mask)).log()
    scores = scale * (q @ k.transpose(-1, -2)) + bias
    real = torch.ones_like(visible[:, None, :, :1]) if lengths is None else visible[:, None].any(-1, keepdim=True)
    if persistent is not None:
        persistent_k, persistent_v = (t.repeat_interleave(group, 0).expand(q.shape[0], -1, -1, -1) for t in persistent)
        scores = torch.cat([scale * (q @ persistent_k.transpose(-1, -2)), scores], -1)
        seen = torch.cat([real.expand(*seen.shape[:3], persistent_k.shape[2]), seen], -1)
        v = torch.cat([persistent_v, v], 2)
    sees_nothing = ~seen.any(-1, keepdim=True)
    weights = scores.masked_fill(~(seen | sees_nothing), float("-inf")).softmax(-1).masked_fill(~seen, 0.0)
    return weights @ v
