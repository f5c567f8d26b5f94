"""`xl`: longer memory at evaluation helps, the reach exceeds a segment, and streaming reads nothing twice."""

import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from longspan.experiments.claims.base import Claim, Figure, Outcome, Say, graded, signed
from longspan.experiments.claims.runs import measure_once, read_recipe, train_or_resume, trained_seconds
from longspan.experiments.figures import picture_of
from longspan.models import build_model, describe_model, load_weights
from longspan.report import Picture
from longspan.report.figures import Mark, Series, line_figure
from longspan.stream import StreamSession
from longspan.tasks.base import heads
from longspan.train import evaluate_text, load_run
from longspan.train.evaluate import Evaluation


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Sizes: training steps, memory lengths at evaluation, bytes of each held-out document, tokens to time."""

    steps: int
    lengths: tuple[int, ...]
    head: int
    documents: int
    timed: int
    """number of tokens to predict one by one"""
    rounds: int
    """rounds of timing both ways of prediction, alternating"""


PLANS: dict[str, Plan] = {
    "small": Plan(steps=60, lengths=(0, 128), head=1024, documents=4, timed=64, rounds=1),
    "full": Plan(
        steps=2000, lengths=(0, 16, 32, 64, 128, 256, 512, 1024), head=16_384, documents=0, timed=256, rounds=3
    ),
}
TRAINED = 128
"""length of the memory and of a segment in training"""


def with_memory(model: Any, length: int) -> Any:
    """Return a model with the same weights and another memory length, in evaluation mode."""
    table = describe_model(model)
    table["mixers"] = [{**mixer, "mem_len": length} for mixer in table["mixers"]]
    resized = build_model(table)
    load_weights(resized, model.state_dict(), "xl")
    return resized.eval()


def by_length(model: Any, documents: Any, lengths: tuple[int, ...]) -> dict[str, Any]:
    """Return nats of each document for each length of memory."""
    records: dict[str, Any] = {"names": list(documents.names)}
    for length in lengths:
        records[str(length)] = evaluate_text(with_memory(model, length), documents, chunk=TRAINED).record()
    return records


def _evaluation(records: dict[str, Any], length: int) -> Evaluation:
    """Return the evaluation with one length of memory from the records of `by_length`."""
    return Evaluation.of(records[str(length)], records["names"])


@torch.no_grad()
def reach(model: Any, length: int, tokens: torch.Tensor) -> int:
    """Return the distance to the farthest of tokens (length,) that affects the last prediction."""
    base = model(tokens[None], None)[0][0, -1]
    low, high = 0, len(tokens) - 1
    # visible tokens are an interval that ends at the last one, so bisection finds its start
    while low < high:
        middle = (low + high) // 2
        changed = tokens.clone()
        changed[: middle + 1] = (changed[: middle + 1] + 1) % model.vocab_size
        if torch.equal(model(changed[None], None)[0][0, -1], base):
            low = middle + 1
        else:
            high = middle
    return len(tokens) - 1 - low


@torch.no_grad()
def speed(model: Any, tokens: torch.Tensor, plan: Plan) -> dict[str, float]:
    """Return CPU seconds per token of streaming, and of rereading a window for every token, timed in turns."""
    span = 2 * TRAINED
    # keys of saved records
    seconds: dict[str, list[float]] = {"streaming": [], "reading anew": []}
    for _ in range(plan.rounds):
        session = StreamSession(model)
        session.feed(tokens[:span])
        started = time.process_time()
        for index in range(plan.timed):
            session.feed(tokens[span + index : span + index + 1])
        seconds["streaming"].append((time.process_time() - started) / plan.timed)
        started = time.process_time()
        for index in range(plan.timed):
            model.last(tokens[None, index + 1 : span + index + 1])
        seconds["reading anew"].append((time.process_time() - started) / plan.timed)
    return {name: float(np.median(values)) for name, values in seconds.items()}


def measure(folder: Path, plan: Plan, say: Say) -> Outcome:
    """Train once, then measure; a second call resumes from the folder."""
    run = folder / "run"
    train_or_resume(read_recipe("quickstart-lm", steps=plan.steps, eval_every=0, final_eval_tokens=2000), run)
    say("trained")
    model, task = load_run(run)
    documents = task.documents("validation")
    chosen = heads(documents, plan.head, plan.documents)
    losses = measure_once(folder / "by-length.json", lambda: by_length(model, chosen, plan.lengths))
    say("read with memories of every length")
    length = 2 * TRAINED + plan.timed + 1
    tokens = torch.from_numpy(np.asarray(documents[0].cut(0, max(length, 2048)).tokens)).long()
    measured = {
        "losses": losses,
        "speed": measure_once(folder / "speed.json", lambda: speed(model, tokens, plan)),
        "reach": measure_once(folder / "reach.json", lambda: {"tokens": reach(model, TRAINED, tokens[:1024])}),
    }
    return outcome(measured, plan, trained_seconds([run]), model.config.num_layers)


def outcome(measured: dict[str, Any], plan: Plan, seconds: float, layers: int) -> Outcome:
    """Judge the claim by its measurements: return the verdict, the numbers next to the paper's, and plots."""
    losses = measured["losses"]
    none = _evaluation(losses, plan.lengths[0])
    figures, values = [], []
    for length in plan.lengths:
        evaluation = _evaluation(losses, length)
        minus = evaluation.minus(none)
        values.append(evaluation.bits_per_unit)
        figures.append(
            Figure(
                f"bits per byte with a memory of {length:,}",
                "falls with memory" if length else "",
                f"{values[-1]:.4f}" + (f" ({signed(minus)})" if length else ""),
            )
        )
    rate = measured["speed"]["reading anew"] / measured["speed"]["streaming"]
    figures += [
        Figure(
            f"times faster than rereading {2 * TRAINED} tokens for each token",
            "363 to 1,874, at 800 to 3,800 tokens on a GPU",
            f"{rate:.0f} (CPU, one token {1000 * measured['speed']['streaming']:.1f} ms)",
        ),
        Figure(
            "distance of the farthest token that affects the last prediction, of 1,024",
            "layers x memory",
            f"{measured['reach']['tokens']:,} ({layers} layers, memory and segment of {TRAINED})",
        ),
    ]
    best = _evaluation(losses, TRAINED).minus(none)
    falls = all(b <= a for a, b in pairwise(values))
    beyond = measured["reach"]["tokens"] > TRAINED
    return Outcome(
        verdict=graded(best.high < 0 and falls and rate > 1 and beyond, best.high < 0),
        figures=figures,
        size=f"4 layers of 128, segments and memory of {TRAINED}, bytes of State of the Union speeches, {plan.steps:,} "
        f"steps of 1,024 bytes; held-out text: the first {plan.head:,} bytes of {len(losses['names'])} speeches; 95 % "
        "intervals by bootstrap over documents",
        note=f"Bits per byte fall with every longer memory: {'yes' if falls else 'no'}. The model was trained with a "
        f"memory of {TRAINED}, so longer ones are an extrapolation.",
        data=measured,
        pictures=[_picture(values, plan)],
        seconds=seconds,
    )


def _picture(values: list[float], plan: Plan) -> Picture:
    """Plot held-out bits per byte against the length of the memory."""
    return picture_of(
        line_figure,
        "xl",
        [Series(x=list(plan.lengths), y=values, kind="marked")],
        xlabel="length of the memory at evaluation",
        ylabel="held-out bits per byte",
        marks=[Mark(TRAINED, "in training")],
        xscale="log2",
        xticks=list(plan.lengths),
        alt="Held-out bits per byte against the length of the memory at evaluation.",
    )


XL = Claim(
    name="xl",
    system="Transformer-XL",
    source="Dai et al. 2019, sections 4.1, 4.3 and 4.4, tables 8 and 9",
    text="Memory reaches beyond the segment, more memory at evaluation is better, and streaming reads nothing twice.",
    measure=measure,
    minutes={"small": 1, "full": 12},
    plans=PLANS,
)
