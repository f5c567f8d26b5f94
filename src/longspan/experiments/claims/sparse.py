"""`sparse`: growth of time and memory of fixed and strided patterns, and their loss against dense attention."""

import importlib.util
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longspan import mixers, ops, reference, tasks
from longspan.experiments.claims.base import Claim, Figure, Say
from longspan.experiments.claims.contest import INTERVALS, Contest, bit_figures, contest, difference
from longspan.experiments.claims.continued import (
    CEILING,
    Comparison,
    Criterion,
    Judgment,
    ModelSpec,
    Plan,
    Remedy,
    Results,
    TrainedRuns,
    another_rate,
    as_good,
    changed_model,
    criteria_text,
    grade,
    measure_with,
    plans,
)
from longspan.experiments.claims.continued import bit_figures as text_figures
from longspan.experiments.claims.continued.plan import floor_and_ceiling
from longspan.experiments.claims.growth import Step, growth_picture, peak_bytes, power, time_alternately
from longspan.experiments.claims.runs import measure_once, read_recipe
from longspan.experiments.claims.tries import Cause
from longspan.report import Picture
from longspan.report.tables import signed
from longspan.tasks.base import evenly
from longspan.train.starts import start_model

# keys of saved records; on text, dense attention is the ceiling of the comparison
DENSE, FIXED, STRIDED = "dense", "fixed", "strided"
WEIGHTS = "dense, weights kept"
SUMMARY = 8
HEADS, DIM = 2, 64
# rules of the verdict, set before any training: n sqrt n, with a margin for measurement
GROWTH = 1.6
DENSE_GROWTH = 1.75
"""smallest exponent of the time of dense attention, which must be visibly quadratic"""


@dataclass(frozen=True, kw_only=True)
class SparsePlan(Plan):
    """Sizes of the comparison on text; lengths to time, rounds, and the contest on tiles of images."""

    lengths: tuple[int, ...] = (1024, 4096, 16384, 65536)
    dense: int = 16384
    """largest length for dense attention"""
    weights: int = 4096
    """largest length for dense attention that stores its weights"""
    timing_rounds: int = 2
    image: Contest | None = None
    """models of tiles, trained from nothing because the starts are models of text; None: none"""
    tile: int = 16


PLANS = plans(
    SparsePlan,
    tiny={"models": (FIXED,), "lengths": (64, 256), "dense": 256, "weights": 256, "timing_rounds": 1},
    small={
        "models": (FIXED,),
        "lengths": (256, 1024),
        "dense": 1024,
        "weights": 1024,
        "timing_rounds": 1,
        "image": Contest(
            seeds=1, head=0, documents=4, train={"steps": 12, "lanes": 1, "segment_length": 768, "carry": False}
        ),
    },
    full={
        "image": Contest(
            seeds=1,
            head=0,
            documents=60,
            train={"steps": 240, "warmup": 20, "lr": 3e-3, "lanes": 2, "segment_length": 768, "carry": False},
        ),
    },
)


def step_of(way: str, length: int) -> Step:
    """Return a forward and backward pass of one kind of attention on random inputs, after a warm-up on a short text."""
    for count in (64, length):
        step = _step(way, count)
        if count < length:
            step()
    return step


def _step(way: str, length: int) -> Step:
    """Return a forward and backward pass of one kind of attention on random inputs of `length` tokens."""
    inputs = [torch.randn(1, HEADS, length, DIM, requires_grad=True) for _ in range(3)]
    stride = math.isqrt(length)

    def attend() -> Tensor:
        """Return the outputs of attention, (1, heads, length, head_dim)."""
        if way == WEIGHTS:
            return reference.full_attention(*inputs)
        if way == DENSE:
            return ops.full_attention(*inputs)
        pattern: Any = way
        return ops.sparse_attention(*inputs, pattern=pattern, stride=stride, summary=SUMMARY)

    return lambda: torch.autograd.grad(attend().sum(), inputs)


