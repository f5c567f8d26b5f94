"""The library's own models as models of transformers: `generate`, `Trainer`, `pipeline`, `save_pretrained`."""

import dataclasses
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast, MaskedLMOutput, SequenceClassifierOutput

from longspan.errors import ConfigError, UnsupportedError
from longspan.hf.cache import StateCache, StateLayer
from longspan.hf.config import LongspanConfig
from longspan.mixers import with_penalties
from longspan.mixers.gradients import with_gradients
from longspan.models import Decoder, build_model, describe_model
from longspan.models.tables import as_kind


def _built(config: LongspanConfig, kinds: tuple[str, ...]) -> nn.Module:
    assert config.model is not None
    table = dict(config.model)
    if table["kind"] not in kinds:
        # the table names no kind: what is built decides
        table = as_kind(table, kinds[0])
    if "memory" not in table:
        return cast(nn.Module, build_model(table))
    # a recurrent memory looks at what its backbone returns, which tensors without data cannot say
    with torch.device("cpu"):
        return cast(nn.Module, build_model(table))


class LongspanPreTrainedModel(PreTrainedModel):  # type: ignore[no-untyped-call]
    """What the three classes share: `model`, a model of longspan, initialised by itself."""

    config_class = LongspanConfig
    config: LongspanConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    # of mechanisms whose keys are their queries, as earlier versions saved them
    _keys_to_ignore_on_load_unexpected = [r"projections\.k_proj\."]  # noqa: RUF012
    _no_split_modules = ["Block"]  # noqa: RUF012
    kinds: tuple[str, ...] = ()

    def __init__(self, config: LongspanConfig, model: nn.Module | None = None) -> None:
        super().__init__(config)
        self.model: Any = _built(config, self.kinds) if model is None else model
        self._heads()
        self.post_init()  # type: ignore[no-untyped-call]

    def _heads(self) -> None:
        """What a class has beside the model."""

    @classmethod
    def wrap(cls, model: nn.Module, **options: Any) -> Any:
        """A model of longspan, as it is, as one of transformers.

        Args:
            model: a Decoder, a RecurrentMemory over one, a MaskedLM or an Encoder, as the class needs.
            options: of `LongspanConfig`.
        """
        table = describe_model(model)
        if table["kind"] not in cls.kinds:
            raise ConfigError(f"{cls.__name__} holds a model of kind {' or '.join(cls.kinds)}, not {table['kind']}")
        return cls(LongspanConfig(model=table, **options), model)

    def init_weights(self) -> None:
        """Nothing: models of longspan initialise themselves."""

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return cast(nn.Module, self._stack.embedding)

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Another token embedding."""
        self._stack.embedding = value

    def get_output_embeddings(self) -> nn.Module | None:
        """The output map, where it is one of its own and a linear one."""
        output = getattr(self._stack, "output", None)
        return output if isinstance(output, nn.Module) and hasattr(output, "out_features") else None

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Another output map."""
        self._stack.output = value

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; the model's own table follows.

        Raises:
            UnsupportedError: the embeddings are adaptive, whose vocabulary is fixed.
        """
        if getattr(self._stack.config, "adaptive", False):
            raise UnsupportedError("adaptive embeddings (adaptive_cutoffs, embedding_dim) have a fixed vocabulary")
        found = super().resize_token_embeddings(*args, **kwargs)
        size = self.config.vocab_size
        assert self.config.model is not None
        self.config.model = {**self.config.model, "vocab_size": size}
        stack = self._stack
        stack.config = dataclasses.replace(stack.config, vocab_size=size)
        if getattr(stack, "output_bias", None) is not None:
            old = stack.output_bias.data
            stack.output_bias = nn.Parameter(F.pad(old, (0, max(size - len(old), 0)))[:size])
        return found

    @property
    def _stack(self) -> Any:
        """The embeddings and blocks, below a recurrent memory too."""
        return getattr(self.model, "backbone", self.model)

    def _penalties(self, labels: Tensor | None) -> list[Tensor] | None:
        """A list for auxiliary losses, where this call trains."""
        return [] if self.training and labels is not None else None

    def _activation_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        self._stack.config = dataclasses.replace(self._stack.config, checkpoint=True)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Any = None, **kwargs: Any) -> None:
        """Recompute blocks in the backward pass (always without re-entry)."""
        self._activation_checkpointing_enable()

    def gradient_checkpointing_disable(self) -> None:
        """Keep activations."""
        self._stack.config = dataclasses.replace(self._stack.config, checkpoint=False)

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether blocks are recomputed."""
        return bool(self._stack.config.checkpoint)


