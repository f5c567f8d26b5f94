"""`xl`: memory beats none, longer memory at evaluation helps, the reach exceeds a segment, streaming reads nothing
twice.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch

from longspan.experiments.claims.base import Claim, Figure, Say
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
from longspan.experiments.claims.tries import Try, tries_table
from longspan.models import build_model, describe_model, load_weights
from longspan.report import Picture, Table
from longspan.report.figures import Mark, Series, line_figure, picture_of
from longspan.report.tables import number, signed
from longspan.stream import StreamSession
from longspan.train import evaluate_text
from longspan.train.evaluate import Evaluation

OURS, ALONE = "transformer_xl", "segments_relative"
"""The model, and the same without memory, which reads every segment alone."""
TRAINED = 128
"""length of the memory and of a segment in training"""
PAPER_SPEED = {800: 363, 1800: 773, 2800: 1409, 3800: 1874}
"""how many times slower the vanilla Transformer of table 9 is, on a GPU, by the tokens that it rereads"""
LONG, LONG_MEMORY = "transformer_xl, memory of 512", 512
"""The model trained with a longer memory, a remedy where longer memories at evaluation stop to help."""
TARGET = 1800
"""times faster, as the paper's abstract says"""


class Remedy(NamedTuple):
    """A change of the evaluation with long memories, or of the training."""

    what: str
    cause: str
    """of the failure, which it is for"""
    model: str = OURS
    clamp: int = 0
    """larger distances count as this one; 0: none do"""
    sharpness: float = 1.0
    """factor of all scores of attention"""


REMEDIES = (
    Remedy("none", ""),
    Remedy("distances clamped", "retrieving: distances beyond those of training", clamp=2 * TRAINED),
    Remedy("scores times 1.1", "retrieving: weights spread over more keys", sharpness=1.1),
    Remedy(f"trained with a memory of {LONG_MEMORY}", "optimizing: longer memories do not occur in training", LONG),
)


@dataclass(frozen=True, kw_only=True)
class XlPlan(Plan):
    """Sizes of the comparison; memory lengths at evaluation, and tokens to time."""

    lengths: tuple[int, ...] = (0, 16, 32, 64, 128, 256, 512, 1024)
    """memory lengths at evaluation, on the held-out text of the curves; the first is 0"""
    attended: tuple[int, ...] = tuple(PAPER_SPEED)
    """tokens before every predicted one, in timing; the paper's"""
    timed: int = 64
    """tokens that are predicted one by one from a stream; rereading is timed on an eighth of them"""
    rounds: int = 3
    """rounds of timing both ways of prediction, alternating"""


PLANS = plans(
    XlPlan,
    tiny={"lengths": (0, 128), "attended": (64, 128), "timed": 3, "rounds": 1},
    small={"lengths": (0, 64, 128), "attended": (800, 1800), "timed": 16, "rounds": 1},
)


