"""A converted causal model with the face of a `Decoder`, so that sessions, evaluation and the verbs take it."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypedDict, Unpack, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from longspan.contract.base import Mechanism, Traits, merge_traits, why_no_stream
from longspan.contract.maps import place_of
from longspan.errors import CheckpointError, ConfigError, DataError, UnsupportedError
from longspan.hf.cache import CACHE, StateCache, StateLayer
from longspan.hf.convert import after_step, mechanisms, parameter_groups
from longspan.hf.convert import aux_losses as last_aux_losses
from longspan.hf.families import find
from longspan.hf.loading import load
from longspan.hf.modeling import LongspanForCausalLM, LongspanPreTrainedModel
from longspan.models import Head, StackState
from longspan.models.head import CalledHead, linear_head
from longspan.models.wrappers import OPENERS, unwrapped
from longspan.state import all_or_nothing


class CallOptions(TypedDict, total=False):
    """What a call takes beside tokens and state, as of a `Decoder`."""

    mask: Tensor | None
    reset: Tensor | None
    aux_losses: list[Tensor] | None


class ConvertedDecoder(nn.Module):
    """Calls a converted model as a `Decoder` is called.

    Args:
        model: converted in all of its layers to mixers that stream, with its language-model head.

    Raises:
        UnsupportedError: a layer is not converted or does not stream.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        # adapters of PEFT act inside the model of transformers
        model = self.inner = unwrapped(model)
        layers, modules = mechanisms(model), find(model)
        if unconverted := len(modules.attentions) - len(layers):
            raise UnsupportedError(f"{unconverted} layers of this model still keep every key; convert all of them")
        if not self.traits.streams:
            raise UnsupportedError(f"{self.why_no_stream()}; a ConvertedDecoder streams in every layer")
        if not modules.family.causal:
            raise UnsupportedError("this model sees both sides of every token and does not stream")

    @property
    def layers(self) -> list[Mechanism]:
        """The cores, in order."""
        return list(mechanisms(self.inner).values())

    @property
    def traits(self) -> Traits:
        """What all layers promise."""
        return merge_traits([core.traits for core in self.layers])

    def why_no_stream(self) -> str:
        """Which layer is the first that does not stream, and why; "" where all of them do."""
        return why_no_stream(self.layers)

    @property
    def vocab_size(self) -> int:
        """Token ids are below it."""
        return int(self.inner.config.vocab_size)

    @property
    def redraw_count(self) -> int:
        """Changes whenever a layer redraws its projections."""
        return sum(core.redraw_count for core in self.layers)

    def describe(self) -> dict[str, Any]:
        """Plain data that tells this model from others."""
        return cast(dict[str, Any], self.inner.config.to_dict())

    def num_parameters(self) -> int:
        """Parameters, shared ones once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def parameter_groups(self, *, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """Groups for a torch optimiser; see `longspan.hf.parameter_groups`."""
        return parameter_groups(self.inner, lr=lr, weight_decay=weight_decay)

    def after_step(self, step: int, generator: torch.Generator | None = None) -> None:
        """Call after each optimiser step."""
        after_step(self.inner, step, generator)

    def init_state(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> StackState:
        """The state of an empty past."""
        like = place_of(self.inner)
        where = torch.device(device or like.device)
        states = tuple(core.init_state(batch_size, where, dtype or like.dtype) for core in self.layers)
        return StackState(states, torch.zeros(batch_size, dtype=torch.int64, device=where))

    def state_nbytes(self, batch_size: int, length: int, dtype: torch.dtype = torch.float32) -> int:
        """Exact bytes of the state after `length` live tokens, counts included."""
        return 8 * batch_size + sum(core.state_nbytes(batch_size, length, dtype) for core in self.layers)

    def forward(
        self, tokens: Tensor, state: StackState | None = None, **call: Unpack[CallOptions]
    ) -> tuple[Tensor, StackState]:
        """Logits (batch, length, vocab_size) and the next state; arguments as of a `Decoder`.

        Raises:
            DataError: a token outside the vocabulary.
        """
        out, next_state = self._run(self.inner, tokens, state, call, logits_to_keep=0)
        return out.logits, next_state

    def hidden(
        self, tokens: Tensor, state: StackState | None = None, **call: Unpack[CallOptions]
    ) -> tuple[Tensor, StackState]:
        """Like a call, but what logits are made of: hidden states (batch, length, dim)."""
        out, next_state = self._run(find(self.inner).family.base(self.inner), tokens, state, call)
        return out.last_hidden_state, next_state

    def last(
        self, tokens: Tensor, state: StackState | None = None, **call: Unpack[CallOptions]
    ) -> tuple[Tensor, StackState]:
        """Like a call, but only the logits (batch, vocab_size) of the last column."""
        mask = call.get("mask")
        if mask is not None and not bool(mask[:, -1].all()):
            raise ConfigError("last: a row ends in padding")
        out, next_state = self._run(self.inner, tokens, state, call, logits_to_keep=1)
        return out.logits[:, -1], next_state

    def head(self) -> Head | CalledHead:
        """The language-model head. Raises UnsupportedError: it is no plain linear map."""
        return linear_head(self.inner.get_output_embeddings())

    def _run(
        self, model: Any, tokens: Tensor, state: StackState | None, call: CallOptions, **options: Any
    ) -> tuple[Any, StackState]:
        # on another device this would wait for it
        inside = tokens.device.type != "cpu" or bool(((tokens >= 0) & (tokens < self.vocab_size)).all())
        if not inside:
            raise DataError(f"a token id is outside the model's vocabulary of {self.vocab_size}")
        cache = StateCache([True] * len(self.layers))
        before = self.init_state(tokens.shape[0]) if state is None else state
        slots = cast(list[StateLayer], cache.layers)
        # columns are tokens: what positions transformers makes of them are right
        columns = int(before.live.max())
        for slot, layer_state in zip(slots, before.layers, strict=True):
            slot.state, slot.columns, slot.is_initialized = layer_state, columns, True
        mask, aux_losses = call.get("mask"), call.get("aux_losses")
        options |= {"attention_mask": None if mask is None else mask.long(), "reset": call.get("reset"), CACHE: cache}
        with all_or_nothing():
            out = model(tokens, use_cache=True, **options)
            if aux_losses is not None:
                aux_losses.extend(last_aux_losses(self.inner))
            next_states = tuple(slot.state for slot in slots)
            return out, StackState(next_states, next_states[0].live)


def open_for_streams(model: Any) -> Any:
    """What a `StreamSession` reads of a model of transformers, None where it is not one.

    Raises:
        UnsupportedError: it is not converted, or no language model.
    """
    if isinstance(model, LongspanForCausalLM):
        return model.model
    if not isinstance(model, PreTrainedModel):
        return None
    head: Any = model.get_output_embeddings
    if isinstance(model, LongspanPreTrainedModel) or head() is None:
        raise UnsupportedError(f"StreamSession predicts the next token; {type(model).__name__} has no such head")
    if not mechanisms(model):
        raise UnsupportedError(
            f"this {type(model).__name__} keeps every key; convert it first: longspan.hf.convert(model, MIXER)"
        )
    return ConvertedDecoder(model)


OPENERS.append(open_for_streams)


class Opened(NamedTuple):
    """A pretrained model and its tokenizer, as transformers gives them."""

    model: Any
    tokenizer: Any


@contextlib.contextmanager
def readable(source: str | Path) -> Iterator[None]:
    """What transformers raises inside for a source that it cannot read becomes a CheckpointError of one line."""
    try:
        yield
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise CheckpointError(f"{source}: {str(error).strip().splitlines()[0]}") from None


def open_pretrained(source: str, *, gguf: str | None = None, dtype: torch.dtype | None = torch.float32) -> Opened:
    """A causal language model of transformers, from a folder or a hub.

    Args:
        source: a folder, or a name on the hub.
        gguf: a file in it, where the weights are in that format (needs the package `gguf`).
        dtype: of the weights; None = as they are stored.

    Raises:
        CheckpointError: it cannot be read.
    """
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {} if gguf is None else {"gguf_file": gguf}
    with readable(source):
        tokenizer: Any = open_tokenizer(source, **options)
        model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=dtype or "auto", **options)
    if gguf is not None:
        # what was read from GGUF refuses to be saved; the same weights in a model of their own do not
        config = model.config
        for name in ("quantization_config", "_name_or_path"):
            config.__dict__.pop(name, None)
        fresh = type(model)(config).to(model.dtype)
        fresh.load_state_dict(model.state_dict())
        fresh.generation_config = model.generation_config
        model = fresh
    return Opened(model.eval(), tokenizer)


def end_tokens_of(source: str | Path) -> tuple[int, ...]:
    """Ids with which the model in a folder, or of a name on a hub, ends a text: its generation_config.json has one or
    several, else its configuration; none where neither can be read.
    """
    from transformers import AutoConfig, GenerationConfig

    readers: list[Any] = [GenerationConfig, AutoConfig]
    for reader in readers:
        # models need not have the first
        with contextlib.suppress(OSError, ValueError, KeyError):
            ends = getattr(reader.from_pretrained(source), "eos_token_id", None)
            if ends is not None and ends != []:
                return tuple(int(end) for end in (ends if isinstance(ends, list | tuple) else [ends]))
    return ()


def load_converted(folder: str | Path, dtype: torch.dtype | None = None) -> Opened:
    """A folder that `longspan convert` wrote: the model as a `ConvertedDecoder`, and its tokenizer.

    Args:
        folder: of the model.
        dtype: of the weights; None = as they are stored. New parameters (gates) stay in fp32 at least.

    Raises:
        CheckpointError: it holds no converted model.
        UnsupportedError: it cannot stream.
    """
    options: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
    return Opened(ConvertedDecoder(load(folder, **options)), open_tokenizer(folder))


def open_tokenizer(source: str | Path, **options: Any) -> Any:
    """A tokenizer of transformers, from a folder or a hub. Raises CheckpointError: it cannot be read."""
    from transformers import AutoTokenizer

    with readable(source):
        return AutoTokenizer.from_pretrained(source, **options)
