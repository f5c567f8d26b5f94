"""The transformers configuration of the library's own models."""

from typing import Any

from transformers import PreTrainedConfig

from longspan.models import resolve_model


class LongspanConfig(PreTrainedConfig):
    """Configuration of a longspan model for `save_pretrained`, `AutoModel...` and `generate`.

    Args:
        model: the model table as in recipes: `kind` ("decoder", "masked_lm" or "encoder"; if omitted, the built class
            decides), the fields of `DecoderConfig` or `EncoderConfig`, and optionally `memory`. Unknown fields raise an
            error with the nearest name.
        vocab_size: number of token ids; overrides `model["vocab_size"]`.
        classifier_dropout: dropout before the head of a sequence classifier.

    Mixers are set in `model["mixers"]`, never in `layer_types`, which transformers checks against a closed list.
    """

    model_type = "longspan"
    # a list, as the Trainer adds to it; "cache" is the name from transformers 5.24 on
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # noqa: RUF012

    model: dict[str, Any] | None = None
    vocab_size: int = 256
    classifier_dropout: float = 0.0
    use_cache: bool = True
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        table = dict(self.model or {})
        if "vocab_size" in table and self.vocab_size == type(self).vocab_size:
            self.vocab_size = table["vocab_size"]
        self.model = resolve_model({**table, "vocab_size": self.vocab_size})
        # attributes that transformers tools read; weights are tied inside the model, where they are one tensor
        self.hidden_size = self.model["dim"]
        self.num_hidden_layers = self.model["num_layers"]
        self.num_attention_heads = self.model["num_heads"]
        self.tie_word_embeddings = False
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads"):
            kwargs.pop(name, None)
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]
