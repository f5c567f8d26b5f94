"""The interface that RecurrentMemory needs of a backbone, and its adapters for our models and Hugging Face models.

A Hugging Face model is recognized by duck typing: `get_input_embeddings()` and a call that takes `inputs_embeds`,
`attention_mask` and `output_hidden_states`. Nothing is imported from transformers.
"""

import contextlib
import inspect
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from longspan import host
from longspan.contract.base import Mechanism, optimizer_groups
from longspan.contract.maps import device_and_dtype, is_hooked
from longspan.errors import ConfigError, UnsupportedError
from longspan.models.decoder import Decoder
from longspan.models.encoder import Encoder
from longspan.models.head import AdaptiveHead, CalledHead, Head, final_logits, linear_head
from longspan.models.stack import LayerHooks


class BackboneRun(NamedTuple):
    """Result of running a backbone over one segment.

    Attributes:
        hidden: (batch, length, dim) hidden states after the last norm, zeros at padding.
        state: the backbone's state; None if it carries none.
    """

    hidden: Tensor
    state: Any


def foreign_optimizer_groups(
    module: nn.Module, cores: Iterable[Mechanism], *, lr: float, weight_decay: float
) -> list[dict[str, Any]]:
    """Return parameter groups for a torch optimizer of a foreign model.

    Weights of its linear maps decay; embeddings, norms and biases do not; mechanisms of this library have their own
    groups.

    Args:
        module: the model; parameters that do not require gradients are left out.
        cores: its mechanisms.
        lr, weight_decay: settings of the run.
    """
    looked_up = {id(part.weight) for part in module.modules() if isinstance(part, nn.Embedding)}
    trained = [p for p in module.parameters() if p.requires_grad]
    maps = [p for p in trained if p.ndim == 2 and id(p) not in looked_up]
    return optimizer_groups(trained, maps, cores, lr=lr, weight_decay=weight_decay)


class OwnBackbone:
    """Adapter that uses a Decoder or Encoder of this library as the backbone of a recurrent memory.

    Attributes:
        module: the model itself.
        causal: decoder form (write tokens after the segment) or encoder form (memory in front, read and written).
        dim: width of embeddings and hidden states.
        num_layers: layers of the model.
        streams: the model carries a state, so the start of an incomplete segment is not read again.

    Raises:
        UnsupportedError: its hidden states and embeddings differ in width, so memory cannot be fed back.
    """

    def __init__(self, module: Decoder | Encoder) -> None:
        if module.config.streams == "both":
            raise UnsupportedError(
                "RecurrentMemory feeds hidden states back as inputs, but with streams = 'both' they are twice as wide "
                "as embeddings; use streams = 'mean'"
            )
        self.module = self.stack = module
        self.causal, self.dim = module.causal, module.config.dim
        self.num_layers = module.config.num_layers
        self.streams = isinstance(module, Decoder) and module.traits.streams
        # methods that the model implements itself
        self.flops, self.pairs, self.output_parameters = module.block_flops, module.pairs, module.output_parameters
        self.after_step, self.parameter_groups = module.after_step, module.parameter_groups

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self.stack.vocab_size

    @property
    def redraw_count(self) -> int:
        """A number that changes whenever the model redraws its random projections."""
        return self.stack.redraw_count

    def embed(self, tokens: Tensor) -> Tensor:
        """Check token ids (batch, length) against the vocabulary and embed them as (batch, length, dim)."""
        self.stack.check_tokens(tokens)
        return cast(Tensor, self.stack.embedding(tokens))

    def embedding_std(self) -> float:
        """Return the standard deviation of the token embeddings, which is used to initialize the memory."""
        if isinstance(self.stack.embedding, nn.Embedding):
            return float(self.stack.embedding.weight.detach().float().std())
        with torch.no_grad():
            common = torch.arange(min(self.vocab_size, 4096), device=device_and_dtype(self.stack).device)
            return float(self.stack.embedding(common).float().std())

    def run(
        self,
        inputs: Tensor,
        state: Any,
        mask: Tensor | None,
        reset: Tensor | None,
        aux_losses: list[Tensor] | None,
        hooks: LayerHooks | None = None,
    ) -> BackboneRun:
        """Run the layers on embeddings (batch, length, dim) with a mask and resets (batch, length)."""
        hidden, next_state, rows = self.stack.run(None, state, mask, reset, aux_losses, inputs, hooks)
        if next_state is not None:  # so that the next segment does not wait for a device
            next_state = next_state._replace(live=host.remember(next_state.live.view_as(next_state.live), rows.lives))
        return BackboneRun(rows.scatter(hidden), next_state)

    def output(self, hidden: Tensor) -> Tensor:
        """Map hidden states (..., dim) to the model's output: logits, or unchanged hidden states of an encoder."""
        return self.stack.logits(hidden) if isinstance(self.stack, Decoder) else hidden

    def head(self) -> Head | CalledHead | AdaptiveHead:
        """Return the output layer; raises UnsupportedError if the model has no linear one."""
        return self.stack.head() if isinstance(self.stack, Decoder) else linear_head(None)

    def init_state(self, batch_size: int, **options: Any) -> Any:
        """Return the backbone's empty state, or None if it carries none; options as of the model."""
        return self.stack.init_state(batch_size, **options) if self.streams else None

    def state_nbytes(self, batch_size: int, length: int, dtype: torch.dtype) -> int:
        """Return the bytes of the backbone's state after `length` positions of a segment."""
        return self.stack.state_nbytes(batch_size, length, dtype) if self.streams else 0

    def has_uniform_layers(self) -> bool:
        """Whether all layers have the same structure and can run as one batch,
        which recomputation inside a layer prevents.
        """
        if self.stack.config.ffn_chunk or not all(_is_batchable(block) for block in self.stack.blocks):
            return False
        makes = [_signature(block) for block in self.stack.blocks]
        return len({str(table) for table in self.stack.config.mixers}) == 1 and all(make == makes[0] for make in makes)


