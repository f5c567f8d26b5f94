"""Whether a number told at a depth of a long text is found again, at any length, in constant memory.

The text before the number is the same for every depth, so it is read once: the state is kept where each depth begins,
and what follows is read from there, all samples of a depth side by side.
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
from longspan.tasks.synthetic import DEPTHS, Passkey, PasskeyTask, score

CHUNK = 4096


@dataclass
class PasskeyEvaluation:
    """What was found at one length.

    Attributes:
        length: tokens of each text.
        contained: by depth (percent), of each sample whether the answer holds the number.
        digits: by depth, the share of digits said at their places, over its samples.
        state_bytes: of the state of one text at its end.
        tokens: that were read, shared ones counted once.
        seconds: of reading.
        resident: most bytes of memory the process held meanwhile; None where the system does not say.
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
        """Samples whose answer holds the number."""
        return sum(sum(answers) for answers in self.contained.values())

    @property
    def count(self) -> int:
        """All samples."""
        return sum(len(answers) for answers in self.contained.values())

    def record(self) -> dict[str, Any]:
        """Plain data."""
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
    """Ask for numbers told at each depth, in texts as long as the task's `length`; texts of a task with the same filler
    in every sample share what they have read.

    Args:
        model: a causal model that streams; put into evaluation mode.
        task: its held-back texts; the answer is generated greedily, as many tokens as the number has digits.
        depths: in percent.
        count: samples of each depth, side by side.
        seed: of the samples.
        progress: called with the share that is done.
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


def _prefixes(
    model: Decoder, task: PasskeyTask, part: Passkey, depths: Sequence[int], measured: PasskeyEvaluation
) -> Iterator[tuple[int, StackState]]:
    """Each depth, and the state after all that stands before the number there."""
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
    """Read what follows the state, a row for each sample, and generate the answers."""
    rows = states.select(state, torch.zeros(len(group), dtype=torch.int64, device=state.live.device))
    told = [part.told + part.filler[part.place(depth) :] + part.asked for part in group]
    tokens = _tokens(told).to(state.live.device)
    measured.tokens += tokens.numel()
    rows = read(model, tokens[:, :-1], rows)
    token, said = tokens[:, -1:], []
    for _ in range(task.config.digits):
        logits, rows = cast("tuple[Tensor, StackState]", model.last(token, rows))
        token = logits.argmax(-1, keepdim=True)
        said.append(token)
    answers = torch.cat(said, 1).tolist()
    scores = [score(list(part.number), answer) for part, answer in zip(group, answers, strict=True)]
    measured.contained.setdefault(depth, []).extend(whole for _, whole in scores)
    count = len(measured.contained[depth])
    share = sum(right for right, _ in scores)
    measured.digits[depth] = (measured.digits.get(depth, 0.0) * (count - len(group)) + share) / count
    measured.state_bytes = states.nbytes(states.select(rows, rows.live.new_zeros(1)))


def _tokens(texts: Sequence[bytes]) -> Tensor:
    return torch.from_numpy(np.stack([np.frombuffer(text, dtype=np.uint8) for text in texts]).astype(np.int64))


def read(model: Decoder, tokens: Tensor, state: StackState) -> StackState:
    """Read tokens in chunks that end where a segment does."""
    first, tokens = 0, tokens.to(state.live.device)
    while first < tokens.shape[1]:
        last = min(first + CHUNK - int(state.live[0]) % CHUNK, tokens.shape[1])
        state, first = cast(StackState, model.last(tokens[:, first:last], state)[1]), last
    return state
