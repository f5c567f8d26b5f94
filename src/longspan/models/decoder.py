"""The causal language model."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longspan.errors import UnsupportedError
from longspan.mixers import Rows
from longspan.models.config import DecoderConfig
from longspan.models.stack import Stack, StackState


class Head(NamedTuple):
    """What makes logits of the hidden states that a model's `hidden` gives: `hidden @ weight.T + bias`.

    Attributes:
        weight: (vocab_size, dim).
        bias: (vocab_size,) or None.
    """

    weight: Tensor
    bias: Tensor | None = None


def linear_head(module: Any) -> Head:
    """The head of a foreign model.

    Raises:
        UnsupportedError: it has none, or one that is no plain linear map.
    """
    if type(module) is not nn.Linear:
        found = "no output layer" if module is None else f"an output layer of type {type(module).__name__}"
        raise UnsupportedError(f"the loss in chunks needs a linear output layer; this model has {found}")
    return Head(module.weight, module.bias)


class Decoder(Stack):
    """A causal language model of any mixers.

    Args of a call:
        tokens: (batch, length) token ids.
        state: what the last call returned; None = empty past.
        mask: (batch, length) bool, True = real token.
        reset: (batch, length) bool, True = a new document starts here.
        penalties: a list to which auxiliary losses are appended.
        inputs_embeds: (batch, length, dim) in place of tokens.

    Returns of a call:
        Logits (batch, length, vocab_size), zeros at padding, and the next state.
    """

    config: DecoderConfig

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config)
        self.output = None if config.tie_embeddings else nn.Linear(config.hidden_dim, config.vocab_size, bias=False)
        self.output_bias = (
            nn.Parameter(self.embedding.weight.new_zeros(config.vocab_size)) if config.output_bias else None
        )
        if self.output is not None and config.init == "sparse":
            nn.init.zeros_(self.output.weight)
        elif self.output is not None:
            nn.init.normal_(self.output.weight, std=config.init_std)

    def forward(
        self,
        tokens: Tensor | None = None,
        state: StackState | None = None,
        *,
        mask: Tensor | None = None,
        reset: Tensor | None = None,
        penalties: list[Tensor] | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> tuple[Tensor, StackState | None]:
        """See the class."""
        h, following, rows = self.run(tokens, state, mask, reset, penalties, inputs_embeds)
        return rows.scatter(self.logits(h)), following

    def logits(self, h: Tensor) -> Tensor:
        """Hidden states (..., hidden_dim) to logits (..., vocab_size)."""
        return F.linear(h, *self.head())

    def head(self) -> Head:
        """The output layer: the embedding's weights where they are tied."""
        return Head(self.embedding.weight if self.output is None else self.output.weight, self.output_bias)

    def hidden(
        self,
        tokens: Tensor,
        state: StackState | None = None,
        *,
        mask: Tensor | None = None,
        reset: Tensor | None = None,
        penalties: list[Tensor] | None = None,
    ) -> tuple[Tensor, StackState | None]:
        """Like a call, but what logits are made of: hidden states (batch, length, hidden_dim), zeros at padding."""
        h, following, rows = self.run(tokens, state, mask, reset, penalties)
        return rows.scatter(h), following

    def last(
        self,
        tokens: Tensor,
        state: StackState | None = None,
        *,
        mask: Tensor | None = None,
        reset: Tensor | None = None,
    ) -> tuple[Tensor, StackState | None]:
        """Like a call, but only the logits (batch, vocab_size) of each row's last real token: those of the others are
        never computed. Zeros where a row has no real token in this call.
        """
        h, following, rows = self.run(tokens, state, mask, reset, None)
        return self.logits(last_of_each_row(h, rows)), following

    def flops(self, length: int, *, batch_size: int = 1) -> int:
        """FLOPs (2 per multiply-add) of one forward of `length` tokens from an empty past, logits included."""
        return super().flops(length, batch_size=batch_size) + (
            2 * batch_size * length * self.config.hidden_dim * self.config.vocab_size
        )


def last_of_each_row(h: Tensor, rows: Rows) -> Tensor:
    """h (B, N, dim) to (B, dim): the last real token of each row, zeros where there is none."""
    if not rows.length:
        return h.new_zeros(h.shape[0], h.shape[-1])
    count = rows.real_tokens()
    index = torch.arange(rows.batch, device=h.device)
    return h[index, (count - 1).clamp(min=0)].masked_fill((count == 0)[:, None], 0)
