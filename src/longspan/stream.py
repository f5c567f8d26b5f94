"""Streaming sessions: feed, generate, save, load and fork one endless sequence,
in constant memory if the mixers allow.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import longspan.state as states
from longspan.contract.maps import device_and_dtype
from longspan.errors import CheckpointError, ConfigError, UnsupportedError
from longspan.models import RecurrentState, StackState, accepted_hashes, model_hash
from longspan.models.wrappers import OPENERS, unwrapped
from longspan.version import __version__

# number of predictions scored at once
_SCORED = 64


class SessionState(NamedTuple):
    """State of a session between two tokens.

    Attributes:
        model: the model's state.
        logits: (1, vocab_size) prediction of the next token; zeros before the first token.
    """

    model: StackState | RecurrentState
    logits: Tensor

    @property
    def live(self) -> Tensor:
        """Tokens (1,) since the last reset."""
        return self.model.live


class _Progress(NamedTuple):
    """State and position of a session, with the in-place writes of the call in progress (`undo`).

    It is replaced by a single assignment, so that an interruption never leaves it half updated.
    """

    state: SessionState
    position: int
    undo: states.Undo


class Scores(NamedTuple):
    """Scores of tokens that were read, on the model's device.

    Attributes:
        nats: (n,) negative log-likelihood of each token given all before it; for the first of a stream log(vocab_size).
        likeliest: (n,) bool, whether no other token was likelier.
    """

    nats: Tensor
    likeliest: Tensor


def _session_model(model: Any) -> Any:
    """Return the streaming model inside wrappers such as PEFT.

    Raises:
        ConfigError: it is not a model of this library.
    """
    whole = model if hasattr(model, "traits") else unwrapped(model)
    for opener in () if hasattr(whole, "traits") else OPENERS:
        opened = opener(whole)
        if opened is not None:
            return opened
    if not hasattr(whole, "traits") or not hasattr(whole, "last"):
        raise ConfigError(
            f"StreamSession needs a Decoder, a RecurrentMemory or a model of longspan.hf, not {type(whole).__name__}"
        )
    return whole


class StreamSession:
    """One sequence of any length that is read and continued by a causal model.

    Args:
        model: a Decoder whose mixers stream, a RecurrentMemory over one, either of them as a `LongspanForCausalLM`, or
            a model converted by `longspan.hf`, perhaps inside PEFT. It is set to evaluation mode.
        chunk: tokens computed at once. Chunks end at positions that are multiples of it, so how the text is split into
            `feed` calls hardly matters; default: the model's segment, at least 256 tokens.

    Raises:
        UnsupportedError: a layer of the model does not stream, or is not converted.
        ConfigError: not a model of this library, or chunk < 1.
    """

    def __init__(self, model: Any, *, chunk: int | None = None) -> None:
        model = _session_model(model)
        if not model.traits.streams:
            raise UnsupportedError(f"{model.why_no_stream()}; StreamSession needs a model that streams")
        if not model.traits.causal:
            raise UnsupportedError("StreamSession needs a causal model; this one is bidirectional, so use a Decoder")
        if chunk is not None and chunk < 1:
            raise ConfigError(f"chunk = {chunk}: must be at least 1")
        self.model: Any = model.eval()
        segment = model.traits.segment or 256
        self.chunk = chunk or segment * -(-256 // segment)
        logits = torch.zeros(1, model.vocab_size, **device_and_dtype(model)._asdict())
        self._move_to(SessionState(model.init_state(1), logits), 0)

    @property
    def position(self) -> int:
        """Number of tokens fed and generated since the start or the last reset."""
        return self._progress.position

    @property
    def nbytes(self) -> int:
        """Exact number of bytes of the model's state."""
        return states.nbytes(self._state.model)

    @property
    def logits(self) -> Tensor:
        """Logits (vocab_size,) of the next token; zeros before the first token."""
        return self._state.logits[0]

    @torch.no_grad()
    def feed(self, tokens: Tensor | Sequence[int], *, losses: bool = False) -> Tensor:
        """Read tokens.

        Args:
            tokens: (n,) or (1, n) token ids, any n.
            losses: return the loss of each token instead of the last prediction.

        Returns:
            (vocab_size,) logits of the token after the last; or, with `losses`, (n,) nats of each token given all
            before it (for the first of a stream log(vocab_size)).

        Raises:
            DataError: a token id outside the vocabulary. The chunks before it have been read.
        """
        if losses:
            return self._score(tokens, likeliest=False).nats
        for part in self._parts(tokens):
            with states.owned(self._progress.undo):
                last, next_state = self.model.last(part, self._progress.state.model)
            self._advance(next_state, last, part.shape[1])
        return self._state.logits[0]

    def score(self, tokens: Tensor | Sequence[int]) -> Scores:
        """Read tokens as `feed` does; return the loss of each token and whether it was the likeliest."""
        return self._score(tokens, likeliest=True)

    @torch.no_grad()
    def _score(self, tokens: Tensor | Sequence[int], *, likeliest: bool) -> Scores:
        """Read tokens and compute the loss of each and, with `likeliest`, whether no other token was likelier."""
        nats, likeliest_of = [self._state.logits.new_zeros(0)], [self._state.logits.new_zeros(0, dtype=torch.bool)]
        for part in self._parts(tokens):
            with states.owned(self._progress.undo):
                logits, next_state = self.model(part, self._progress.state.model)
                for first in range(0, part.shape[1], _SCORED):
                    # a few rows at a time, because a copy of all logits is large with a large vocabulary
                    targets = part[0, first : first + _SCORED]
                    rows = logits[0, max(first - 1, 0) : first + len(targets) - 1]
                    before = rows if first else torch.cat([self._progress.state.logits, rows])
                    nats.append(F.cross_entropy(before.float(), targets, reduction="none"))
                    if likeliest:
                        likeliest_of.append(before.argmax(-1) == targets)
                last = logits[:, -1].clone()
            self._advance(next_state, last, part.shape[1])
        return Scores(torch.cat(nats), torch.cat(likeliest_of))

    def _parts(self, tokens: Tensor | Sequence[int]) -> Iterator[Tensor]:
        """Yield chunks (1, n) of tokens that end where the position is a multiple of `chunk`."""
        tokens = torch.as_tensor(tokens, dtype=torch.int64).to(self._state.logits.device)
        if tokens.ndim == 2 and tokens.shape[0] == 1:
            tokens = tokens[0]
        if tokens.ndim != 1:
            raise ConfigError(f"a session reads one sequence: tokens have shape {tuple(tokens.shape)}, expected (n,)")
        first = 0
        while first < len(tokens):
            count = min(self.chunk - self.position % self.chunk, len(tokens) - first)
            yield tokens[None, first : first + count]
            first += count

    def _advance(self, state: Any, logits: Tensor, count: int) -> None:
        """Store the state and logits after a call that read `count` tokens."""
        self._move_to(SessionState(state, logits), self._progress.position + count)

    def _move_to(self, state: SessionState, position: int) -> None:
        """Set state and position by one assignment, and drop the record of in-place writes."""
        self._progress = _Progress(state, position, states.Undo())

    @property
    def _state(self) -> SessionState:
        """The current state, after undoing the in-place writes of an interrupted call."""
        # the last call may have been interrupted before its state was stored
        self._progress.undo.run()
        return self._progress.state

    def reset(self) -> None:
        """Start a new document with an empty state."""
        self._move_to(SessionState(self.model.init_state(1), torch.zeros_like(self._state.logits)), 0)

    def stream(
        self,
        n: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
        stop: Callable[[int], bool] | Collection[int] | int | None = None,
    ) -> Iterator[int]:
        """Generate up to n tokens, yielding each as soon as it is drawn; arguments as in `generate`."""
        if temperature < 0 or (top_k is not None and top_k < 1) or (top_p is not None and not 0 < top_p <= 1):
            raise ConfigError(
                f"temperature = {temperature}, top_k = {top_k}, top_p = {top_p}: "
                "expected temperature >= 0, top_k >= 1, 0 < top_p <= 1"
            )
        ending = frozenset([stop] if isinstance(stop, int) else () if stop is None or callable(stop) else stop)
        for _ in range(n):
            token = sample(self.logits, temperature, top_k, top_p, generator)
            self.feed([token])
            yield token
            if stop(token) if callable(stop) else token in ending:
                return

    def generate(
        self,
        n: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
        stop: Callable[[int], bool] | Collection[int] | int | None = None,
    ) -> list[int]:
        """Continue the sequence.

        Args:
            n: maximal number of tokens.
            temperature: divides the logits; 0 = always the likeliest token.
            top_k: draw only from the k likeliest tokens.
            top_p: draw only from the likeliest tokens that together reach this probability (Holtzman et al. 2020,
                section 3.1).
            generator: source of randomness; None = torch's default.
            stop: a token that ends the text, several of them, or a function of the token; the ending token is returned
                too. None = never.

        Returns:
            The new tokens; they have been fed too.
        """
        return list(self.stream(n, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator, stop=stop))

    def fork(self) -> "StreamSession":
        """Return an independent session with a copy of the state."""
        twin = StreamSession(self.model, chunk=self.chunk)
        twin._move_to(states.clone(self._state), self.position)
        return twin

    def save(self, path: str | Path) -> Path:
        """Write the session's state to a file, atomically.

        Raises:
            CheckpointError: not writable; an earlier file of that name is unchanged.
        """
        header = {
            "version": __version__,
            "model": model_hash(self.model),
            "draw": self.model.redraw_count,
            "position": self.position,
            "chunk": self.chunk,
        }
        return states.save(path, self._state, header)

    @classmethod
    def load(cls, model: Any, path: str | Path) -> "StreamSession":
        """Continue from a saved state, with identical results.

        Raises:
            CheckpointError: the file is missing, damaged, or the state of another model; the message says what differs.
        """
        session = cls(model)
        model = session.model
        state, header = states.load(path, like=session._state)
        weights, draws = accepted_hashes(model), "version (draw) of the random projections"
        for key, ours, what in (("model", weights, "weights or configuration"), ("draw", (model.redraw_count,), draws)):
            if (theirs := header.get(key)) not in ours:
                raise CheckpointError(
                    f"{path}: is the state of another model: {what}: {theirs} in the file, {ours[0]} in this model; "
                    "load it into the model that saved it"
                )
        session._move_to(state, int(header["position"]))
        session.chunk = int(header["chunk"])
        return session


def sample(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> int:
    """Draw one token id from logits (vocab_size,); see `StreamSession.generate` for the arguments."""
    if temperature == 0:
        return int(logits.argmax())
    values, tokens = (logits.float() / temperature).sort(descending=True)
    weights = values.softmax(0)
    if top_p is not None:
        # the likeliest token always stays
        weights = weights.masked_fill(weights.cumsum(0) - weights >= top_p, 0)
    if top_k is not None:
        weights[top_k:] = 0
    # drawn on the generator's device; None = on the logits' device
    index = torch.multinomial(weights if generator is None else weights.to(generator.device), 1, generator=generator)
    return int(tokens[index.to(tokens.device)])
