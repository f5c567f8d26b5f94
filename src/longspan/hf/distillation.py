"""Divergence of next-token distributions, without the logits of a whole call."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from longspan.errors import UnsupportedError
from longspan.models.head import LOGIT_FIELDS

CHUNK = 512
"""Tokens whose logits exist at once, of each of the two models."""


def next_token_divergence(model: Any, teacher: Tensor, student: Tensor, chunk: int = CHUNK) -> Tensor:
    """Return the Kullback-Leibler divergence of the student's next-token distributions from the teacher's.

    Logits are computed for `chunk` tokens at a time, and computed again in the backward pass.

    Args:
        model: whose output layer both share.
        teacher: (tokens, dim) last hidden states; no gradient flows to them.
        student: (tokens, dim) last hidden states.
        chunk: number of tokens at a time.

    Returns:
        A scalar in nats, mean over tokens, in fp32 at least.

    Raises:
        UnsupportedError: the logits of this model are not those of its output layer.
    """
    head = output_layer(model)
    total = student.new_zeros((), dtype=torch.promote_types(student.dtype, torch.float32))
    for first in range(0, len(student), chunk):
        piece = slice(first, first + chunk)
        total = total + checkpoint(_divergence, head, teacher[piece], student[piece], use_reentrant=False)
    return total / max(len(student), 1)


def _divergence(head: Any, teacher: Tensor, student: Tensor) -> Tensor:
    """Return the divergence of some tokens, summed over them."""
    with torch.no_grad():
        target = head(teacher)
        target = F.log_softmax(target, -1, dtype=torch.promote_types(target.dtype, torch.float32))
    ours = F.log_softmax(head(student), -1, dtype=target.dtype)
    return F.kl_div(ours, target, reduction="sum", log_target=True)


def output_layer(model: Any) -> Any:
    """Return the output layer of a model; raises UnsupportedError if the model changes its logits afterwards."""
    head = model.get_output_embeddings()
    changed = [name for name in LOGIT_FIELDS if getattr(model.config, name, None) not in (None, 1, 1.0)]
    if head is None or changed:
        reason = f"its logits are changed by {changed[0]}" if changed else "it has no output layer"
        raise UnsupportedError(f"distillation: {reason}; leave the distillation out")
    return head
