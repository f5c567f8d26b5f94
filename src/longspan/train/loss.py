"""The loss of next-token prediction.

A target never lies in another document: a document's first token is predicted from the begin token that it is given
(`longspan.tasks`), its last token predicts nothing, so no prediction crosses a border and none is lost.
"""

from torch import Tensor
from torch.nn import functional


def token_nats(logits: Tensor, targets: Tensor) -> Tensor:
    """(batch, length) negative log-likelihood of each target in nats, in fp32 at least.

    Args:
        logits: (batch, length, vocabulary).
        targets: (batch, length) int64.
    """
    wide = logits if logits.element_size() >= 4 else logits.float()
    return functional.cross_entropy(wide.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)


def next_token_loss(logits: Tensor, targets: Tensor, graded: Tensor | None = None) -> Tensor:
    """Sum of the nats of all targets that count (`graded` (batch, length) bool; None: all); a scalar with a graph."""
    nats = token_nats(logits, targets)
    return nats.sum() if graded is None else nats.masked_fill(~graded, 0).sum()
