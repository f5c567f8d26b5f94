"""The library's own models as transformers models: `generate`, `Trainer`, `pipeline`, `save_pretrained`."""

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
from longspan.hf.keywords import LOSS_KEYWORDS, check_keywords, known_keywords
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
    """Build the longspan model of a configuration; one of `kinds` is required, the first is the default."""
    assert config.model is not None
    table = dict(config.model)
    if table["kind"] not in kinds:
        # the table has no kind, so the class decides
        table = as_kind(table, kinds[0])
    # building a recurrent memory runs its backbone, which needs tensors with data
    with torch.device("cpu") if "memory" in table else contextlib.nullcontext():
        return cast(nn.Module, build_model(table))


class LongspanPreTrainedModel(PreTrainedModel):  # type: ignore[no-untyped-call]
    """Base of the three model classes: holds a longspan model in `model`, which initializes itself."""

    config_class = LongspanConfig
    config: LongspanConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    # earlier versions saved an unused k_proj for mechanisms whose queries also serve as keys
    _keys_to_ignore_on_load_unexpected = [r"projections\.k_proj\."]  # noqa: RUF012
    # mechanisms use scaled_dot_product_attention where they are dense
    _supports_sdpa = True
    _no_split_modules = ["Block"]  # noqa: RUF012 - an instance variable of the base
    kinds: tuple[str, ...] = ()
    loss_kind = ""
    auxiliary_is_read = False
    _flush = False

    def __init__(self, config: LongspanConfig, model: nn.Module | None = None) -> None:
        super().__init__(config)
        # transformers derives it from the name of the class, which a subclass may change
        self.loss_type = self.loss_kind
        self.model: Any = _built(config, self.kinds) if model is None else model
        self._heads()
        self.post_init()  # type: ignore[no-untyped-call]

    def _heads(self) -> None:
        """Add the layers that a class has in addition to the model."""

    @classmethod
    def wrap(cls, model: nn.Module, *, tokenizer: Any = None, **options: Any) -> Any:
        """Wrap an existing longspan model as a transformers model.

        Args:
            model: a Decoder, a RecurrentMemory over one, a MaskedLM or an Encoder, as the class needs.
            tokenizer: a longspan tokenizer, whose begin and end tokens `generate` should use.
            options: of `LongspanConfig`.
        """
        table = describe_model(model)
        if table["kind"] not in cls.kinds:
            raise ConfigError(f"{cls.__name__}: needs a model of kind {' or '.join(cls.kinds)}, not {table['kind']}")
        if tokenizer is not None:
            ends = tokenizer.ends[0] if len(tokenizer.ends) == 1 else list(tokenizer.ends)
            options = {"bos_token_id": tokenizer.begin, "eos_token_id": ends} | options
        return cls(LongspanConfig(model=table, **options), model)

    def init_weights(self) -> None:
        """Do nothing, because models of longspan initialize themselves."""

    def get_input_embeddings(self) -> nn.Module:
        """Return the token embedding."""
        return cast(nn.Module, self._stack.embedding)

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embedding."""
        self._stack.embedding = value

    def get_output_embeddings(self) -> nn.Module | None:
        """Return the output map if it is a separate linear map; None otherwise."""
        output = getattr(self._stack, "output", None)
        return output if isinstance(output, nn.Module) and hasattr(output, "out_features") else None

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Replace the output map."""
        self._stack.output = value

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        """Resize the vocabulary as in transformers, and update the model's own configuration and output bias.

        Raises:
            UnsupportedError: the embeddings are adaptive, whose vocabulary is fixed.
        """
        if getattr(self._stack.config, "adaptive", False):
            raise UnsupportedError(
                "resize_token_embeddings: adaptive embeddings (adaptive_cutoffs, embedding_dim) have a fixed "
                "vocabulary; build a model with another vocab_size"
            )
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
        """The embeddings and blocks, also inside a recurrent memory."""
        return getattr(self.model, "backbone", self.model)

    def _run_backbone(
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
    ) -> "_BackboneOutput":
        """Run the model without its head, after checking the keywords.

        Args:
            input_ids, inputs_embeds: (batch, length) or (batch, length, dim); exactly one is used.
            packing: attention_mask, mask, reset and position_ids of the call.
            keywords: those that the signature does not name; the ones used here are removed.
            past, state: tokens and state of earlier calls; None = empty past.
            labels: of the call; None = if the Trainer computes the loss instead, warn once that auxiliary losses are
                not trained.
            hidden_states: return those of all layers.
        """
        inputs = _inputs(input_ids, inputs_embeds)
        packing |= {name: keywords.pop(name) for name in PACKING if name in keywords}
        losses = LOSS_KEYWORDS if self.loss_kind == "ForCausalLM" else LOSS_KEYWORDS - {"shift_labels"}
        check_keywords(keywords, {*known_keywords(type(self).forward), *losses}, type(self).__name__)
        if past is None:
            past = Past(torch.zeros(inputs.shape[0], dtype=torch.int64, device=inputs.device), 0, None)
        packed = documents(inputs, past, packing)
        if packed.ahead and getattr(self._stack.config, "positions", None) in ("learned", "factorized"):
            raise UnsupportedError(
                "position_ids: a document starts after 0, but the learned positions of this model start at 0; leave "
                "position_ids out, or start at 0 (padding is marked by attention_mask)"
            )
        aux_losses: list[Tensor] | None = [] if self.training else None
        if isinstance(self.model, RecurrentMemory):
            if input_ids is None:
                raise UnsupportedError("inputs_embeds: a recurrent memory stores token ids; pass input_ids instead")
            if hidden_states:
                raise UnsupportedError(
                    "output_hidden_states: a recurrent memory runs its layers once per segment, with memory tokens; "
                    "use model.model.hidden(tokens) for the last hidden states"
                )
            call: dict[str, Any] = {"mask": packed.mask, "reset": packed.reset, "aux_losses": aux_losses}
            (h, is_scored), state, rows = self.model.run(input_ids, state, **call, flush=self._flush, traces=None)
            h, layers = h if is_scored is None else h.masked_fill(~is_scored, 0), None
        else:
            layer_inputs: list[Tensor] | None = [] if hidden_states else None
            with all_or_nothing():
                h, state, rows = self.model.run(
                    input_ids, state, packed.mask, packed.reset, aux_losses, inputs_embeds, inputs=layer_inputs
                )
            layers = None if layer_inputs is None else tuple(rows.scatter(hidden) for hidden in (*layer_inputs, h))
        if aux_losses and labels is None and "num_items_in_batch" in keywords and not self.auxiliary_is_read:
            _LOGGER.warning_once(
                "the Trainer computes the loss outside of the model (label smoothing, or compute_loss_func), so the "
                "auxiliary losses of mixers are not trained; pass compute_loss_func=longspan.hf.TrainerLoss(model, "
                "label_smoothing=...)"
            )
        return _BackboneOutput(packed, h, state, rows, layers, aux_losses)

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """Recompute blocks in the backward pass (always non-reentrant)."""
        if not self._stack.config.reversible:  # whose blocks are recomputed in any case
            self._stack.config = dataclasses.replace(self._stack.config, checkpoint=True)

    # name in the newest versions of transformers
    _activation_checkpointing_enable = gradient_checkpointing_enable

    def gradient_checkpointing_disable(self) -> None:
        """Store activations instead of recomputing blocks."""
        self._stack.config = dataclasses.replace(self._stack.config, checkpoint=False)

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether blocks are recomputed in the backward pass."""
        return bool(self._stack.config.checkpoint or self._stack.config.reversible)

    is_activation_checkpointing = is_gradient_checkpointing


class _BackboneOutput(NamedTuple):
    """Output of the model without its head.

    Attributes:
        documents: padding and documents of the call.
        hidden: (B, N, dim) last hidden states, real tokens gathered to the front.
        state: the next state.
        rows: layout of the call.
        layers: (B, columns, dim) hidden states before each layer and after the last, zeros at padding; None = not
            requested.
        aux_losses: auxiliary losses; None in evaluation.
    """

    documents: Documents
    hidden: Tensor
    state: Any
    rows: BatchLayout
    layers: tuple[Tensor, ...] | None
    aux_losses: list[Tensor] | None


def _inputs(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
    """Return inputs_embeds if given, else input_ids; raise a ConfigError if both are None."""
    inputs = input_ids if inputs_embeds is None else inputs_embeds
    if inputs is None:
        raise ConfigError("neither input_ids nor inputs_embeds; pass one of them")
    return inputs


# transformers looks for GenerationMixin among the direct bases
class LongspanForCausalLM(LongspanPreTrainedModel, StateGeneration, GenerationMixin):  # type: ignore[no-untyped-call]
    """A causal language model with a state instead of a KV cache."""

    kinds = ("decoder",)
    loss_kind = "ForCausalLM"
    _is_stateful = True

    def __init_subclass__(cls, **options: Any) -> None:
        """Register a subclass with the Trainer as a causal language model."""
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
        """Run the model, called as causal models of transformers are.

        Args:
            input_ids: (batch, length).
            attention_mask: (batch, length) or (batch, past + length), 1 for real tokens; padding anywhere.
            past_key_values, cache: the cache that the previous call returned, under either name.
            inputs_embeds: (batch, length, dim) instead of input_ids.
            labels: (batch, length), predicted from the tokens before them; -100 is ignored. In training the loss
                includes the auxiliary losses of the mixers.
            use_cache: return the state; default: if no labels are given.
            logits_to_keep: return the logits of only this many last columns; 0 = all. Or the indices (columns,) to
                return.
            position_ids: (batch, length); a 0 among real tokens starts a document (packed rows), every other position
                must be one more than the previous. For `cu_seq_lens_q` and `seq_idx` see `longspan.hf.positions`.
            mask: (batch, length) bool, True = real token: the library's form of `attention_mask`.
            reset: (batch, length) bool, True = a new document starts here.

        `output_hidden_states=True` returns the hidden states before each layer and after the last norm, and
        `return_dict=False` a plain tuple.
        """
        options = take_options(kwargs, self.config)
        inputs = _inputs(input_ids, inputs_embeds)
        returns_cache = labels is None and bool(self.config.use_cache) if use_cache is None else use_cache
        carried = self._state_cache(
            take_cache({"cache": cache, "past_key_values": past_key_values}), returns_cache, use_cache
        )
        layer = None if carried is None else cast(StateLayer, carried.layers[0])
        read = self._run_backbone(
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
        """Return the loss of next-token prediction plus the auxiliary losses of the mixers."""
        loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **keywords)
        scored = next_labels(labels, keywords.get("shift_labels"))
        return with_auxiliary(loss, aux_losses, share_of_step(scored, **counting(keywords)))

    def _logits(self, h: Tensor, real: Tensor | None = None) -> Tensor:
        """Map hidden states (B, N, dim) to logits (B, N, vocab_size), zeros where `real` (B, N) is False."""
        memory = isinstance(self.model, RecurrentMemory)
        logits: Tensor = self.model.adapter.output(h) if memory else self.model.logits(h)
        return logits if real is None else logits.masked_fill(~real[..., None], 0)


def register_causal(cls: type[LongspanForCausalLM]) -> None:
    """Register a class with the Trainer as one that predicts the next token.

    With label smoothing (or a custom loss) the Trainer removes the labels from the call, and shifts them itself only
    for models whose class is named in this table.
    """
    known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if cls.__name__ not in known.values():
        # keys that are not a model type of transformers are never looked up
        known[f"{cls.config_class.model_type}:{cls.__name__}"] = cls.__name__


register_causal(LongspanForCausalLM)


class _WholeTexts(LongspanPreTrainedModel):  # type: ignore[no-untyped-call]
    """Base of models that read whole texts in one call and keep no state."""

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
        """Return logits, and the loss if labels are given; arguments as of `LongspanForCausalLM`.

        Documents packed in one row (`position_ids`, `reset`, ...) do not see each other.
        """
        options = take_options(kwargs, self.config)
        packing = {"attention_mask": attention_mask, "mask": mask, "reset": reset, "position_ids": position_ids}
        read = self._run_backbone(
            input_ids, inputs_embeds, packing, kwargs, labels=labels, hidden_states=options.hidden_states
        )
        logits, loss, aux_losses = self._logits(read.hidden, read.rows), None, read.aux_losses
        if labels is not None:
            loss = self._loss(logits, labels, kwargs)
            loss = with_auxiliary(loss, aux_losses, share_of_step(labels, **counting(kwargs)))
        output = self.output_class(loss=loss, logits=logits, hidden_states=read.layers, aux_loss=auxiliary(aux_losses))
        return output.to_tuple() if options.as_tuple else output

    def _logits(self, h: Tensor, rows: BatchLayout) -> Tensor:
        """Map gathered hidden states (B, N, dim) to the logits of the task."""
        raise NotImplementedError

    def _loss(self, logits: Tensor, labels: Tensor, keywords: dict[str, Any]) -> Tensor:
        """Return the loss of the task."""
        raise NotImplementedError


class LongspanForMaskedLM(_WholeTexts):  # type: ignore[no-untyped-call]
    """A masked language model: logits at every position, and the loss over positions whose label is not -100."""

    kinds = ("masked_lm",)
    loss_kind = "ForMaskedLM"
    output_class = LongspanMaskedOutput

    def _logits(self, h: Tensor, rows: BatchLayout) -> Tensor:
        """Map gathered hidden states (B, N, dim) to logits (batch, length, vocab_size)."""
        return rows.scatter(self.model.logits(h))

    def _loss(self, logits: Tensor, labels: Tensor, keywords: dict[str, Any]) -> Tensor:
        """Return the cross entropy over positions whose label is not -100."""
        loss: Tensor = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **keywords)
        return loss


class LongspanForSequenceClassification(_WholeTexts):  # type: ignore[no-untyped-call]
    """A classifier that reads the mean over real tokens of an encoder, or the last real token of a decoder.

    Logits are (batch, num_labels); the loss depends on `config.problem_type`, see `longspan.hf.losses`.
    """

    kinds = ("encoder", "decoder")
    _flush = True
    loss_kind = "ForSequenceClassification"
    output_class = LongspanClassifierOutput

    def _heads(self) -> None:
        """Add the dropout and the linear map from pooled hidden states to logits."""
        config = self.config
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.score = nn.Linear(self._stack.config.hidden_dim, config.num_labels or 2)
        nn.init.normal_(self.score.weight, std=0.02)
        nn.init.zeros_(self.score.bias)

    def _logits(self, h: Tensor, rows: BatchLayout) -> Tensor:
        """Map gathered hidden states (B, N, dim) to logits (batch, num_labels)."""
        pooled = self._pooled(h, rows)
        if isinstance(self._stack, Decoder):
            pooled = with_gradients(pooled, self._stack.output_parameters())  # the output layer is not used
        logits: Tensor = self.score(self.dropout(pooled))
        return logits

    def _loss(self, logits: Tensor, labels: Tensor, keywords: dict[str, Any]) -> Tensor:
        """Return the classification loss by `config.problem_type`."""
        return classification_loss(self.loss_function, logits, labels, self.config, **counting(keywords))

    def _pooled(self, h: Tensor, rows: BatchLayout) -> Tensor:
        """Return the inputs (batch, hidden_dim) of the classification head; zeros for rows without a real token."""
        columns, count = torch.arange(h.shape[1], device=h.device), rows.real_tokens()[:, None]
        inside = columns == count - 1 if self._stack.causal else columns < count
        total = h.masked_fill(~inside[..., None], 0).sum(1)
        return total / inside.sum(1, keepdim=True).clamp(min=1).to(h.dtype)
