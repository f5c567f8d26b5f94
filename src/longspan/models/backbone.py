"""What RecurrentMemory needs of a backbone, and the adapters: our Encoder and Decoder, and Hugging Face models.

A Hugging Face model is recognised by what it can do (duck typing): `get_input_embeddings()` and a call that takes
`inputs_embeds`, `attention_mask` and `output_hidden_states`. Nothing of transformers is imported.
"""

import contextlib
import inspect
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from longspan import host
from longspan.contract.base import Mechanism, optimizer_groups
from longspan.contract.maps import is_hooked, place_of
from longspan.errors import ConfigError, UnsupportedError
from longspan.models.decoder import Decoder
from longspan.models.encoder import Encoder
from longspan.models.head import AdaptiveHead, CalledHead, Head, linear_head
from longspan.models.stack import Around


class Ran(NamedTuple):
    """One run of a backbone over a segment: hidden states (batch, length, dim) after the last norm, zeros at padding,
    and the backbone's state where it carries one, else None.
    """

    hidden: Tensor
    state: Any


def groups_of(module: nn.Module, cores: Iterable[Mechanism], *, lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """Groups for a torch optimiser, of a foreign model: weights of its maps decay; embeddings, norms and biases do not;
    mechanisms of this library have their own.

    Args:
        module: the model; parameters that need no gradient are left out.
        cores: its mechanisms.
        lr, weight_decay: of the run.
    """
    looked_up = {id(part.weight) for part in module.modules() if isinstance(part, nn.Embedding)}
    trained = [p for p in module.parameters() if p.requires_grad]
    maps = [p for p in trained if p.ndim == 2 and id(p) not in looked_up]
    return optimizer_groups(trained, maps, cores, lr=lr, weight_decay=weight_decay)


class OwnBackbone:
    """A Decoder or Encoder of this library as the backbone of a memory: a model of short sequences of embeddings.

    Attributes:
        module: the model itself.
        causal: decoder form (write tokens behind the segment) or encoder form (memory in front, read and written).
        dim: width of embeddings and hidden states.
        num_layers: of the model.
        streams: the model carries a state, so an open segment need not be read again.

    Raises:
        UnsupportedError: its hidden states are not as wide as its embeddings, between which memory goes round.
    """

    def __init__(self, module: Decoder | Encoder) -> None:
        if module.config.streams == "both":
            raise UnsupportedError(
                "RecurrentMemory writes hidden states back as inputs, and with streams = 'both' they are twice as wide "
                "as those; use streams = 'mean'"
            )
        self.module = self.stack = module
        self.causal, self.dim = module.causal, module.config.dim
        self.num_layers = module.config.num_layers
        self.streams = isinstance(module, Decoder) and module.traits.streams
        # what the model says and does itself
        self.flops, self.pairs, self.output_parameters = module.block_flops, module.pairs, module.output_parameters
        self.after_step, self.parameter_groups = module.after_step, module.parameter_groups

    @property
    def vocab_size(self) -> int:
        """Token ids are below it."""
        return self.stack.vocab_size

    @property
    def redraw_count(self) -> int:
        """Changes whenever the model redraws its random projections."""
        return self.stack.redraw_count

    def embed(self, tokens: Tensor) -> Tensor:
        """Token ids (batch, length), which must be of the vocabulary, to embeddings (batch, length, dim)."""
        self.stack.check_tokens(tokens)
        return cast(Tensor, self.stack.embedding(tokens))

    def embedding_std(self) -> float:
        """Standard deviation of the token embeddings: what the initial memory is drawn with."""
        if isinstance(self.stack.embedding, nn.Embedding):
            return float(self.stack.embedding.weight.detach().float().std())
        with torch.no_grad():
            common = torch.arange(min(self.vocab_size, 4096), device=place_of(self.stack).device)
            return float(self.stack.embedding(common).float().std())

    def run(
        self,
        inputs: Tensor,
        state: Any,
        mask: Tensor | None,
        reset: Tensor | None,
        aux_losses: list[Tensor] | None,
        around: Around | None = None,
    ) -> Ran:
        """Embeddings (batch, length, dim) with a mask and resets to hidden states."""
        hidden, next_state, rows = self.stack.run(None, state, mask, reset, aux_losses, inputs, around)
        if next_state is not None:  # the next segment need not ask a device
            next_state = next_state._replace(live=host.remember(next_state.live.view_as(next_state.live), rows.lives))
        return Ran(rows.scatter(hidden), next_state)

    def output(self, hidden: Tensor) -> Tensor:
        """Hidden states to what the model returns: logits, or the hidden states themselves."""
        return self.stack.logits(hidden) if isinstance(self.stack, Decoder) else hidden

    def head(self) -> Head | CalledHead | AdaptiveHead:
        """What makes logits of hidden states; an UnsupportedError where the model has no linear output layer."""
        return self.stack.head() if isinstance(self.stack, Decoder) else linear_head(None)

    def init_state(self, batch_size: int, **options: Any) -> Any:
        """The backbone's empty state, where it carries one; options as of the model."""
        return self.stack.init_state(batch_size, **options) if self.streams else None

    def state_nbytes(self, batch_size: int, length: int, dtype: torch.dtype) -> int:
        """Bytes of the backbone's state after `length` positions of an open segment."""
        return self.stack.state_nbytes(batch_size, length, dtype) if self.streams else 0

    def alike(self) -> bool:
        """Whether all layers are of one make and can run as a batch: recomputation inside a layer cannot."""
        if self.stack.config.ffn_chunk or not all(_batches(block) for block in self.stack.blocks):
            return False
        makes = [_make(block) for block in self.stack.blocks]
        return len({str(table) for table in self.stack.config.mixers}) == 1 and all(make == makes[0] for make in makes)


def _batches(block: nn.Module) -> bool:
    """Whether a layer is its parameters and buffers and nothing else: adapters, quantized maps and hooks are not."""
    modules = list(block.modules())
    known = all(type(part).__module__.startswith(("torch.nn.modules.", "longspan.")) for part in modules)
    return known and not any(is_hooked(part) for part in modules) and not any(p.is_meta for p in block.parameters())


def _make(block: nn.Module) -> list[Any]:
    """Types of modules, and shapes, types and places of parameters and buffers."""
    tensors = [*block.named_parameters(), *block.named_buffers()]
    return [*map(type, block.modules()), *((name, t.shape, t.dtype, t.device) for name, t in tensors)]


class HuggingFaceBackbone:
    """A Hugging Face encoder or causal language model, by duck typing; methods as of `OwnBackbone`.

    Padding goes by `attention_mask`, positions by `position_ids` counted over real tokens where the model takes them.
    An open segment is read again from its token ids, so results do not depend on the model's own cache.
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

    # looked up in every call: resizing and adapters put other modules in their places

    @property
    def embedding(self) -> Any:
        """The token embedding."""
        get_embedding: Any = self.module.get_input_embeddings
        return get_embedding()

    @property
    def output_layer(self) -> Any:
        """The output layer of a causal model."""
        return _output_layer(self.module) if self.causal else None

    @property
    def vocab_size(self) -> int:
        """See `OwnBackbone`."""
        return int(self.embedding.weight.shape[0])

    def embed(self, tokens: Tensor) -> Tensor:
        """See `OwnBackbone`."""
        return cast(Tensor, self.embedding(tokens))

    def embedding_std(self) -> float:
        """See `OwnBackbone`."""
        return float(self.embedding.weight.detach().float().std())

    def run(
        self,
        inputs: Tensor,
        state: Any,
        mask: Tensor | None,
        reset: Tensor | None,
        aux_losses: list[Tensor] | None,
        around: Around | None = None,
    ) -> Ran:
        """See `OwnBackbone`; `state` and `reset` mean nothing here."""
        seen = torch.ones(inputs.shape[:2], dtype=torch.bool, device=inputs.device) if mask is None else mask
        extras: dict[str, Any] = {"use_cache": False} if "use_cache" in self.extras else {}
        if "logits_to_keep" in self.extras:
            extras["logits_to_keep"] = 1  # `output` makes those that are wanted
        if "position_ids" in self.extras:
            extras["position_ids"] = (seen.cumsum(1) - 1).clamp(min=0)
        with _hooked(self.layers, around):
            out = self.module(inputs_embeds=inputs, attention_mask=seen.long(), output_hidden_states=True, **extras)
        if aux_losses is not None:
            runs = [part.__dict__.get("longspan_aux_losses") for part in self.module.modules()]
            aux_losses.extend(loss for run in runs if run is not None for loss in run.read())
        hidden: Tensor = out.hidden_states[-1]
        return Ran(hidden.masked_fill(~seen[..., None], 0), None)

    def output(self, hidden: Tensor) -> Tensor:
        """See `OwnBackbone`."""
        layer = self.output_layer
        return hidden if layer is None else cast(Tensor, layer(hidden))

    def output_parameters(self) -> list[nn.Parameter]:
        """See `OwnBackbone`."""
        layer = self.output_layer
        return [] if layer is None else list(layer.parameters())

    def head(self) -> Head | CalledHead:
        """See `OwnBackbone`."""
        return linear_head(self.output_layer)

    def init_state(self, batch_size: int, **options: Any) -> None:
        """None: nothing is carried."""

    def state_nbytes(self, batch_size: int, length: int, dtype: torch.dtype) -> int:
        """Of no state."""
        return 0

    def flops(self, length: int, batch_size: int) -> int:
        """Not counted."""
        raise UnsupportedError(f"{type(self.module).__name__}: longspan does not count the FLOPs of foreign models")

    def pairs(self, length: int) -> int:
        """Not counted."""
        raise UnsupportedError(f"{type(self.module).__name__}: longspan does not count the pairs of foreign models")

    # of converted models, whose layers have mechanisms of this library

    def cores(self) -> list[Any]:
        """The mechanisms of converted layers; none where the model is not converted."""
        return [part.longspan for part in self.module.modules() if hasattr(part, "longspan_family")]

    def after_step(self, step: int, generator: torch.Generator | None) -> None:
        """See `OwnBackbone`."""
        for core in self.cores():
            core.after_step(step, generator)

    @property
    def redraw_count(self) -> int:
        """See `OwnBackbone`."""
        return sum(core.redraw_count for core in self.cores())

    def parameter_groups(self, *, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """See `OwnBackbone`."""
        return groups_of(self.module, self.cores(), lr=lr, weight_decay=weight_decay)


Backbone = OwnBackbone | HuggingFaceBackbone


def _output_layer(module: nn.Module) -> Any:
    get_head: Any = getattr(module, "get_output_embeddings", None)
    return None if get_head is None else get_head()


def _layers(module: nn.Module, count: int) -> list[nn.Module]:
    """The layers of a Hugging Face model: its list of as many modules as the configuration names."""
    for part in module.modules():
        if isinstance(part, nn.ModuleList) and count and len(part) == count:
            return list(part)
    return []


@contextlib.contextmanager
def _hooked(layers: list[nn.Module], around: Around | None) -> Iterator[None]:
    """Let `around` act before and after each layer while a model runs."""
    if around is None:
        yield
        return
    if not layers:
        raise UnsupportedError("RecurrentMemory.per_layer: the layers of this model cannot be found")
    handles = []
    for index, layer in enumerate(layers):

        def before(_: Any, args: Any, kwargs: Any, index: int = index) -> Any:
            if args:
                return (around.before(index, args[0]), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": around.before(index, kwargs["hidden_states"])}

        def after(_: Any, __: Any, output: Any, index: int = index) -> None:
            around.after(index, output[0] if isinstance(output, tuple) else output)

        handles += [layer.register_forward_pre_hook(before, with_kwargs=True), layer.register_forward_hook(after)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def wrap_backbone(module: nn.Module) -> Backbone:
    """The adapter of a model.

    Raises:
        ConfigError: it is neither ours nor takes `inputs_embeds`.
    """
    if isinstance(module, (Decoder, Encoder)):
        return OwnBackbone(module)
    takes = "inputs_embeds" in inspect.signature(module.forward).parameters
    if takes and hasattr(module, "get_input_embeddings"):
        return HuggingFaceBackbone(module)
    raise ConfigError(
        f"{type(module).__name__} is no backbone for recurrent memory: it must be a longspan Decoder or Encoder, or a "
        "Hugging Face model that takes inputs_embeds"
    )
