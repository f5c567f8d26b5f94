"""The bidirectional encoder."""

from torch import Tensor

from longspan.models.config import EncoderConfig
from longspan.models.stack import Stack


class Encoder(Stack):
    """An encoder in which every token sees both sides, of any mixers that have a bidirectional form.

    Args of a call:
        tokens: (batch, length) token ids.
        mask: (batch, length) bool, True = real token.
        reset: (batch, length) bool, True = a new document starts here; documents do not see each other.
        penalties: a list to which auxiliary losses are appended.
        inputs_embeds: (batch, length, dim) in place of tokens.

    Returns of a call:
        Hidden states (batch, length, dim; twice that with `streams = "both"`), zeros at padding.
    """

    causal = False
    config: EncoderConfig

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config)

    def forward(
        self,
        tokens: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        reset: Tensor | None = None,
        penalties: list[Tensor] | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """See the class."""
        h, _, rows = self.run(tokens, None, mask, reset, penalties, inputs_embeds)
        return rows.scatter(h)
