"""The causal language model."""

from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from longspan.contract.maps import is_hooked, table_of
from longspan.mixers import BatchLayout
from longspan.models.adaptive import AdaptiveEmbedding, AdaptiveSoftmax
from longspan.models.config import DecoderConfig
from longspan.models.head import AdaptiveHead, CalledHead, Head, head_of
from longspan.models.stack import Stack, StackState
from longspan.state import all_or_nothing


class Decoder(Stack):
    """A causal language model of any mixers.

    Args of a call:
        tokens: (batch, length) token ids.
        state: what the last call returned; None = empty past.
        mask: (batch, length) bool, True = real token.
        reset: (batch, length) bool, True = a new document starts here.
        aux_losses: a list to which auxiliary losses are appended.
        inputs_embeds: (batch, length, dim) in place of tokens.

    Returns of a call:
        Logits (batch, length, vocab_size), zeros at padding, and the next state. Of an adaptive softmax they are
        log-probabilities.
    """

    config: DecoderConfig

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config)
        # what the output layer has of its own, its bias aside; None: the embedding's weights
        self.output: nn.Module | None = AdaptiveSoftmax(config) if config.adaptive else None
        if not (config.adaptive or config.tie_embeddings):
            self.output = output = nn.Linear(config.hidden_dim, config.vocab_size, bias=False)
            sparse = config.init == "sparse"
            nn.init.zeros_(output.weight) if sparse else nn.init.normal_(output.weight, std=config.init_std)
        bias = torch.zeros(config.vocab_size) if config.output_bias and not config.adaptive else None
        self.output_bias = None if bias is None else nn.Parameter(bias)

    def _make_embedding(self) -> nn.Module:
        return AdaptiveEmbedding(self.config) if self.config.adaptive else super()._make_embedding()

    def forward(
        self,
        tokens: Tensor | None = None,
        state: StackState | None = None,
        *,
        mask: Tensor | None = None,
        reset: Tensor | None = None,
        aux_losses: list[Tensor] | None = None,
        inputs_embeds: Tensor | None = None,
        output: Literal["logits", "last", "hidden", "head"] = "logits",
    ) -> Any:
        """See the class; `output` is for `last`, `hidden` and `head`, which are calls too so that hooks see them."""
        if output == "head":
            return self._head()
        with all_or_nothing():
            h, next_state, rows = self.run(tokens, state, mask, reset, aux_losses, inputs_embeds)
            if output == "hidden":
                return rows.scatter(h), next_state
            if output == "last":
                return self._head().logits(last_of_each_row(h, rows)), next_state
            return rows.scatter(self._head().logits(h)), next_state

    def logits(self, h: Tensor) -> Tensor:
        """Hidden states (..., hidden_dim) to logits (..., vocab_size)."""
        return self.head().logits(h)

    def head(self) -> Head | CalledHead | AdaptiveHead:
        """The output layer: the embedding's weights where they are tied."""
        return cast("Head | CalledHead | AdaptiveHead", self(output="head")) if is_hooked(self) else self._head()

    def output_parameters(self) -> list[nn.Parameter]:
        """See `Stack`."""
        own = [] if self.output is None else list(self.output.parameters())
        return own if self.output_bias is None else [*own, self.output_bias]

    def _head(self) -> Head | CalledHead | AdaptiveHead:
        if isinstance(self.output, AdaptiveSoftmax):
            return self.output.head(cast(AdaptiveEmbedding, self.embedding))
        if self.output is None:
            return Head(table_of(self.embedding, self.config.vocab_size), self.output_bias)
        return head_of(self.output, self.output_bias)

    def hidden(self, tokens: Tensor, state: StackState | None = None, **call: Any) -> tuple[Tensor, StackState | None]:
        """Like a call, but what logits are made of: hidden states (batch, length, hidden_dim), zeros at padding."""
        return cast("tuple[Tensor, StackState | None]", self(tokens, state, output="hidden", **call))

    def last(self, tokens: Tensor, state: StackState | None = None, **call: Any) -> tuple[Tensor, StackState | None]:
        """Like a call, but only the logits (batch, vocab_size) of each row's last real token: those of the others are
        never computed. Zeros where a row has no real token in this call.
        """
        return cast("tuple[Tensor, StackState | None]", self(tokens, state, output="last", **call))

    def embed_flops(self, positions: int) -> int:
        """See `Stack`."""
        return self.embedding.flops(positions) if isinstance(self.embedding, AdaptiveEmbedding) else 0

    def output_flops(self, positions: int) -> int:
        """See `Stack`."""
        if isinstance(self.output, AdaptiveSoftmax):
            return self.output.flops(positions)
        return 2 * positions * self.config.hidden_dim * self.config.vocab_size


def last_of_each_row(h: Tensor, rows: BatchLayout) -> Tensor:
    """h (B, N, dim) to (B, dim): the last real token of each row, zeros where there is none."""
    if not rows.length:
        return h.new_zeros(h.shape[0], h.shape[-1])
    count = rows.real_tokens()
    index = torch.arange(rows.batch, device=h.device)
    return h[index, (count - 1).clamp(min=0)].masked_fill((count == 0)[:, None], 0)