def growth(plan: SparsePlan, say: Say) -> dict[str, dict[str, dict[int, float]]]:
    """Measure CPU seconds, peak bytes, and query-key pairs by the definition, for each kind of attention by length."""
    curves: dict[str, dict[str, dict[int, float]]] = {"seconds": {}, "bytes": {}, "pairs": {}}
    most = {DENSE: plan.dense, WEIGHTS: plan.weights}
    for length in plan.lengths:
        timed = [way for way in (DENSE, FIXED, STRIDED) if length <= most.get(way, length)]
        for way, seconds in time_alternately({way: step_of(way, length) for way in timed}, plan.timing_rounds).items():
            curves["seconds"].setdefault(way, {})[length] = seconds
        for way in (DENSE, FIXED, STRIDED, WEIGHTS):
            if length <= most.get(way, length):
                curves["bytes"].setdefault(way, {})[length] = peak_bytes(step_of, way, length)
        for way in (DENSE, FIXED, STRIDED):
            curves["pairs"].setdefault(way, {})[length] = pairs(way, length)
        say(f"{length:,}: " + ", ".join(f"{way} {curves['seconds'][way][length]:.2f} s" for way in timed))
    return curves


def pairs(way: str, length: int) -> float:
    """Return the number of query-key pairs per head by the definition."""
    stride = math.isqrt(length)
    fields: dict[str, Any] = {} if way == DENSE else {"pattern": way, "stride": stride}
    if way == FIXED:
        fields["summary"] = SUMMARY
    return float(mixers.build("full" if way == DENSE else "sparse", dim=4, num_heads=1, **fields).pairs(length))


def _by_length(curves: Mapping[str, Mapping[str, Mapping[Any, float]]]) -> dict[str, dict[str, dict[int, float]]]:
    """Return curves with integer lengths as keys, after JSON has turned the lengths into text."""
    return {
        kind: {way: {int(length): value for length, value in values.items()} for way, values in ways.items()}
        for kind, ways in curves.items()
    }


def _mixers(stride: int) -> dict[str, dict[str, Any]]:
    """Return the mixers of dense, fixed and strided attention with a stride."""
    return {
        DENSE: {"name": "full"},
        FIXED: {"name": "sparse", "pattern": "fixed", "stride": stride, "summary": SUMMARY},
        STRIDED: {"name": "sparse", "pattern": "strided", "stride": stride},
    }


def models(plan: SparsePlan) -> list[ModelSpec]:
    """Return the models of text, which read the same pieces as dense attention; the stride is sqrt of the length."""
    table = _mixers(math.isqrt(plan.length))
    return [ModelSpec(name=name, model={"mixers": [table[name]]}, carries=False) for name in (FIXED, STRIDED)]


