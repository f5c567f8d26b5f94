"""The bidirectional encoder."""

from torch import Tensor

from longspan.models.config import EncoderConfig
from longspan.models.stack import Stack


class Encoder(Stack):
    """A bidirectional encoder of any mixers that have a bidirectional form.

    Args of a call:
        tokens, mask, reset, aux_losses, inputs_embeds: as of a `Decoder`; documents do not see each other.

    Returns of a call:
        Hidden states (batch, length, dim; twice that with `streams = "both"`), zeros at padding.
    """

    causal = False
    config: EncoderConfig

    def forward(
        self,
        tokens: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        reset: Tensor | None = None,
        aux_losses: list[Tensor] | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Encode token ids (batch, length) as hidden states (batch, length, dim), zeros at padding;
        see the class for arguments.
        """
        h, _, rows = self.run(tokens, None, mask, reset, aux_losses, inputs_embeds)
        return rows.scatter(h)
