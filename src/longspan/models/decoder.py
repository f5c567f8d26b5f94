"""The causal language model."""

from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from longspan import renames
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
        state: the state that the previous call returned; None = empty past.
        mask: (batch, length) bool, True = real token.
        reset: (batch, length) bool, True = a new document starts here.
        aux_losses: a list to which auxiliary losses are appended.
        inputs_embeds: (batch, length, dim) instead of tokens.
        keep_state: False = return None instead of the next state, which some mechanisms (`lsh`, `routing`) then do not
            build: for training that carries none.

    Returns of a call:
        Logits (batch, length, vocab_size), zeros at padding, and the next state. With an adaptive softmax they are
        log-probabilities.
    """

    config: DecoderConfig

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config)
        # the output layer without its bias; None: it uses the embedding's weights
        self.output: nn.Module | None = AdaptiveSoftmax(config) if config.adaptive else None
        if not (config.adaptive or config.tie_embeddings):
            self.output = output = nn.Linear(config.hidden_dim, config.vocab_size, bias=False)
            sparse = config.init == "sparse"
            nn.init.zeros_(output.weight) if sparse else nn.init.normal_(output.weight, std=config.init_std)
        bias = torch.zeros(config.vocab_size) if config.output_bias and not config.adaptive else None
        self.output_bias = None if bias is None else nn.Parameter(bias)

    def _make_embedding(self) -> nn.Module:
        """Build the token embedding, an adaptive one if configured."""
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
        keep_state: bool = True,
        **old: Any,
    ) -> Any:
        """Return logits (batch, length, vocab_size) of tokens (batch, length), and the next state; see the class for
        arguments.

        `output` selects the result for `last`, `hidden` and `head`, which go through this call so that hooks are
        triggered. `old`: `penalties` and `give`, the names of `aux_losses` and `output` in version 0.1.
        """
        if old:
            call: dict[str, Any] = {
                "mask": mask,
                "reset": reset,
                "aux_losses": aux_losses,
                "inputs_embeds": inputs_embeds,
                "keep_state": keep_state,
            }
            call["output"] = None if output == "logits" else output
            return self(tokens, state, **renames.keywords("Decoder.forward", call, old))
        if output == "head":
            return self._head()
        with all_or_nothing():
            h, next_state, rows = self.run(tokens, state, mask, reset, aux_losses, inputs_embeds, keep_state=keep_state)
            if output == "hidden":
                return rows.scatter(h), next_state
            if output == "last":
                return self._head().logits(last_of_each_row(h, rows)), next_state
            return rows.scatter(self._head().logits(h)), next_state

    def logits(self, h: Tensor) -> Tensor:
        """Map hidden states (..., hidden_dim) to logits (..., vocab_size)."""
        return self.head().logits(h)

    def head(self) -> Head | CalledHead | AdaptiveHead:
        """Return the output layer, which uses the embedding's weights if they are tied."""
        return cast("Head | CalledHead | AdaptiveHead", self(output="head")) if is_hooked(self) else self._head()

    def output_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that only logits use, not hidden states."""
        own = [] if self.output is None else list(self.output.parameters())
        return own if self.output_bias is None else [*own, self.output_bias]

    def _head(self) -> Head | CalledHead | AdaptiveHead:
        """Build the output layer, without a module call."""
        if isinstance(self.output, AdaptiveSoftmax):
            return self.output.head(cast(AdaptiveEmbedding, self.embedding))
        if self.output is None:
            return Head(table_of(self.embedding, self.config.vocab_size), self.output_bias)
        return head_of(self.output, self.output_bias)

    def hidden(self, tokens: Tensor, state: StackState | None = None, **call: Any) -> tuple[Tensor, StackState | None]:
        """Return the last hidden states (batch, length, hidden_dim), zeros at padding, and the next state.

        Arguments are those of a call; `head` maps the hidden states to logits.
        """
        return cast("tuple[Tensor, StackState | None]", self(tokens, state, output="hidden", **call))

    def last(self, tokens: Tensor, state: StackState | None = None, **call: Any) -> tuple[Tensor, StackState | None]:
        """Return only the logits (batch, vocab_size) of each row's last real token, and the next state.

        The other logits are never computed. Zeros if a row has no real token in this call. Arguments are those of a
        call.
        """
        return cast("tuple[Tensor, StackState | None]", self(tokens, state, output="last", **call))

    def embed_flops(self, positions: int) -> int:
        """Return the FLOPs of embedding `positions` tokens: 0 unless the embedding is adaptive."""
        return self.embedding.flops(positions) if isinstance(self.embedding, AdaptiveEmbedding) else 0

    def output_flops(self, positions: int) -> int:
        """Return the FLOPs of the output layer at `positions` positions."""
        if isinstance(self.output, AdaptiveSoftmax):
            return self.output.flops(positions)
        return 2 * positions * self.config.hidden_dim * self.config.vocab_size


def last_of_each_row(h: Tensor, rows: BatchLayout) -> Tensor:
    """Return the hidden states (B, dim) of each row's last real token; zeros if there is none.

    Args:
        h: (B, N, dim) gathered hidden states.
        rows: layout of the call.
    """
    if not rows.length:
        return h.new_zeros(h.shape[0], h.shape[-1])
    count = rows.real_tokens()
    index = torch.arange(rows.batch, device=h.device)
    return h[index, (count - 1).clamp(min=0)].masked_fill((count == 0)[:, None], 0)
