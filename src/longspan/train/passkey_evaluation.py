"""Evaluates whether a model retrieves a number hidden at some depth of a long text, of any length, in constant memory.

All depths share the text before the number, so it is read only once: the state is kept at each depth, and the rest of
the text is read from there, all samples of a depth in one batch.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from longspan import state as states
from longspan.models import Decoder, StackState
from longspan.process import resident_bytes
from longspan.stream import StreamSession
from longspan.tasks.synthetic import DEPTHS, Passkey, PasskeyTask, score
from longspan.tasks.tokenizers import Tokenizer

CHUNK = 4096
ANSWER = 12
"""tokens that a model which was not trained for the task may say"""


@dataclass
class PasskeyEvaluation:
    """Results of a passkey or needle task at one text length.

    Attributes:
        length: number of bytes per text.
        contained: per depth (percent), for each sample whether the answer contains the passkey.
        digits: per depth, the share of digits at their correct position, over all samples; empty if answers are free
            text.
        state_bytes: size of the state of one text at its end.
        tokens: number of tokens read; text shared between samples counts once.
        seconds: reading time.
        resident: largest memory use of the process while reading, in bytes; None if the system does not report it.
    """

    length: int
    contained: dict[int, list[bool]] = field(default_factory=dict)
    digits: dict[int, float] = field(default_factory=dict)
    state_bytes: int = 0
    tokens: int = 0
    seconds: float = 0.0
    resident: int | None = None

    @property
    def right(self) -> int:
        """Number of samples whose answer contains the passkey."""
        return sum(sum(answers) for answers in self.contained.values())

    @property
    def count(self) -> int:
        """Number of samples."""
        return sum(len(answers) for answers in self.contained.values())

    def record(self) -> dict[str, Any]:
        """Return the results as a dict for JSON, with `k` of `n` correct answers."""
        return {
            "length": self.length,
            "k": self.right,
            "n": self.count,
            "by_depth": {str(depth): [sum(right), len(right)] for depth, right in self.contained.items()},
            "digits": {str(depth): share for depth, share in self.digits.items()},
            "state_bytes": self.state_bytes,
            "tokens": self.tokens,
            "tokens_per_second": self.tokens / max(self.seconds, 1e-9),
            "seconds": self.seconds,
            "resident": self.resident,
        }


@torch.no_grad()
def evaluate_passkey(
    model: Decoder,
    task: PasskeyTask,
    *,
    depths: Sequence[int] = DEPTHS,
    count: int = 4,
    seed: int = 0,
    progress: Callable[[float], None] | None = None,
) -> PasskeyEvaluation:
    """Measure how many passkeys (numbers hidden in text) a model retrieves from texts of the task's `length`, by depth.

    The answer is generated greedily, one token per digit of the passkey. If all samples have the same filler, the
    shared text is read once.

    Args:
        model: a causal model that streams; it is put into evaluation mode.
        task: whose held-out texts are read.
        depths: of the passkey in the text, in percent.
        count: number of samples per depth, read as one batch.
        seed: of the samples.
        progress: called with the share of the work that is done, 0 to 1.

    Returns:
        Correct answers per depth, and the size of the state, the memory use and the time of reading.
    """
    model.eval()
    measured, started = PasskeyEvaluation(task.config.length), time.perf_counter()
    ordered = sorted(set(depths))
    samples = [task.parts(np.random.default_rng([seed, index, 3]), "validation") for index in range(count)]
    shared = len({part.filler for part in samples}) == 1
    groups = [samples] if shared else [[part] for part in samples]
    for number, group in enumerate(groups):
        for done, (depth, state) in enumerate(_prefixes(model, task, group[0], ordered, measured)):
            _ask(model, task, group, depth, state, measured)
            if progress is not None:
                progress((number + (done + 1) / len(ordered)) / len(groups))
            measured.resident = max(measured.resident or 0, resident_bytes() or 0) or None
    measured.seconds = time.perf_counter() - started
    return measured


@torch.no_grad()
def evaluate_passkey_in_words(
    model: Any,
    task: PasskeyTask,
    tokenizer: Tokenizer,
    *,
    depths: Sequence[int] = DEPTHS,
    count: int = 4,
    seed: int = 0,
    progress: Callable[[float], None] | None = None,
) -> PasskeyEvaluation:
    """Measure the same of a model that was not trained for the task, with any tokenizer.

    The text is read as that of a document. The answer is free text, 12 greedy tokens, and is correct if it contains the
    number, spaces aside.

    Args:
        model: a causal language model that streams; it is put into evaluation mode.
        task: whose held-out texts are read.
        tokenizer: of the model.
        depths: of the number in the text, in percent.
        count: number of samples per depth.
        seed: of the samples.
        progress: called with the share of the work that is done, 0 to 1.

    Raises:
        UnsupportedError: the model does not stream.
    """
    measured, started = PasskeyEvaluation(task.config.length), time.perf_counter()
    ordered = sorted(set(depths))
    for number in range(count):
        part, done = task.parts(np.random.default_rng([seed, number, 3]), "validation"), 0
        session, read_before = StreamSession(model), 0
        session.feed([tokenizer.begin, *tokenizer.encode(part.head).tolist()])
        for index, depth in enumerate(ordered):
            end = part.place(depth)
            session.feed(tokenizer.encode(part.filler[done:end]).tolist())
            measured.tokens += session.position - read_before
            asking, done, read_before = session.fork(), end, session.position
            # models end words before spaces, so the question ends without one
            asking.feed(tokenizer.encode(part.told + part.filler[end:] + part.asked.rstrip()).tolist())
            measured.tokens += asking.position - read_before
            answer = tokenizer.decode(asking.generate(ANSWER, temperature=0))
            measured.contained.setdefault(depth, []).append(part.number in answer.replace(b" ", b""))
            measured.state_bytes = asking.nbytes
            if progress is not None:
                progress((number + (index + 1) / len(ordered)) / count)
            measured.resident = max(measured.resident or 0, resident_bytes() or 0) or None
    measured.seconds = time.perf_counter() - started
    return measured


def _prefixes(
    model: Decoder, task: PasskeyTask, part: Passkey, depths: Sequence[int], measured: PasskeyEvaluation
) -> Iterator[tuple[int, StackState]]:
    """Yield each depth with the model's state before the passkey at that depth; the text is read once for all depths.

    Args:
        model: to read with.
        task: of the texts.
        part: the sample whose text is read.
        depths: of the passkey in the filler, in percent, ascending.
        measured: results, to whose `tokens` the tokens that are read are added.

    Yields:
        The depth, and the state (one row) after the text before the passkey.
    """
    done, begin = 0, torch.tensor([[task.tokenizer.begin]])
    state = read(model, _tokens([part.head]), read(model, begin, model.init_state(1)))
    for depth in depths:
        end = part.place(depth)
        state = read(model, _tokens([part.filler[done:end]]), state)
        measured.tokens += end - done
        done = end
        yield depth, state


def _ask(
    model: Decoder, task: PasskeyTask, group: list[Passkey], depth: int, state: StackState, measured: PasskeyEvaluation
) -> None:
    """Continue from the state with passkey, rest of the text and question, one row per sample, and score the answers.

    Args:
        model: to read with.
        task: of the texts.
        group: samples, one per row.
        depth: of the passkey in the filler, in percent.
        state: of one row, after the text before the passkey.
        measured: results to add to.
    """
    rows = states.select(state, torch.zeros(len(group), dtype=torch.int64, device=state.live.device))
    texts = [part.told + part.filler[part.place(depth) :] + part.asked for part in group]
    tokens = _tokens(texts).to(state.live.device)
    measured.tokens += tokens.numel()
    rows = read(model, tokens[:, :-1], rows)
    token, generated = tokens[:, -1:], []
    for _ in range(task.config.digits):
        logits, rows = cast("tuple[Tensor, StackState]", model.last(token, rows))
        token = logits.argmax(-1, keepdim=True)
        generated.append(token)
    answers = torch.cat(generated, 1).tolist()
    scores = [score(list(part.number), answer) for part, answer in zip(group, answers, strict=True)]
    measured.contained.setdefault(depth, []).extend(whole for _, whole in scores)
    count = len(measured.contained[depth])
    share = sum(right for right, _ in scores)
    measured.digits[depth] = (measured.digits.get(depth, 0.0) * (count - len(group)) + share) / count
    measured.state_bytes = states.nbytes(states.select(rows, rows.live.new_zeros(1)))


def _tokens(texts: Sequence[bytes]) -> Tensor:
    """Return texts of equal length as byte tokens, (texts, length) int64."""
    return torch.from_numpy(np.stack([np.frombuffer(text, dtype=np.uint8) for text in texts]).astype(np.int64))


def read(model: Decoder, tokens: Tensor, state: StackState) -> StackState:
    """Feed tokens, (batch, length), to a model in chunks that end at multiples of 4,096 positions; return the state."""
    first, tokens = 0, tokens.to(state.live.device)
    while first < tokens.shape[1]:
        last = min(first + CHUNK - int(state.live[0]) % CHUNK, tokens.shape[1])
        state, first = cast(StackState, model.last(tokens[:, first:last], state)[1]), last
    return state