class LongspanForCausalLM(LongspanPreTrainedModel, GenerationMixin):  # type: ignore[no-untyped-call]
    """A causal language model with a state in the place of the KV cache."""

    kinds = ("decoder",)
    _is_stateful = True

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """As causal models of transformers are called.

        Args:
            input_ids: (batch, length).
            attention_mask: (batch, length) or (batch, past + length), 1 for real tokens; padding anywhere.
            past_key_values: what the last call returned.
            inputs_embeds: (batch, length, dim) in place of input_ids.
            labels: (batch, length), predicted from the tokens before them; -100 is left out. Auxiliary losses of the
                mixers are part of the loss in training.
            use_cache: return the state; default: where no labels are given.
            logits_to_keep: only so many of the last columns' logits; 0 = all.
        """
        given = input_ids if inputs_embeds is None else inputs_embeds
        if given is None:
            raise ConfigError("give input_ids or inputs_embeds")
        cache = past_key_values
        if cache is not None and not isinstance(cache, StateCache):
            if cache.get_seq_length():
                raise ConfigError("past_key_values: this model carries a longspan state, not keys and values")
            cache = None
        use_cache = (labels is None and self.config.use_cache) if use_cache is None else use_cache
        if cache is None and use_cache and self.model.traits.streams:
            cache = StateCache([True])
        mask = None if attention_mask is None else attention_mask[:, -given.shape[1] :].bool()
        layer = None if cache is None else cast(StateLayer, cache.layers[0])
        penalties = self._penalties(labels)
        logits, state = self.model(
            input_ids,
            None if layer is None else layer.state,
            mask=mask,
            penalties=penalties,
            **({} if inputs_embeds is None else {"inputs_embeds": inputs_embeds}),
        )
        if layer is not None:
            layer.advance(state, given.shape[1])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
            loss = with_penalties(loss, penalties)
        if logits_to_keep:
            logits = logits[:, -logits_to_keep:]
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache if use_cache else None)

    def _prepare_cache_for_generation(  # type: ignore[override]
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any
    ) -> None:
        """A state in the place of keys and values."""
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            if not self.model.traits.streams:
                raise UnsupportedError(f"{self.model.why_no_stream()}; generate with use_cache=False")
            model_kwargs["past_key_values"] = StateCache([True])


class LongspanForMaskedLM(LongspanPreTrainedModel):  # type: ignore[no-untyped-call]
    """A masked language model."""

    kinds = ("masked_lm",)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> MaskedLMOutput:
        """Logits at every place; the loss over the places whose label is not -100."""
        mask = None if attention_mask is None else attention_mask.bool()
        penalties = self._penalties(labels)
        logits, _ = self.model(input_ids, mask=mask, penalties=penalties, inputs_embeds=inputs_embeds)
        loss = None
        if labels is not None:
            loss = with_penalties(F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten()), penalties)
        return MaskedLMOutput(loss=loss, logits=logits)


class LongspanForSequenceClassification(LongspanPreTrainedModel):  # type: ignore[no-untyped-call]
    """A classifier: of the mean over real tokens of an encoder, or of the last real token of a decoder."""

    kinds = ("encoder", "decoder")

    def _heads(self) -> None:
        config = self.config
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.score = nn.Linear(self._stack.config.hidden_dim, config.num_labels or 2)
        nn.init.normal_(self.score.weight, std=0.02)
        nn.init.zeros_(self.score.bias)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """Logits (batch, num_labels); the loss is cross entropy, or the squared error where there is one label."""
        mask = None if attention_mask is None else attention_mask.bool()
        penalties = self._penalties(labels)
        h, _, rows = self.model.run(input_ids, None, mask, None, penalties, inputs_embeds)
        inside = torch.arange(h.shape[1], device=h.device) < rows.real_tokens()[:, None]
        if self.model.causal:
            inside = inside & (torch.arange(h.shape[1], device=h.device) == rows.real_tokens()[:, None] - 1)
        weight = inside.to(h.dtype)[..., None]
        pooled = (h.masked_fill(~inside[..., None], 0)).sum(1) / weight.sum(1).clamp(min=1)
        if isinstance(self.model, Decoder):
            pooled = with_gradients(pooled, self.model.output_parameters())  # nothing makes logits of tokens
        logits = self.score(self.dropout(pooled))
        loss = None
        if labels is not None:
            single = self.config.num_labels == 1
            loss = F.mse_loss(logits[:, 0], labels.to(logits.dtype)) if single else F.cross_entropy(logits, labels)
            loss = with_penalties(loss, penalties)
        return SequenceClassifierOutput(loss=loss, logits=logits)
