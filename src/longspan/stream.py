"""One endless sequence through a model: feed, generate, save, load, fork, in constant memory where the mixers allow."""

from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import longspan.state as states
from longspan.contract.maps import place_of
from longspan.errors import CheckpointError, ConfigError, UnsupportedError
from longspan.models import RecurrentState, StackState, accepted_hashes, model_hash
from longspan.models.wrappers import OPENERS, unwrapped
from longspan.version import __version__

# predictions that are scored at once
_SCORED = 64


class SessionState(NamedTuple):
    """The model's state between two tokens, and the prediction (1, vocab_size) of the next; zeros before the first."""

    model: StackState | RecurrentState
    logits: Tensor

    @property
    def live(self) -> Tensor:
        """(1,) tokens since the last reset."""
        return self.model.live


class _Place(NamedTuple):
    """Where a session is, with what the call that is under way has written into its state (`undo`). It moves by one
    assignment, so that no interruption finds it half-way.
    """

    state: SessionState
    position: int
    undo: states.Undo


class Scores(NamedTuple):
    """Of tokens that were read, on the model's device: the nats (n,) that each cost given all before it (the first of a
    stream: given nothing, log(vocab_size)), and whether (n,) no other token was likelier.
    """

    nats: Tensor
    likeliest: Tensor


def _streaming(model: Any) -> Any:
    """What a session calls: the model inside all that stands around it; a ConfigError where it is none of ours."""
    whole = model if hasattr(model, "traits") else unwrapped(model)
    for opener in () if hasattr(whole, "traits") else OPENERS:
        opened = opener(whole)
        if opened is not None:
            return opened
    if not hasattr(whole, "traits") or not hasattr(whole, "last"):
        raise ConfigError(
            f"StreamSession reads a Decoder, a RecurrentMemory or a model of longspan.hf, not {type(whole).__name__}"
        )
    return whole


