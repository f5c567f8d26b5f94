"""Masked LM: predicts masked tokens from bidirectional context."""

from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longspan.contract.maps import is_hooked, table_of
from longspan.errors import UnsupportedError
from longspan.models.blocks import make_norm
from longspan.models.config import EncoderConfig
from longspan.models.head import CalledHead, Head, head_of
from longspan.models.stack import Stack, StackState


class MaskedLM(Stack):
    """An encoder with a head that predicts the token at each position (Devlin et al. 2019, section 3.1 and appendix
    A.1).

    The head is a linear map, gelu, a norm, and the embedding's weights (or, with `tie_embeddings=False`, its own) with
    a bias. It is called like a `Decoder`, so that trainer and evaluation accept both; it is bidirectional, so there is
    never a state.

    Args of a call:
        tokens: (batch, length) token ids, some of them replaced, as the task decides.
        state: None.
        mask, reset, aux_losses, inputs_embeds: as of a `Decoder`; documents do not see each other.

    Returns of a call:
        Logits (batch, length, vocab_size), zeros at padding, and None.

    Raises of a call:
        UnsupportedError: a state was passed.
    """

    causal = False
    config: EncoderConfig

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config)
        self.transform = nn.Linear(config.hidden_dim, config.dim, bias=config.bias)
        self.transform_norm = make_norm(config)
        self.output = None if config.tie_embeddings else nn.Linear(config.dim, config.vocab_size, bias=False)
        self.output_bias = nn.Parameter(torch.zeros(config.vocab_size))
        for linear in (self.transform, self.output):
            if linear is not None:
                nn.init.normal_(linear.weight, std=config.init_std)
        if self.transform.bias is not None:
            nn.init.zeros_(self.transform.bias)

    def forward(
        self,
        tokens: Tensor | None = None,
        state: StackState | None = None,
        *,
        mask: Tensor | None = None,
        reset: Tensor | None = None,
        aux_losses: list[Tensor] | None = None,
        inputs_embeds: Tensor | None = None,
        output: Literal["logits", "hidden", "head"] = "logits",
    ) -> Any:
        """Return logits (batch, length, vocab_size) of masked tokens (batch, length), and None; see the class for
        arguments.

        `output` selects the result for `hidden` and `head`, which go through this call so that hooks are triggered.
        """
        if output == "head":
            return self._head()
        if state is not None:
            raise UnsupportedError("a masked language model is bidirectional and does not stream; pass state=None")
        h, _, rows = self.run(tokens, None, mask, reset, aux_losses, inputs_embeds)
        h = self._transformed(h)
        return rows.scatter(h if output == "hidden" else self._head().logits(h)), None

    def logits(self, h: Tensor) -> Tensor:
        """Map hidden states (..., hidden_dim) of the last norm to logits (..., vocab_size)."""
        return self.head().logits(self._transformed(h))

    def _transformed(self, h: Tensor) -> Tensor:
        """Apply the linear map, gelu and norm of the head."""
        return cast(Tensor, self.transform_norm(F.gelu(self.transform(h))))

    def head(self) -> Head | CalledHead:
        """Return the output layer, to be applied to what `hidden` returns."""
        return cast("Head | CalledHead", self(output="head")) if is_hooked(self) else self._head()

    def _head(self) -> Head | CalledHead:
        """Build the output layer, without a module call."""
        if self.output is None:
            return Head(table_of(self.embedding, self.config.vocab_size), self.output_bias)
        return head_of(self.output, self.output_bias)

    def hidden(self, tokens: Tensor, state: StackState | None = None, **call: Any) -> tuple[Tensor, None]:
        """Return the inputs (batch, length, dim) of the output layer, zeros at padding, and None;
        arguments as in a call.
        """
        return cast("tuple[Tensor, None]", self(tokens, state, output="hidden", **call))

    def output_flops(self, positions: int) -> int:
        """Return the FLOPs of the head at `positions` positions."""
        return 2 * positions * self.config.dim * (self.config.hidden_dim + self.config.vocab_size)
