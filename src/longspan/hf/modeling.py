"""The library's own models as models of transformers: `generate`, `Trainer`, `pipeline`, `save_pretrained`."""

import contextlib
import dataclasses
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from longspan.contract.gradients import with_gradients
from longspan.errors import ConfigError, UnsupportedError
from longspan.hf.cache import CACHE, StateLayer, on_device, take_cache
from longspan.hf.config import LongspanConfig
from longspan.hf.generation import StateGeneration
from longspan.hf.keywords import LOSS_KEYWORDS, known_keywords, settle_keywords
from longspan.hf.losses import classification_loss, counting, next_labels, share_of_step, with_auxiliary
from longspan.hf.outputs import (
    LongspanCausalOutput,
    LongspanClassifierOutput,
    LongspanMaskedOutput,
    auxiliary,
    kept_columns,
    take_options,
)
from longspan.hf.positions import PACKING, Documents, Past, documents
from longspan.mixers import BatchLayout
from longspan.models import Decoder, RecurrentMemory, build_model, describe_model
from longspan.models.tables import as_kind
from longspan.state import all_or_nothing

_LOGGER: Any = logging.get_logger(__name__)


def _built(config: LongspanConfig, kinds: tuple[str, ...]) -> nn.Module:
    assert config.model is not None
    table = dict(config.model)
    if table["kind"] not in kinds:
        # the table names no kind: what is built decides
        table = as_kind(table, kinds[0])
    # a recurrent memory looks at what its backbone returns, which tensors without data cannot say
    with torch.device("cpu") if "memory" in table else contextlib.nullcontext():
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
    # attention is scaled_dot_product_attention wherever a mechanism's parts are dense
    _supports_sdpa = True
    _no_split_modules = ["Block"]  # noqa: RUF012 - an instance variable of the base
    kinds: tuple[str, ...] = ()
    loss_kind = ""
    auxiliary_is_read = False
    _flush = False

    def __init__(self, config: LongspanConfig, model: nn.Module | None = None) -> None:
        super().__init__(config)
        # transformers reads it from the name of the class, which a derived class need not keep
        self.loss_type = self.loss_kind
        self.model: Any = _built(config, self.kinds) if model is None else model
        self._heads()
        self.post_init()  # type: ignore[no-untyped-call]

    def _heads(self) -> None:
        """What a class has beside the model."""

    @classmethod
    def wrap(cls, model: nn.Module, *, tokenizer: Any = None, **options: Any) -> Any:
        """A model of longspan, as it is, as one of transformers.

        Args:
            model: a Decoder, a RecurrentMemory over one, a MaskedLM or an Encoder, as the class needs.
            tokenizer: of longspan, whose begin and end tokens `generate` is to know.
            options: of `LongspanConfig`.
        """
        table = describe_model(model)
        if table["kind"] not in cls.kinds:
            raise ConfigError(f"{cls.__name__} holds a model of kind {' or '.join(cls.kinds)}, not {table['kind']}")
        if tokenizer is not None:
            ends = tokenizer.ends[0] if len(tokenizer.ends) == 1 else list(tokenizer.ends)
            options = {"bos_token_id": tokenizer.begin, "eos_token_id": ends} | options
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
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        size = self.config.vocab_size
        assert self.config.model is not None
        self.config.model = {**self.config.model, "vocab_size": size}
        stack = self._stack
        stack.config = dataclasses.replace(stack.config, vocab_size=size)
        if getattr(stack, "output_bias", None) is not None:
            old = stack.output_bias
            padded = F.pad(old.data, (0, max(size - len(old), 0)))[:size].clone()
            stack.output_bias = nn.Parameter(padded, requires_grad=old.requires_grad)
        return embeddings

    @property
    def _stack(self) -> Any:
        """The embeddings and blocks, below a recurrent memory too."""
        return getattr(self.model, "backbone", self.model)

    def _read(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        packing: dict[str, Any],
        keywords: dict[str, Any],
        past: Past | None = None,
        state: Any = None,
        *,
        labels: Tensor | None,
        hidden_states: bool,
    ) -> "_Read":
        """Run the model without its head; unknown keywords are refused.

        Args:
            input_ids, inputs_embeds: of the call.
            packing: its attention_mask, mask, reset and position_ids.
            keywords: those that its signature does not name; what is read here is taken out.
            past, state: what the rows hold already; None = nothing.
            labels: of the call; without any, the loss may still be made outside of the model.
            hidden_states: return those of all layers.
        """
        inputs = _inputs(input_ids, inputs_embeds)
        packing |= {name: keywords.pop(name) for name in PACKING if name in keywords}
        losses = LOSS_KEYWORDS if self.loss_kind == "ForCausalLM" else LOSS_KEYWORDS - {"shift_labels"}
        settle_keywords(keywords, {*known_keywords(type(self).forward), *losses}, type(self).__name__)
        if past is None:
            past = Past(torch.zeros(inputs.shape[0], dtype=torch.int64, device=inputs.device), 0, None)
        packed = documents(inputs, past, packing)
        if packed.ahead and getattr(self._stack.config, "positions", None) in ("learned", "factorized"):
            raise UnsupportedError(
                "position_ids begin behind 0, but the learned positions of this model count the tokens of a document; "
                "leave position_ids out, or begin at 0 (padding goes by attention_mask)"
            )
        aux_losses: list[Tensor] | None = [] if self.training else None
        if isinstance(self.model, RecurrentMemory):
            if input_ids is None:
                raise UnsupportedError("a recurrent memory keeps the tokens of its open segment: give input_ids")
            if hidden_states:
                raise UnsupportedError(
                    "output_hidden_states: a recurrent memory runs its layers once a segment, memory tokens included; "
                    "model.model.hidden(tokens) gives the last hidden states"
                )
            call: dict[str, Any] = {"mask": packed.mask, "reset": packed.reset, "aux_losses": aux_losses}
            (h, seen), state, rows = self.model.run(input_ids, state, **call, flush=self._flush, traces=None)
            h, layers = h if seen is None else h.masked_fill(~seen, 0), None
        else:
            layer_inputs: list[Tensor] | None = [] if hidden_states else None
            with all_or_nothing():
                h, state, rows = self.model.run(
                    input_ids, state, packed.mask, packed.reset, aux_losses, inputs_embeds, inputs=layer_inputs
                )
            layers = None if layer_inputs is None else tuple(rows.scatter(hidden) for hidden in (*layer_inputs, h))
        if aux_losses and labels is None and "num_items_in_batch" in keywords and not self.auxiliary_is_read:
            _LOGGER.warning_once(
                "the Trainer took the labels away (label smoothing, or compute_loss_func), so the auxiliary losses of "
                "mixers are not trained; pass compute_loss_func=longspan.hf.TrainerLoss(model, label_smoothing=...)"
            )
        return _Read(packed, h, state, rows, layers, aux_losses)

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """Recompute blocks in the backward pass (always without re-entry)."""
        if not self._stack.config.reversible:  # whose blocks are recomputed in any case
            self._stack.config = dataclasses.replace(self._stack.config, checkpoint=True)

    # as the newest versions of transformers call it
    _activation_checkpointing_enable = gradient_checkpointing_enable

    def gradient_checkpointing_disable(self) -> None:
        """Keep activations."""
        self._stack.config = dataclasses.replace(self._stack.config, checkpoint=False)

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether blocks are recomputed."""
        return bool(self._stack.config.checkpoint or self._stack.config.reversible)

    is_activation_checkpointing = is_gradient_checkpointing


class _Read(NamedTuple):
    """What a call has read.

    Attributes:
        documents: padding and documents.
        hidden: (B, N, dim) last hidden states, gathered.
        state: the next one.
        rows: where the real tokens are.
        layers: (B, N, dim) hidden states before each layer and at the end, zeros at padding; None = not wanted.
        aux_losses: auxiliary losses; None where the model does not train.
    """

    documents: Documents
    hidden: Tensor
    state: Any
    rows: BatchLayout
    layers: tuple[Tensor, ...] | None
    aux_losses: list[Tensor] | None


def _inputs(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
    inputs = input_ids if inputs_embeds is None else inputs_embeds
    if inputs is None:
        raise ConfigError("give input_ids or inputs_embeds")
    return inputs


# transformers looks for GenerationMixin among the direct bases
class LongspanForCausalLM(LongspanPreTrainedModel, StateGeneration, GenerationMixin):  # type: ignore[no-untyped-call]
    """A causal language model with a state in the place of the KV cache."""

    kinds = ("decoder",)
    loss_kind = "ForCausalLM"
    _is_stateful = True

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)  # type: ignore[no-untyped-call]
        register_causal(cls)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        *,
        position_ids: Tensor | None = None,
        mask: Tensor | None = None,
        reset: Tensor | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> LongspanCausalOutput | tuple[Any, ...]:
        """As causal models of transformers are called.

        Args:
            input_ids: (batch, length).
            attention_mask: (batch, length) or (batch, past + length), 1 for real tokens; padding anywhere.
            past_key_values, cache: what the last call returned, by either name.
            inputs_embeds: (batch, length, dim) in place of input_ids.
            labels: (batch, length), predicted from the tokens before them; -100 is left out. Auxiliary losses of the
                mixers are part of the loss in training.
            use_cache: return the state; default: where no labels are given.
            logits_to_keep: only so many of the last columns' logits; 0 = all. Or the indices (columns,) of those that
                are wanted.
            position_ids: (batch, length); a 0 among real tokens starts a document (packed rows), every other one must
                follow the one before it. For `cu_seq_lens_q` and `seq_idx` see `longspan.hf.positions`.
            mask: (batch, length) bool, True = real token: `attention_mask` as the library calls it.
            reset: (batch, length) bool, True = a new document starts here.

        `output_hidden_states=True` returns the hidden states before each layer and after the last norm, and
        `return_dict=False` a plain tuple.
        """
        options = take_options(kwargs, self.config)
        inputs = _inputs(input_ids, inputs_embeds)
        returns_cache = labels is None and bool(self.config.use_cache) if use_cache is None else use_cache
        carried = self._carried(
            take_cache({"cache": cache, "past_key_values": past_key_values}), returns_cache, use_cache
        )
        layer = None if carried is None else cast(StateLayer, carried.layers[0])
        read = self._read(
            input_ids,
            inputs_embeds,
            {"attention_mask": attention_mask, "mask": mask, "reset": reset, "position_ids": position_ids},
            kwargs,
            None if carried is None else self._past(carried, inputs),
            None if layer is None else on_device(layer.state, inputs.device),
            labels=labels,
            hidden_states=options.hidden_states,
        )
        if carried is not None and layer is not None:
            layer.advance(read.state, inputs.shape[1])
            carried.shift = read.documents.shift
            if carried.offloading:
                layer.offload()
            carried.end()
        loss, columns = None, kept_columns(logits_to_keep)
        if labels is None:
            real = None if read.documents.mask is None else read.documents.mask[:, columns]
            logits = self._logits(read.rows.scatter(read.hidden)[:, columns], real)
        else:
            logits = read.rows.scatter(self._logits(read.hidden))
            loss = self._loss(logits, labels, read.aux_losses, kwargs)
            logits = logits[:, columns]
        returned: dict[str, Any] = {CACHE: carried} if returns_cache else {}
        output = LongspanCausalOutput(
            loss=loss, logits=logits, hidden_states=read.layers, aux_loss=auxiliary(read.aux_losses), **returned
        )
        return output.to_tuple() if options.as_tuple else output

    def _loss(
        self, logits: Tensor, labels: Tensor, aux_losses: list[Tensor] | None, keywords: dict[str, Any]
    ) -> Tensor:
        """Of the next tokens, with the auxiliary losses of the mixers."""
        loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **keywords)
        scored = next_labels(labels, keywords.get("shift_labels"))
        return with_auxiliary(loss, aux_losses, share_of_step(scored, **counting(keywords)))

    def _logits(self, h: Tensor, real: Tensor | None = None) -> Tensor:
        """Hidden states (B, N, dim) to logits, zeros where `real` (B, N) is False."""
        memory = isinstance(self.model, RecurrentMemory)
        logits: Tensor = self.model.adapter.output(h) if memory else self.model.logits(h)
        return logits if real is None else logits.masked_fill(~real[..., None], 0)


def register_causal(cls: type[LongspanForCausalLM]) -> None:
    """Tell the Trainer that a class predicts the next token: with label smoothing (or a loss of the user's own) it
    takes the labels away, and shifts them itself for models whose class is named in this table only.
    """
    known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if cls.__name__ not in known.values():
        # keys that are no model type of transformers are never looked up
        known[f"{cls.config_class.model_type}:{cls.__name__}"] = cls.__name__


register_causal(LongspanForCausalLM)


class _WholeTexts(LongspanPreTrainedModel):  # type: ignore[no-untyped-call]
    """What models share that read whole texts in one call and keep no state."""

    output_class: type[Any]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        position_ids: Tensor | None = None,
        mask: Tensor | None = None,
        reset: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Logits, and the loss where labels are given; arguments as of `LongspanForCausalLM`.

        Documents of one row (`position_ids`, `reset`, ...) do not see each other.
        """
        options = take_options(kwargs, self.config)
        packing = {"attention_mask": attention_mask, "mask": mask, "reset": reset, "position_ids": position_ids}
        read = self._read(input_ids, inputs_embeds, packing, kwargs, labels=labels, hidden_states=options.hidden_states)
        logits, loss, aux_losses = self._logits(read.hidden, read.rows), None, read.aux_losses
        if labels is not None:
            loss = self._loss(logits, labels, kwargs)
            loss = with_auxiliary(loss, aux_losses, share_of_step(labels, **counting(kwargs)))
        output = self.output_class(loss=loss, logits=logits, hidden_states=read.layers, aux_loss=auxiliary(aux_losses))
        return output.to_tuple() if options.as_tuple else output

    def _logits(self, h: Tensor, rows: BatchLayout) -> Tensor:
        """Of hidden states (B, N, dim), gathered."""
        raise NotImplementedError

    def _loss(self, logits: Tensor, labels: Tensor, keywords: dict[str, Any]) -> Tensor:
        raise NotImplementedError


class LongspanForMaskedLM(_WholeTexts):  # type: ignore[no-untyped-call]
    """A masked language model: logits at every place, the loss over the places whose label is not -100."""

    kinds = ("masked_lm",)
    loss_kind = "ForMaskedLM"
    output_class = LongspanMaskedOutput

    def _logits(self, h: Tensor, rows: BatchLayout) -> Tensor:
        return rows.scatter(self.model.logits(h))

    def _loss(self, logits: Tensor, labels: Tensor, keywords: dict[str, Any]) -> Tensor:
        loss: Tensor = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **keywords)
        return loss


