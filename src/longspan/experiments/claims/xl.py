"""`xl`: memory beats none, longer memory at evaluation helps, the reach exceeds a segment, streaming reads nothing
twice.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from longspan.experiments.claims.base import Claim, Figure, Say, signed
from longspan.experiments.claims.continued import (
    Comparison,
    Criterion,
    Judgment,
    Plan,
    Results,
    TrainedRuns,
    ahead,
    bit_figures,
    criteria_text,
    from_recipe,
    grade,
    if_flat,
    measure_with,
    plans,
)
from longspan.experiments.figures import picture_of
from longspan.models import build_model, describe_model, load_weights
from longspan.report import Picture
from longspan.report.figures import Mark, Series, line_figure
from longspan.stream import StreamSession
from longspan.train import evaluate_text
from longspan.train.evaluate import Evaluation

OURS, ALONE = "transformer_xl", "segments_relative"
"""The model, and the same without memory, which reads every segment alone."""
TRAINED = 128
"""length of the memory and of a segment in training"""


@dataclass(frozen=True, kw_only=True)
class XlPlan(Plan):
    """Sizes of the comparison; memory lengths at evaluation, and tokens to time."""

    lengths: tuple[int, ...] = (0, 16, 32, 64, 128, 256, 512, 1024)
    """memory lengths at evaluation, on the held-out text of the curves; the first is 0"""
    timed: int = 256
    """number of tokens to predict one by one"""
    rounds: int = 3
    """rounds of timing both ways of prediction, alternating"""


PLANS = plans(
    XlPlan,
    tiny={"lengths": (0, 128), "timed": 3, "rounds": 1},
    small={"lengths": (0, 64, 128), "timed": 64, "rounds": 1},
)


def with_memory(model: Any, length: int) -> Any:
    """Return a model with the same weights and another memory length, in evaluation mode."""
    table = describe_model(model)
    table["mixers"] = [{**mixer, "mem_len": length} for mixer in table["mixers"]]
    resized = build_model(table)
    load_weights(resized, model.state_dict(), "xl")
    return resized.eval()


def by_length(model: Any, documents: Any, lengths: Sequence[int]) -> dict[str, Any]:
    """Return nats of each document for each length of memory."""
    records: dict[str, Any] = {"names": list(documents.names)}
    for length in lengths:
        records[str(length)] = evaluate_text(with_memory(model, length), documents, chunk=TRAINED).record()
    return records


def _evaluation(records: Mapping[str, Any], length: int) -> Evaluation:
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
def speed(model: Any, tokens: torch.Tensor, plan: XlPlan) -> dict[str, float]:
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


def inspect(runs: TrainedRuns, say: Say, plan: XlPlan) -> dict[str, Any]:
    """Return losses by the length of the memory, speed and reach of the trained model; empty if it failed."""
    if not runs.seeds(OURS):
        return {}
    model, task = runs.opened(OURS)
    chosen = runs.documents(task, plan.curve_documents, plan.curve_reach)
    losses = runs.once("by-length", lambda: by_length(model, chosen, plan.lengths))
    say("read with memories of every length")
    longest = max(task.documents("validation").items, key=len)
    length = 2 * TRAINED + plan.timed + 1
    tokens = torch.from_numpy(np.asarray(longest.cut(0, max(length, 1024)).tokens)).long()
    return {
        "losses": losses,
        "speed": runs.once("speed", lambda: speed(model, tokens, plan)),
        "reach": runs.once("reach", lambda: {"tokens": reach(model, TRAINED, tokens[:1024])}),
        "layers": model.config.num_layers,
    }


def judge(results: Results, plan: XlPlan) -> Judgment:
    """Judge the claim: better than the same model without memory, and longer memories are better."""
    figures = bit_figures(results, ALONE, {OURS: "24.0 (WikiText-103; vanilla Transformer 26.8 and more)"})
    criteria = [ahead(results, OURS, ALONE)]
    pictures = []
    if results.inspected:
        losses, rate = results.inspected["losses"], _rate(results)
        farthest = results.inspected["reach"]["tokens"]
        evaluations = {length: _evaluation(losses, length) for length in plan.lengths}
        values = [evaluation.bits_per_unit for evaluation in evaluations.values()]
        best = evaluations[TRAINED].minus(evaluations[0])
        falls = all(b <= a for a, b in pairwise(values))
        criteria += [
            Criterion(
                what="The loss falls with every longer memory at evaluation, and the memory of the training is better "
                "than none with an interval below zero",
                met=if_flat(results, [OURS], best.high < 0 and falls),
                measured=f"{signed(best)}; falls with every longer memory: {'yes' if falls else 'no'}",
            ),
            Criterion(
                what="Streaming is faster than rereading", met=rate > 1, measured=f"{rate:.0f} times", suffices=False
            ),
            Criterion(
                what="The reach exceeds segment and memory",
                met=farthest > 2 * TRAINED,
                measured=f"{farthest:,} tokens",
                suffices=False,
            ),
        ]
        figures += [*_length_figures(evaluations), *_use_figures(results)]
        pictures = [_picture(values, plan)]
    return Judgment(
        verdict=grade(criteria),
        figures=figures,
        note=f"{criteria_text(criteria)} The model was trained with a memory of {TRAINED}, so longer ones are an "
        f"extrapolation; they are read on the first {plan.curve_reach:,} bytes of {plan.curve_documents} documents.",
        pictures=pictures,
    )


def _rate(results: Results) -> float:
    """Return how many times faster streaming is than rereading a window for every token."""
    seconds = results.inspected["speed"]
    return float(seconds["reading anew"] / seconds["streaming"])


def _length_figures(evaluations: Mapping[int, Evaluation]) -> list[Figure]:
    """Return a row per length of the memory at evaluation."""
    none = evaluations[0]
    return [
        Figure(
            f"bits per byte with a memory of {length:,} at evaluation",
            "falls with memory" if length else "",
            f"{evaluation.bits_per_unit:.4f}" + (f" ({signed(evaluation.minus(none))})" if length else ""),
        )
        for length, evaluation in evaluations.items()
    ]


def _use_figures(results: Results) -> list[Figure]:
    """Return the rows of speed and reach."""
    streaming = results.inspected["speed"]["streaming"]
    farthest, layers = results.inspected["reach"]["tokens"], results.inspected["layers"]
    return [
        Figure(
            f"times faster than rereading {2 * TRAINED} tokens for each token",
            "363 to 1,874, at 800 to 3,800 tokens on a GPU",
            f"{_rate(results):.0f} (CPU, one token {1000 * streaming:.1f} ms)",
        ),
        Figure(
            "distance of the farthest token that affects the last prediction, of 1,024",
            "layers x memory",
            f"{farthest:,} ({layers} layers, memory and segment of {TRAINED})",
        ),
    ]


def _picture(values: Sequence[float], plan: XlPlan) -> Picture:
    """Plot held-out bits per byte against the length of the memory."""
    return picture_of(
        line_figure,
        "xl",
        [Series(x=list(plan.lengths), y=list(values), kind="marked")],
        xlabel="length of the memory at evaluation",
        ylabel="held-out bits per byte",
        marks=[Mark(TRAINED, "in training")],
        xscale="log2",
        xticks=list(plan.lengths),
        alt="Held-out bits per byte against the length of the memory at evaluation.",
    )


def comparison(plan: XlPlan) -> Comparison:
    """Return the comparison at a size."""
    return Comparison(
        name="xl",
        models=[from_recipe(OURS), from_recipe(ALONE)],
        pairs=[(OURS, ALONE)],
        judge=lambda results: judge(results, plan),
        inspect=lambda runs, say: inspect(runs, say, plan),
    )


XL = Claim(
    name="xl",
    system="Transformer-XL",
    source="Dai et al. 2019, sections 4.1, 4.3 and 4.4, tables 1, 8 and 9",
    text="Memory is better than none, also longer than in training and beyond the segment, and streaming reads nothing "
    "twice.",
    parallel=measure_with(comparison),
    minutes={"tiny": 0.2, "small": 4, "full": 80},
    plans=PLANS,
)