def _is_batchable(block: nn.Module) -> bool:
    """Whether a layer is nothing but its parameters and buffers:
    no adapters, quantized maps, hooks or offloaded weights.
    """
    modules = list(block.modules())
    known = all(type(part).__module__.startswith(("torch.nn.modules.", "longspan.")) for part in modules)
    return known and not any(is_hooked(part) for part in modules) and not any(p.is_meta for p in block.parameters())


def _signature(block: nn.Module) -> list[Any]:
    """Return what layers must have in common: types of modules; names, shapes, dtypes and devices of their tensors."""
    tensors = [*block.named_parameters(), *block.named_buffers()]
    return [*map(type, block.modules()), *((name, t.shape, t.dtype, t.device) for name, t in tensors)]


class HuggingFaceBackbone:
    """Adapter that uses a Hugging Face encoder or causal LM as the backbone of a recurrent memory, by duck typing.

    Padding is passed as `attention_mask`; if the model takes `position_ids`, they count real tokens. An incomplete
    segment is read again from its token ids, so results do not depend on the model's own cache. Methods are those of
    `OwnBackbone`.
    """

    streams = False

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        config = getattr(module, "config", None)
        bidirectional = getattr(config, "is_decoder", None) is False and hasattr(config, "type_vocab_size")
        self.causal = not bidirectional and _output_layer(module) is not None
        self.dim = int(self.embedding.weight.shape[1])
        taken = inspect.signature(module.forward).parameters
        self.layers = _layers(module, int(getattr(config, "num_hidden_layers", 0)))
        self.num_layers = len(self.layers)
        self.extras = {name for name in ("position_ids", "use_cache", "logits_to_keep") if name in taken}

    # looked up in every call, because resizing and adapters replace these modules

    @property
    def embedding(self) -> Any:
        """The token embedding module."""
        get_embedding: Any = self.module.get_input_embeddings
        return get_embedding()

    @property
    def output_layer(self) -> Any:
        """The output layer of a causal model; None for an encoder."""
        return _output_layer(self.module) if self.causal else None

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return int(self.embedding.weight.shape[0])

    def embed(self, tokens: Tensor) -> Tensor:
        """Embed token ids (batch, length) as (batch, length, dim)."""
        return cast(Tensor, self.embedding(tokens))

    def embedding_std(self) -> float:
        """Return the standard deviation of the token embeddings, which is used to initialize the memory."""
        return float(self.embedding.weight.detach().float().std())

    def run(
        self,
        inputs: Tensor,
        state: Any,
        mask: Tensor | None,
        reset: Tensor | None,
        aux_losses: list[Tensor] | None,
        hooks: LayerHooks | None = None,
    ) -> BackboneRun:
        """Run the model on embeddings (batch, length, dim) with a mask (batch, length);
        `state` and `reset` are ignored.
        """
        real = torch.ones(inputs.shape[:2], dtype=torch.bool, device=inputs.device) if mask is None else mask
        extras: dict[str, Any] = {"use_cache": False} if "use_cache" in self.extras else {}
        if "logits_to_keep" in self.extras:
            extras["logits_to_keep"] = 1  # `output` computes the logits that are needed
        if "position_ids" in self.extras:
            extras["position_ids"] = (real.cumsum(1) - 1).clamp(min=0)
        with _hooked(self.layers, hooks):
            out = self.module(inputs_embeds=inputs, attention_mask=real.long(), output_hidden_states=True, **extras)
        if aux_losses is not None:
            runs = [part.__dict__.get("longspan_aux_losses") for part in self.module.modules()]
            aux_losses.extend(loss for run in runs if run is not None for loss in run.read())
        hidden: Tensor = out.hidden_states[-1]
        return BackboneRun(hidden.masked_fill(~real[..., None], 0), None)

    def output(self, hidden: Tensor) -> Tensor:
        """Map hidden states (..., dim) to logits, or return them unchanged for an encoder."""
        layer = self.output_layer
        if layer is None:
            return hidden
        change = final_logits(getattr(self.module, "config", None))
        return cast(Tensor, layer(hidden) if change is None else change(layer(hidden)))

    def output_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of the output layer; none for an encoder."""
        layer = self.output_layer
        return [] if layer is None else list(layer.parameters())

    def head(self) -> Head | CalledHead:
        """Return the output layer; raises UnsupportedError if the model has no linear one."""
        return linear_head(self.output_layer, final_logits(getattr(self.module, "config", None)))

    def init_state(self, batch_size: int, **options: Any) -> None:
        """Return None, because no state is carried."""

    def state_nbytes(self, batch_size: int, length: int, dtype: torch.dtype) -> int:
        """Return 0, because no state is carried."""
        return 0

    def flops(self, length: int, batch_size: int) -> int:
        """Raise UnsupportedError, because FLOPs of foreign models are not counted."""
        raise UnsupportedError(f"{type(self.module).__name__}: FLOPs are only counted for models of longspan")

    def pairs(self, length: int) -> int:
        """Raise UnsupportedError, because attended pairs of foreign models are not counted."""
        raise UnsupportedError(f"{type(self.module).__name__}: pairs are only counted for models of longspan")

    # for converted models, whose layers have mechanisms of this library

    def cores(self) -> list[Any]:
        """Return the mechanisms of converted layers; none if the model is not converted."""
        return [part.longspan for part in self.module.modules() if hasattr(part, "longspan_family")]

    def after_step(self, step: int, generator: torch.Generator | None) -> None:
        """Apply clamps, redraws and statistics of converted layers after an optimizer step."""
        for core in self.cores():
            core.after_step(step, generator)

    @property
    def redraw_count(self) -> int:
        """A number that changes whenever a converted layer redraws its random projections."""
        return sum(core.redraw_count for core in self.cores())

    def parameter_groups(self, *, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """Return parameter groups for a torch optimizer, with those that converted layers declare."""
        return foreign_optimizer_groups(self.module, self.cores(), lr=lr, weight_decay=weight_decay)


Backbone = OwnBackbone | HuggingFaceBackbone


def _output_layer(module: nn.Module) -> Any:
    """Return the output embeddings of a Hugging Face model; None if it has none."""
    get_head: Any = getattr(module, "get_output_embeddings", None)
    return None if get_head is None else get_head()


def _layers(module: nn.Module, count: int) -> list[nn.Module]:
    """Return the layers of a Hugging Face model: its module list with `count` entries; empty if there is none."""
    for part in module.modules():
        if isinstance(part, nn.ModuleList) and count and len(part) == count:
            return list(part)
    return []


@contextlib.contextmanager
def _hooked(layers: list[nn.Module], hooks: LayerHooks | None) -> Iterator[None]:
    """Context in which `hooks` run before and after each layer of a model."""
    if hooks is None:
        yield
        return
    if not layers:
        raise UnsupportedError(
            "RecurrentMemory.per_layer: the layers of this model were not found: no ModuleList of num_hidden_layers "
            "modules; set per_layer = False"
        )
    handles = []
    for index, layer in enumerate(layers):

        def before(_: Any, args: Any, kwargs: Any, index: int = index) -> Any:
            """Replace the layer's input by what the hooks return (a forward pre-hook)."""
            if args:
                return (hooks.before(index, args[0]), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": hooks.before(index, kwargs["hidden_states"])}

        def after(_: Any, __: Any, output: Any, index: int = index) -> None:
            """Pass the layer's output to the hooks (a forward hook)."""
            hooks.after(index, output[0] if isinstance(output, tuple) else output)

        handles += [layer.register_forward_pre_hook(before, with_kwargs=True), layer.register_forward_hook(after)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def wrap_backbone(module: nn.Module) -> Backbone:
    """Return the adapter for a model.

    Raises:
        ConfigError: it is neither a model of this library nor takes `inputs_embeds`.
    """
    if isinstance(module, (Decoder, Encoder)):
        return OwnBackbone(module)
    takes = "inputs_embeds" in inspect.signature(module.forward).parameters
    if takes and hasattr(module, "get_input_embeddings"):
        return HuggingFaceBackbone(module)
    raise ConfigError(
        f"{type(module).__name__} is not a backbone for RecurrentMemory; pass a longspan Decoder or Encoder, or a "
        "Hugging Face model that takes inputs_embeds"
    )