def remedies(plan: SparsePlan) -> list[Remedy]:
    """Return the remedies for text.

    A token sees its own block, half of one on average, and the last eight positions of every block before, whose
    vectors must summarize the others. The heads of the start, which is dense, do not gather them there, and read the
    nearest tokens also where a block begins.
    """
    heads, stride = start_model(plan.start)["num_heads"], math.isqrt(plan.length)
    ours, ceiling = models(plan)[0], floor_and_ceiling(plan)[1]
    (fixed,) = ours.model["mixers"]
    summary = min(4 * SUMMARY, stride)
    offsets = tuple(SUMMARY * head for head in range(min(heads, stride // SUMMARY)))
    near = {"name": "window", "window": 2 * stride, "num_heads": heads - heads // 2}
    changes: list[tuple[str, Cause, dict[str, Any]]] = [
        (
            f"blocks of {2 * stride} with {summary} summaries",
            "retaining",
            {**fixed, "stride": 2 * stride, "summary": summary},
        ),
        ("other summaries per head", "storing", {**fixed, "summary_offset": offsets}),
        (
            f"half of the heads with a window of {2 * stride}",
            "retrieving",
            {"name": "mixed_heads", "mixers": [near, {**fixed, "num_heads": heads // 2}]},
        ),
    ]
    return [
        *(changed_model(ours, CEILING, what, cause, mixers=[mixer]) for what, cause, mixer in changes),
        another_rate("1e-3", ours, ceiling),
    ]


def image_recipes(plan: SparsePlan) -> dict[str, dict[str, Any]]:
    """Return recipes of three models of tiles, otherwise `recipes/sparse-tiles.toml`; the stride is a row of pixels."""
    recipes = {}
    for name, mixer in _mixers(3 * plan.tile).items():
        recipe = read_recipe("sparse-tiles")
        # tiles are small enough to keep activations
        recipe["model"] |= {"mixers": [mixer], "checkpoint": False}
        recipe["task"]["tile"] = plan.tile
        recipes[name] = recipe
    return recipes


def frequency_bits(plan: SparsePlan, count: int) -> float:
    """Return held-out bits per byte of a predictor that knows only the frequencies of bytes in training tiles.

    `count`: number of held-out tiles, evenly spaced.
    """
    task = tasks.build(image_recipes(plan)[DENSE]["task"])
    counts = np.ones(task.vocab_size)
    for item in task.documents("train").items:
        counts += np.bincount(item.cut(0, len(item)).targets, minlength=len(counts))
    held_out = evenly(task.documents("validation"), count).items
    targets = np.concatenate([item.cut(0, len(item)).targets for item in held_out])
    return float(-np.log2(counts / counts.sum())[targets].mean())


def inspect(runs: TrainedRuns, say: Say, plan: SparsePlan) -> dict[str, Any]:
    """Return the growth of time and memory and, if the plan has them, the losses of models of images."""
    folder = runs.folder
    measured: dict[str, Any] = {"growth": _by_length(measure_once(folder / "growth.json", lambda: growth(plan, say)))}
    if plan.image is None:
        return measured
    if importlib.util.find_spec("skimage") is None:
        say("skipping images, which are not installed; install them with: pip install --no-deps scikit-image")
        return measured
    count = plan.image.documents
    frequencies = measure_once(folder / "frequencies.json", lambda: {"bits": frequency_bits(plan, count)})
    return {
        **measured,
        "image": contest(folder / "image", image_recipes(plan), plan.image, say),
        "frequencies": frequencies["bits"],
    }


def _shown(values: Mapping[int, float], scale: float, unit: str) -> str:
    """Return values by length as text, with their unit and their growth as a power of the length."""
    words = ", ".join(
        f"{length:,}: {scale * value:,.{0 if scale * value >= 100 else 2}f}" for length, value in values.items()
    )
    return f"{words} {unit} (n^{power(values):.2f})"


def judge(results: Results, plan: SparsePlan) -> Judgment:
    """Judge the claim: time and memory of n sqrt n, fixed patterns on text and strided ones on images lose nothing."""
    grown, image = results.inspected["growth"], results.inspected.get("image")
    times, memory = ({way: power(values) for way, values in grown[key].items()} for key in ("seconds", "bytes"))
    most = max(max(times[way], memory[way]) for way in (FIXED, STRIDED))
    criteria = [
        Criterion(
            what=f"Time and memory grow no faster than n^{GROWTH}, and time of dense attention at least as "
            f"n^{DENSE_GROWTH}",
            met=times[DENSE] >= DENSE_GROWTH and most <= GROWTH,
            measured=f"at most n^{most:.2f}, time of dense attention n^{times[DENSE]:.2f}",
        ),
        as_good(results, FIXED, CEILING),
        Criterion(
            what="Strided patterns on images match dense attention",
            # those models train for minutes, from nothing, and are not measured for flatness
            met=None,
            measured="not measured"
            if image is None
            else f"{signed(difference(image[STRIDED], image[DENSE]))} after a short "
            "training from nothing, which decides nothing",
        ),
    ]
    paper = {FIXED: "enwik8 0.99 (dense 1.00)", STRIDED: "worse: enwik8 1.13"}
    figures = [*_growth_figures(grown), *text_figures(results, CEILING, paper)]
    if image is not None:
        bits = f"{results.inspected['frequencies']:.4f}"
        figures.append(Figure("bits per byte on images, frequencies of bytes only", "", bits))
        images = {FIXED: "2.85", STRIDED: "2.80 (dense 2.82), CIFAR-10"}
        figures += bit_figures(image, DENSE, images, "bits per byte on images")
    return Judgment(
        verdict=grade(criteria),
        figures=figures,
        note=f"{criteria_text(criteria)} {_note(results, plan)}",
        pictures=_pictures(grown),
    )


def _growth_figures(grown: Mapping[str, Mapping[str, Mapping[int, float]]]) -> list[Figure]:
    """Return the rows of the results table that are about time, memory and weights."""
    expected = {DENSE: "n^2", WEIGHTS: "n^2", FIXED: "n^1.5", STRIDED: "n^1.5"}
    rows = (
        ("CPU time, forward and backward", "seconds", 1e3, "ms"),
        ("peak memory, forward and backward", "bytes", 1e-6, "MB"),
        ("weights per head by the definition", "pairs", 1e-6, "million"),
    )
    return [
        Figure(f"{what}, {way}", expected[way], _shown(values, scale, unit))
        for what, key, scale, unit in rows
        for way, values in grown[key].items()
    ]


def _note(results: Results, plan: SparsePlan) -> str:
    """Describe the measurements beside the comparison on text, and what limits them."""
    parts = [
        f"Time and memory are of the operations alone: batch 1, {HEADS} heads of {DIM}, fp32, one thread, strides of "
        f"sqrt(n), {SUMMARY} summary columns; CPU time, median of {plan.timing_rounds} alternating round(s); peak "
        "resident memory above that before, each in its own process. Neither sparse nor dense attention stores weights "
        "here, so memory is linear in the length; the paper stores them, as does the row 'weights kept'."
    ]
    image = results.inspected.get("image")
    if image is not None and plan.image is not None:
        train = plan.image.train
        parts.append(
            f"Images: tiles of {plan.tile} x {plan.tile} x 3 bytes of eight photographs, which are few and dissimilar, "
            f"{train['steps']:,} steps of {train['lanes']} tile(s), {plan.image.seeds} seed(s); held-out images: "
            f"{len(image[DENSE][0]['names'])} tiles of other photographs; {INTERVALS}."
        )
    elif plan.image is not None:
        parts.append("Images were not installed (pip install --no-deps scikit-image), so that part was not measured.")
    if STRIDED in results.runs and CEILING in results.runs:
        strided = signed(results.difference(STRIDED, CEILING))
        parts.append(f"Strided patterns on text, which the paper advises against: {strided} bits per byte.")
    return " ".join(parts)


def _pictures(grown: Mapping[str, Mapping[str, Mapping[int, float]]]) -> list[Picture]:
    """Plot time and memory against the length."""
    milliseconds = {way: {n: 1e3 * value for n, value in values.items()} for way, values in grown["seconds"].items()}
    megabytes = {way: {n: 1e-6 * value for n, value in values.items()} for way, values in grown["bytes"].items()}
    return [
        growth_picture(
            "sparse",
            milliseconds,
            ylabel="milliseconds of CPU time, forward and backward",
            alt="Time of dense, fixed and strided attention against the length, both logarithmic.",
        ),
        growth_picture(
            "sparse-memory",
            megabytes,
            ylabel="peak memory in MB, forward and backward",
            alt="Peak memory of dense, fixed and strided attention against the length, both logarithmic.",
        ),
    ]


def comparison(plan: SparsePlan) -> Comparison:
    """Return the comparison on text at a size."""
    return Comparison(
        name="sparse",
        models=models(plan),
        pairs=[(FIXED, CEILING)],
        judge=lambda results: judge(results, plan),
        inspect=lambda runs, say: inspect(runs, say, plan),
        remedies=remedies(plan),
    )


SPARSE = Claim(
    name="sparse",
    system="Sparse Transformer",
    source="Child et al. 2019, sections 4.3, 5.1 and 7, tables 1 and 2",
    text="Factorized patterns need time and memory of n sqrt n without loss of quality: fixed ones on text, strided "
    "ones on images.",
    parallel=measure_with(comparison),
    minutes={"tiny": 0.3, "small": 4, "full": 145},
    plans=PLANS,
)