def with_memory(model: Any, length: int, **changes: Any) -> Any:
    """Return a model with the same weights, another memory length and other fields, in evaluation mode."""
    table = describe_model(model)
    changes["mem_len"] = length
    table["mixers"] = [{**mixer, **changes} for mixer in table["mixers"]]
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
def remedied(model: Any, remedy: Remedy, documents: Any, lengths: Sequence[int]) -> dict[str, Any]:
    """Return bits per byte by length of the memory, with a remedy."""
    bits = {}
    for length in lengths:
        changed = with_memory(model, length, clamp_len=remedy.clamp)
        for name, parameter in changed.named_parameters():
            if name.endswith(("q_proj.weight", "content_bias", "position_bias")):
                parameter.mul_(remedy.sharpness)
        bits[str(length)] = evaluate_text(changed, documents, chunk=TRAINED).bits_per_unit
    return bits


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
def speed(model: Any, tokens: torch.Tensor, length: int, plan: XlPlan) -> dict[str, float]:
    """Return CPU seconds per token of streaming with a memory, and of rereading as many tokens for every token.

    Args:
        model: a trained Transformer-XL.
        tokens: at least `length` + `plan.timed` of them.
        length: tokens before every predicted one.
        plan: numbers of tokens and rounds; both ways alternate.

    Returns:
        Medians over rounds: `streaming`, `rereading`.
    """
    # cached keys and values are not projected again for every token
    streamed, reread = with_memory(model, length, segment=1, cache="kv"), with_memory(model, 0, segment=length)
    seconds: dict[str, list[float]] = {"streaming": [], "rereading": []}
    few = max(plan.timed // 8, 1)
    for _ in range(plan.rounds):
        session = StreamSession(streamed)
        session.feed(tokens[:length])
        started = time.process_time()
        for index in range(length, length + plan.timed):
            session.feed(tokens[index : index + 1])
        seconds["streaming"].append((time.process_time() - started) / plan.timed)
        started = time.process_time()
        for index in range(few):
            reread.last(tokens[None, index + 1 : length + index + 1])
        seconds["rereading"].append((time.process_time() - started) / few)
    return {name: float(np.median(values)) for name, values in seconds.items()}


def flops_rate(model: Any, length: int) -> float:
    """Return how many times more FLOPs it takes to reread `length` tokens than to stream one with as long a memory."""
    streamed, reread = with_memory(model, length, segment=1), with_memory(model, 0, segment=length)
    # a full memory, without the distances, which are projected once
    token = (streamed.flops(2 * length) - streamed.flops(length)) / length
    return float(reread.flops(length) / token)


def length_for(model: Any, rate: float) -> int:
    """Return the fewest tokens of context, to a hundred, at which rereading takes `rate` times the FLOPs of streaming.

    A token that rereads n others costs between n / 2 and n times as much as one that attends to them.
    """
    low, high = 0, math.ceil(2 * rate / 100)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if flops_rate(model, 100 * middle) >= rate else (middle, high)
    return 100 * high


def inspect(runs: TrainedRuns, say: Say, plan: XlPlan) -> dict[str, Any]:
    """Return losses by the length of the memory, speed and reach of the trained model; empty if it failed."""
    if not runs.seeds(OURS):
        return {}
    model, task = runs.opened(OURS)
    chosen = runs.documents(task, plan.curve_documents, plan.curve_reach)
    losses = runs.once("by-length", lambda: by_length(model, chosen, plan.lengths))
    say("read with memories of every length")
    longest = max(task.documents("validation").items, key=len)
    length = max(max(plan.attended) + plan.timed, 1024)
    tokens = torch.from_numpy(np.asarray(longest.cut(0, length).tokens)).long()
    seconds = {}
    for attended in plan.attended:
        seconds[attended] = runs.once(f"speed-{attended}", partial(speed, model, tokens, attended, plan))
        say(f"timed predictions after {attended:,} tokens")
    return {
        "losses": losses,
        "speed": {str(attended): values for attended, values in seconds.items()},
        "flops": {str(attended): flops_rate(model, attended) for attended in plan.attended},
        "needed": length_for(model, TARGET),
        "reach": runs.once("reach", lambda: {"tokens": reach(model, TRAINED, tokens[:1024])}),
        "layers": model.config.num_layers,
        "remedies": _tried(runs, chosen, plan) if plan.remedies else {},
    }


def _tried(runs: TrainedRuns, documents: Any, plan: XlPlan) -> dict[str, Any]:
    """Return bits per byte with the two longest memories, by remedy, of those whose model was trained."""
    tried = {}
    for index, remedy in enumerate(REMEDIES):
        if runs.seeds(remedy.model):
            model, _ = runs.opened(remedy.model)
            measure = partial(remedied, model, remedy, documents, plan.lengths[-2:])
            tried[remedy.what] = runs.once(f"remedy-{index}", measure)
    return tried


def judge(results: Results, plan: XlPlan) -> Judgment:
    """Judge the claim: better than the same model without memory, and longer memories are better."""
    tables = []
    figures = bit_figures(results, ALONE, {OURS: "24.0 (WikiText-103; vanilla Transformer 26.8 and more)"})
    criteria = [ahead(results, OURS, ALONE)]
    pictures = []
    if results.inspected:
        losses, rates = results.inspected["losses"], _rates(results)
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
                what="Streaming is faster than rereading",
                met=min(rates.values()) > 1,
                measured=", ".join(f"{rate:.0f} times at {length:,} tokens" for length, rate in rates.items()),
                suffices=False,
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
        if not falls and results.inspected["remedies"]:
            tables = [_remedies_table(results.inspected["remedies"])]
    return Judgment(
        verdict=grade(criteria),
        figures=figures,
        note=f"{criteria_text(criteria)} The model was trained with a memory of {TRAINED}, so longer ones are an "
        f"extrapolation; they are read on the first {plan.curve_reach:,} bytes of {plan.curve_documents} documents.",
        pictures=pictures,
        tables=tables,
    )


def _remedies_table(tried: Mapping[str, Mapping[str, float]]) -> Table:
    """Return the table of tries: bits per byte with the two longest memories, with every remedy."""
    lengths = list(next(iter(tried.values())))
    rows = [
        Try(remedy.what, remedy.cause, [number(tried[remedy.what][length], 4) for length in lengths])
        for remedy in REMEDIES
        if remedy.what in tried
    ]
    columns = [f"memory of {int(length):,}" for length in lengths]
    return tries_table(
        rows, columns, "held-out bits per byte with the two longest memories at evaluation.", numeric=True
    )


def _rates(results: Results) -> dict[int, float]:
    """Return how many times faster streaming is than rereading, by the tokens that are reread for every token."""
    measured = results.inspected["speed"].items()
    return {int(length): seconds["rereading"] / seconds["streaming"] for length, seconds in measured}


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
    farthest, layers = results.inspected["reach"]["tokens"], results.inspected["layers"]
    flops, needed = results.inspected["flops"], results.inspected["needed"]
    return [
        *(
            Figure(
                f"times faster than rereading {length:,} tokens for each token",
                f"{PAPER_SPEED[length]:,} (GPU)" if length in PAPER_SPEED else "",
                f"{rate:.0f} (CPU, one token "
                f"{1000 * results.inspected['speed'][str(length)]['streaming']:.1f} ms); "
                f"{flops[str(length)]:,.0f} times fewer FLOPs",
            )
            for length, rate in _rates(results).items()
        ),
        Figure(
            f"tokens of context at which it would be {TARGET:,} times; computed from FLOPs, not measured",
            "3,800 (measured, GPU)",
            f"{needed:,}",
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
    models = [from_recipe(OURS), from_recipe(ALONE)]
    if plan.remedies:
        models.append(from_recipe(OURS, label=LONG, changes={"mem_len": LONG_MEMORY}))
    return Comparison(
        name="xl",
        models=models,
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