class StreamSession:
    """One sequence, as long as it likes, through a causal model.

    Args:
        model: a Decoder whose mixers stream, or a RecurrentMemory over one; such a model as a
            `LongspanForCausalLM`, or one that `longspan.hf` converted, perhaps inside PEFT. It is put into evaluation
            mode.
        chunk: tokens computed at once. Chunks end where the position is a multiple of it, so how the text is cut into
            `feed` calls hardly matters; default: the model's segment, at least 256 tokens.

    Raises:
        UnsupportedError: a layer of the model does not stream, or it is not converted.
        ConfigError: no model of this library.
    """

    def __init__(self, model: Any, *, chunk: int | None = None) -> None:
        model = _streaming(model)
        if not model.traits.streams:
            raise UnsupportedError(f"{model.why_no_stream()}; StreamSession needs a model that streams")
        if not model.traits.causal:
            raise UnsupportedError("StreamSession predicts the next token; this model sees both sides of every token")
        if chunk is not None and chunk < 1:
            raise ConfigError(f"chunk = {chunk}: must be at least 1")
        self.model: Any = model.eval()
        segment = model.traits.segment or 256
        self.chunk = chunk or segment * -(-256 // segment)
        logits = torch.zeros(1, model.vocab_size, **place_of(model)._asdict())
        self._settle(SessionState(model.init_state(1), logits), 0)

    @property
    def position(self) -> int:
        """Tokens fed and generated since the start or the last reset."""
        return self._place.position

    @property
    def nbytes(self) -> int:
        """Exact bytes of the model's state."""
        return states.nbytes(self._state.model)

    @property
    def logits(self) -> Tensor:
        """(vocab_size,) logits of the next token; zeros before the first token."""
        return self._state.logits[0]

    @torch.no_grad()
    def feed(self, tokens: Tensor | Sequence[int], *, losses: bool = False) -> Tensor:
        """Read tokens.

        Args:
            tokens: (n,) or (1, n) token ids, any n.
            losses: return what each token cost instead of the last prediction.

        Returns:
            (vocab_size,) logits of the token after the last; or, with `losses`, (n,) nats of each token given all
            before it (the first of a stream: given nothing, log(vocab_size)).

        Raises:
            DataError: a token outside the vocabulary. What came before its chunk has been read.
        """
        if losses:
            return self._score(tokens, likeliest=False).nats
        for part in self._parts(tokens):
            with states.owned(self._place.undo):
                last, next_state = self.model.last(part, self._place.state.model)
            self._advance(next_state, last, part.shape[1])
        return self._state.logits[0]

    def score(self, tokens: Tensor | Sequence[int]) -> Scores:
        """Read tokens as `feed` does, and say of each what it cost and whether it was the likeliest."""
        return self._score(tokens, likeliest=True)

    @torch.no_grad()
    def _score(self, tokens: Tensor | Sequence[int], *, likeliest: bool) -> Scores:
        nats, likeliest_of = [self._state.logits.new_zeros(0)], [self._state.logits.new_zeros(0, dtype=torch.bool)]
        for part in self._parts(tokens):
            with states.owned(self._place.undo):
                logits, next_state = self.model(part, self._place.state.model)
                for first in range(0, part.shape[1], _SCORED):
                    # of a large vocabulary a few rows at a time, so that no copy of all logits is made
                    targets = part[0, first : first + _SCORED]
                    rows = logits[0, max(first - 1, 0) : first + len(targets) - 1]
                    before = rows if first else torch.cat([self._place.state.logits, rows])
                    nats.append(F.cross_entropy(before.float(), targets, reduction="none"))
                    if likeliest:
                        likeliest_of.append(before.argmax(-1) == targets)
                last = logits[:, -1].clone()
            self._advance(next_state, last, part.shape[1])
        return Scores(torch.cat(nats), torch.cat(likeliest_of))

    def _parts(self, tokens: Tensor | Sequence[int]) -> Iterator[Tensor]:
        """Chunks (1, n) that end where the position is a multiple of the chunk."""
        tokens = torch.as_tensor(tokens, dtype=torch.int64).to(self._state.logits.device)
        if tokens.ndim == 2 and tokens.shape[0] == 1:
            tokens = tokens[0]
        if tokens.ndim != 1:
            raise ConfigError(f"a session reads one sequence: tokens are {tuple(tokens.shape)}, expected (n,)")
        first = 0
        while first < len(tokens):
            count = min(self.chunk - self.position % self.chunk, len(tokens) - first)
            yield tokens[None, first : first + count]
            first += count

    def _advance(self, state: Any, logits: Tensor, count: int) -> None:
        self._settle(SessionState(state, logits), self._place.position + count)

    def _settle(self, state: SessionState, position: int) -> None:
        self._place = _Place(state, position, states.Undo())

    @property
    def _state(self) -> SessionState:
        # an interruption may have come behind a call and before the session moved
        self._place.undo.run()
        return self._place.state

    def reset(self) -> None:
        """Begin a new document: everything carried is emptied."""
        self._settle(SessionState(self.model.init_state(1), torch.zeros_like(self._state.logits)), 0)

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
        """Like `generate`, one token at a time as they come."""
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
            n: tokens at most.
            temperature: divides the logits; 0 = always the likeliest token.
            top_k: draw among the k likeliest only.
            top_p: draw among the likeliest that together reach this probability (Holtzman et al. 2020, section 3.1).
            generator: source of randomness; None = torch's own.
            stop: a token that ends the text, several of them, or a function of the token; the ending token is
                returned too. None: never.

        Returns:
            The new tokens; they have been fed too.
        """
        return list(self.stream(n, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator, stop=stop))

    def fork(self) -> "StreamSession":
        """An independent session at the same place."""
        twin = StreamSession(self.model, chunk=self.chunk)
        twin._settle(states.clone(self._state), self.position)
        return twin

    def save(self, path: str | Path) -> Path:
        """Write the session's state to a file, atomically.

        Raises:
            CheckpointError: not writable; an earlier file still stands.
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
        """Go on from a saved state as if nothing had happened.

        Raises:
            CheckpointError: missing, damaged, or the state of another model; says what differs.
        """
        session = cls(model)
        model = session.model
        state, header = states.load(path, like=session._state)
        weights, draws = accepted_hashes(model), "draw number of the random projections"
        for key, ours, what in (("model", weights, "weights or configuration"), ("draw", (model.redraw_count,), draws)):
            if (theirs := header.get(key)) not in ours:
                raise CheckpointError(f"{path}: the state of another model: {what}: {theirs} there, {ours[0]} here")
        session._settle(state, int(header["position"]))
        session.chunk = int(header["chunk"])
        return session


def sample(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> int:
    """Draw one token from logits (vocab_size,); see `StreamSession.generate`."""
    if temperature == 0:
        return int(logits.argmax())
    values, tokens = (logits.float() / temperature).sort(descending=True)
    weights = values.softmax(0)
    if top_p is not None:
        # the likeliest token always stays
        weights = weights.masked_fill(weights.cumsum(0) - weights >= top_p, 0)
    if top_k is not None:
        weights[top_k:] = 0
    # drawn where the generator is; None = the one of the logits' device
    index = torch.multinomial(weights if generator is None else weights.to(generator.device), 1, generator=generator)
    return int(tokens[index.to(tokens.device)])