class LongspanForSequenceClassification(_WholeTexts):  # type: ignore[no-untyped-call]
    """A classifier: of the mean over real tokens of an encoder, or of the last real token of a decoder.

    Logits (batch, num_labels); the loss by `config.problem_type`, see `longspan.hf.losses`.
    """

    kinds = ("encoder", "decoder")
    _flush = True
    loss_kind = "ForSequenceClassification"
    output_class = LongspanClassifierOutput

    def _heads(self) -> None:
        config = self.config
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.score = nn.Linear(self._stack.config.hidden_dim, config.num_labels or 2)
        nn.init.normal_(self.score.weight, std=0.02)
        nn.init.zeros_(self.score.bias)

    def _logits(self, h: Tensor, rows: BatchLayout) -> Tensor:
        pooled = self._pooled(h, rows)
        if isinstance(self._stack, Decoder):
            pooled = with_gradients(pooled, self._stack.output_parameters())  # nothing makes logits of tokens
        logits: Tensor = self.score(self.dropout(pooled))
        return logits

    def _loss(self, logits: Tensor, labels: Tensor, keywords: dict[str, Any]) -> Tensor:
        return classification_loss(self.loss_function, logits, labels, self.config, **counting(keywords))

    def _pooled(self, h: Tensor, rows: BatchLayout) -> Tensor:
        """What the head reads (batch, hidden_dim); zeros where a row has no real token."""
        columns, count = torch.arange(h.shape[1], device=h.device), rows.real_tokens()[:, None]
        inside = columns == count - 1 if self._stack.causal else columns < count
        total = h.masked_fill(~inside[..., None], 0).sum(1)
        return total / inside.sum(1, keepdim=True).clamp(min=1).to(h.dtype)
