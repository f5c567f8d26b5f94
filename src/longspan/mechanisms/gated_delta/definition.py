"""Reference implementation of the gated delta rule: the recurrence, token by token, in fp64."""

import torch
from torch import Tensor


def gated_delta_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    strength: Tensor,
    *,
    state: Tensor | None = None,
    lengths: Tensor | None = None,
    start: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the recurrence token by token; return outputs (batch, heads, length, value_dim) and the final memory S.

        S_t = a_t (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T,    o_t = q_t S_t

    (Yang et al. 2024, equation 10.) Arguments and shapes are those of `longspan.ops.gated_delta_attention`.
    """
    batch, kv_heads, length, width = k.shape
    group = q.shape[1] // kv_heads
    memory = k.new_zeros(batch, kv_heads, width, v.shape[3]) if state is None else state
    memory, unit = memory.double(), torch.eye(width, dtype=torch.float64, device=k.device)
    outputs = []
    for t in range(length):
        key, value = k[:, :, t].double()[..., None], v[:, :, t].double()[..., None]
        a, b = (gate[:, :, t].double()[..., None, None] for gate in (log_decay.exp(), strength))
        past = memory if start is None else torch.where((start[:, t] == t)[:, None, None, None], 0.0, memory)
        after = a * (unit - b * key @ key.mT) @ past + b * key @ value.mT
        memory = after if lengths is None else torch.where((t < lengths)[:, None, None, None], after, memory)
        query = q[:, :, t].double()[:, :, None]
        outputs.append(query @ memory.repeat_interleave(group, 1))
    out = torch.cat(outputs, 2) if outputs else q.new_zeros(*q.shape[:3], v.shape[3])
    return out.to(v.dtype), memory.to(torch.promote_types(v.dtype, torch.float32))


def short_convolution(x: Tensor, weight: Tensor, *, past: Tensor | None = None, start: Tensor | None = None) -> Tensor:
    """Return the causal depthwise convolution y_t = sum_j w_j x_{t-j}, token by token, within t's document.

    x and y are (batch, heads, length, dim); arguments are those of `longspan.ops.short_convolution`.
    """
    taps, length = weight.shape[2], x.shape[2]
    past = x.new_zeros(*x.shape[:2], taps - 1, x.shape[3]) if past is None else past
    columns, outputs = torch.cat([past, x], 2).double(), []
    for t in range(length):
        total = torch.zeros_like(x[:, :, 0], dtype=torch.float64)
        for j in range(taps):
            in_document = torch.ones_like(x[:, 0, 0, 0], dtype=torch.bool) if start is None else t - j >= start[:, t]
            total = total + torch.where(
                in_document[:, None, None], weight[:, :, taps - 1 - j] * columns[:, :, taps - 1 + t - j], 0
            )
        outputs.append(total)
    out = torch.stack(outputs, 2) if outputs else torch.zeros_like(x)
    return out.to(torch.promote_types(x.dtype, torch.float32))
