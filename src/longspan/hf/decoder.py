"""Give a converted causal model the interface of a `Decoder`, for sessions, evaluation and the command line."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypedDict, Unpack, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from longspan.contract.base import Mechanism, Traits, merge_traits, why_no_stream
from longspan.contract.maps import device_and_dtype
from longspan.errors import CheckpointError, ConfigError, DataError, UnsupportedError
from longspan.hf.cache import CACHE, StateCache, StateLayer
from longspan.hf.convert import after_step, mechanisms, parameter_groups
from longspan.hf.convert import aux_losses as last_aux_losses
from longspan.hf.families import attention_modules
from longspan.hf.loading import load
from longspan.hf.modeling import LongspanForCausalLM, LongspanPreTrainedModel
from longspan.models import Head, StackState
from longspan.models.head import CalledHead, final_logits, linear_head
from longspan.models.wrappers import OPENERS, unwrapped
from longspan.state import all_or_nothing


class CallOptions(TypedDict, total=False):
    """Keyword arguments of a `Decoder` call besides tokens and state."""

    mask: Tensor | None
    reset: Tensor | None
    aux_losses: list[Tensor] | None


class ConvertedDecoder(nn.Module):
    """Wraps a converted causal language model in the interface of a `Decoder`.

    Args:
        model: a language model, all layers of which are converted to mixers that stream.

    Raises:
        UnsupportedError: a layer is not converted or does not stream, or the model is bidirectional.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        # adapters of PEFT act inside the model of transformers
        model = self.inner = unwrapped(model)
        layers, modules = mechanisms(model), attention_modules(model)
        if modules.others:
            raise UnsupportedError(
                f"layer {modules.others[0]} of this {model.config.model_type} is linear attention of transformers, "
                "whose state only a cache of transformers carries; call the model itself, or its generate"
            )
        if unconverted := len(modules.attentions) - len(layers):
            raise UnsupportedError(f"{unconverted} layers of this model are not converted; convert all of them")
        if not self.traits.streams:
            raise UnsupportedError(
                f"{self.why_no_stream()}; a ConvertedDecoder must stream in every layer, so convert with another mixer"
            )
        if not modules.family.causal:
            raise UnsupportedError("this model is bidirectional and does not stream; use a causal language model")

    @property
    def layers(self) -> list[Mechanism]:
        """The cores of all layers, in order."""
        return list(mechanisms(self.inner).values())

    @property
    def traits(self) -> Traits:
        """The combined capability flags of all layers."""
        return merge_traits([core.traits for core in self.layers])

    def why_no_stream(self) -> str:
        """Name the first layer that does not stream, with the reason; "" if all layers stream."""
        return why_no_stream(self.layers)

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return int(self.inner.config.vocab_size)

    @property
    def redraw_count(self) -> int:
        """A number that changes whenever a layer redraws its random projections."""
        return sum(core.redraw_count for core in self.layers)

    def describe(self) -> dict[str, Any]:
        """Return the configuration as plain data, which distinguishes this model from others."""
        return cast(dict[str, Any], self.inner.config.to_dict())

    def num_parameters(self) -> int:
        """Return the number of parameters, shared ones counted once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def parameter_groups(self, *, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """Return parameter groups for a torch optimizer; see `longspan.hf.parameter_groups`."""
        return parameter_groups(self.inner, lr=lr, weight_decay=weight_decay)

    def after_step(self, step: int, generator: torch.Generator | None = None) -> None:
        """Apply clamps, redraws and statistics of all layers after optimizer step `step` (1, 2, ...)."""
        after_step(self.inner, step, generator)

    def init_state(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> StackState:
        """Return the state of an empty past; device and dtype default to those of the model."""
        like = device_and_dtype(self.inner)
        where = torch.device(device or like.device)
        states = tuple(core.init_state(batch_size, where, dtype or like.dtype) for core in self.layers)
        return StackState(states, torch.zeros(batch_size, dtype=torch.int64, device=where))

    def state_nbytes(self, batch_size: int, length: int, dtype: torch.dtype = torch.float32) -> int:
        """Return the exact bytes of the state after `length` live tokens (tokens since the last reset),
        counts included.
        """
        return 8 * batch_size + sum(core.state_nbytes(batch_size, length, dtype) for core in self.layers)

    def flops(self, length: int, *, batch_size: int = 1) -> int:
        """Return the FLOPs (2 per multiply-add) of one forward pass of `length` tokens from an empty past, with logits.

        Of a mixture of experts, those that a token uses are counted.
        """
        cores = sum(core.flops(length, batch_size) for core in self.layers)
        return cores + round(2 * batch_size * length * multiplied_parameters(self.inner))

    def pairs(self, length: int) -> int:
        """Return the attended (query, key) pairs of one row of `length` tokens, summed over heads and layers."""
        return sum(core.pairs(length) for core in self.layers)

    def forward(
        self, tokens: Tensor, state: StackState | None = None, **call: Unpack[CallOptions]
    ) -> tuple[Tensor, StackState]:
        """Return logits (batch, length, vocab_size) of the tokens (batch, length), and the next state.

        Keyword arguments are those of a `Decoder`.

        Raises:
            DataError: a token id outside the vocabulary.
        """
        out, next_state = self._run(self.inner, tokens, state, call, logits_to_keep=0)
        return out.logits, next_state

    def hidden(
        self, tokens: Tensor, state: StackState | None = None, **call: Unpack[CallOptions]
    ) -> tuple[Tensor, StackState]:
        """Return the last hidden states (batch, length, dim) instead of logits, and the next state;
        arguments as in `forward`.
        """
        out, next_state = self._run(attention_modules(self.inner).family.base(self.inner), tokens, state, call)
        return out.last_hidden_state, next_state

    def last(
        self, tokens: Tensor, state: StackState | None = None, **call: Unpack[CallOptions]
    ) -> tuple[Tensor, StackState]:
        """Return only the logits (batch, vocab_size) of the last column, and the next state;
        arguments as in `forward`.
        """
        mask = call.get("mask")
        if mask is not None and not bool(mask[:, -1].all()):
            raise ConfigError("last: the mask has a row that ends in padding; pad on the left")
        out, next_state = self._run(self.inner, tokens, state, call, logits_to_keep=1)
        return out.logits[:, -1], next_state

    def head(self) -> Head | CalledHead:
        """Return the language-model head, with the cap or scale of its outputs if the model has one.

        Raises:
            UnsupportedError: it is not a plain linear map.
        """
        return linear_head(self.inner.get_output_embeddings(), final_logits(self.inner.config))

    def _run(
        self, model: Any, tokens: Tensor, state: StackState | None, call: CallOptions, **options: Any
    ) -> tuple[Any, StackState]:
        """Call the inner model, or its base model, with a cache made from the state;
        return its output and the next state.
        """
        # only checked on the CPU, because on another device the check would wait for it
        is_valid = tokens.device.type != "cpu" or bool(((tokens >= 0) & (tokens < self.vocab_size)).all())
        if not is_valid:
            raise DataError(f"a token id is outside the vocabulary: must be from 0 to {self.vocab_size - 1}")
        cache = StateCache([True] * len(self.layers))
        slots = cast(list[StateLayer], cache.layers)
        # without a state the slots stay empty: mechanisms would compute scores of the unused columns of an empty one
        if state is not None:
            # one column per token, so that transformers derives the right positions from it
            columns = int(state.live.max())
            for slot, layer_state in zip(slots, state.layers, strict=True):
                slot.state, slot.columns, slot.is_initialized = layer_state, columns, True
        mask, aux_losses = call.get("mask"), call.get("aux_losses")
        options |= {"attention_mask": None if mask is None else mask.long(), "reset": call.get("reset"), CACHE: cache}
        with all_or_nothing():
            out = model(tokens, use_cache=True, **options)
            if aux_losses is not None:
                aux_losses.extend(last_aux_losses(self.inner))
            next_states = tuple(slot.state for slot in slots)
            return out, StackState(next_states, next_states[0].live)


def multiplied_parameters(model: Any) -> float:
    """Return how many weights a token is multiplied with in a transformers model, without those of mechanisms.

    Weights of experts count by the share of experts that a token uses.
    """
    inside = {id(part) for core in mechanisms(model).values() for part in core.modules()}
    config = model.config
    experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None) or 1
    share = (getattr(config, "num_experts_per_tok", None) or experts) / experts
    total = 0.0
    for module in model.modules():
        if id(module) in inside or isinstance(module, nn.Embedding):
            continue
        for weight in module.parameters(recurse=False):
            # linear maps have two dimensions; those of all experts are one tensor of three
            total += {2: 1.0, 3: share}.get(weight.ndim, 0.0) * weight.numel()
    return total


def open_for_streams(model: Any) -> Any:
    """Return the model that a `StreamSession` calls for a transformers model; None if it is not a transformers model.

    Raises:
        UnsupportedError: it is not converted, or not a language model.
    """
    if isinstance(model, LongspanForCausalLM):
        return model.model
    if not isinstance(model, PreTrainedModel):
        return None
    head: Any = model.get_output_embeddings
    if isinstance(model, LongspanPreTrainedModel) or head() is None:
        raise UnsupportedError(f"StreamSession needs a causal language model; {type(model).__name__} has no such head")
    if not mechanisms(model):
        raise UnsupportedError(
            f"this {type(model).__name__} is not converted; first call longspan.hf.convert(model, MIXER)"
        )
    return ConvertedDecoder(model)


OPENERS.append(open_for_streams)


class ModelAndTokenizer(NamedTuple):
    """A pretrained model and its tokenizer, of transformers."""

    model: Any
    tokenizer: Any


@contextlib.contextmanager
def one_line_errors(source: str | Path) -> Iterator[None]:
    """Context that turns errors of transformers about an unreadable source into a one-line CheckpointError."""
    try:
        yield
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise CheckpointError(f"{source}: {str(error).strip().splitlines()[0]}") from None


def open_pretrained(
    source: str, *, gguf: str | None = None, dtype: torch.dtype | None = torch.float32
) -> ModelAndTokenizer:
    """Load a causal language model and its tokenizer with transformers, from a folder or a hub.

    Args:
        source: a folder, or a name on the hub.
        gguf: a file in it with weights in GGUF format (needs the package `gguf`); None = other formats.
        dtype: dtype of the weights; None = as stored.

    Raises:
        CheckpointError: it cannot be read.
    """
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {} if gguf is None else {"gguf_file": gguf}
    with one_line_errors(source):
        tokenizer: Any = open_tokenizer(source, **options)
        model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=dtype or "auto", **options)
    if gguf is not None:
        model = _without_quantization(model)
    return ModelAndTokenizer(model.eval(), tokenizer)


def _without_quantization(model: Any) -> Any:
    """Return a new model of transformers with the weights of one that was read from GGUF, which are not copied.

    transformers refuses to save a model read from GGUF, but not a new one with the same weights.
    """
    for name in ("quantization_config", "_name_or_path"):
        model.config.__dict__.pop(name, None)
    with torch.device("meta"):
        fresh = type(model)(model.config)
    # with the parameters themselves, tied ones stay tied
    fresh.load_state_dict(model.state_dict(keep_vars=True), assign=True)
    # those of RoPE are not in the state dict
    for name, buffer in model.named_buffers():
        module, _, leaf = name.rpartition(".")
        setattr(fresh.get_submodule(module), leaf, buffer)
    fresh.generation_config = model.generation_config
    return fresh


def end_tokens_of(source: str | Path) -> tuple[int, ...]:
    """Return the ids of the end-of-text tokens of a model folder or hub name.

    They come from generation_config.json, else from the configuration; empty if neither can be read.
    """
    from transformers import AutoConfig, GenerationConfig

    readers: list[Any] = [GenerationConfig, AutoConfig]
    for reader in readers:
        # generation_config.json is optional
        with contextlib.suppress(OSError, ValueError, KeyError):
            ends = getattr(reader.from_pretrained(source), "eos_token_id", None)
            if ends is not None and ends != []:
                return tuple(int(end) for end in (ends if isinstance(ends, list | tuple) else [ends]))
    return ()


def load_converted(folder: str | Path, dtype: torch.dtype | None = None) -> ModelAndTokenizer:
    """Load a folder that `longspan convert` wrote: the model as a `ConvertedDecoder`, and its tokenizer.

    Args:
        folder: of the model.
        dtype: dtype of the weights; None = as stored. New parameters (gates) stay in fp32 at least.

    Raises:
        CheckpointError: it contains no converted model.
        UnsupportedError: the model cannot stream.
    """
    options: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
    return ModelAndTokenizer(ConvertedDecoder(load(folder, **options)), open_tokenizer(folder))


def open_tokenizer(source: str | Path, **options: Any) -> Any:
    """Load a tokenizer with transformers, from a folder or a hub.

    Raises:
        CheckpointError: it cannot be read.
    """
    from transformers import AutoTokenizer

    with one_line_errors(source):
        return AutoTokenizer.from_pretrained(source, **options)
