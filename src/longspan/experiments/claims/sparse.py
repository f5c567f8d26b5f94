"""`sparse`: growth of time and memory of fixed and strided patterns, and their loss against dense attention."""

import importlib.util
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longspan import mixers, ops, reference, tasks
from longspan.experiments.claims.base import Claim, Figure, Outcome, Say, signed
from longspan.experiments.claims.contest import (
    EQUAL,
    INTERVALS,
    Contest,
    ModelRecords,
    as_good,
    bit_figures,
    bits_of,
    caution,
    contest,
    differences,
    recipe_with,
    seconds_of,
    seeds_note,
    verdict_of,
)
from longspan.experiments.claims.growth import Step, growth_picture, peak_bytes, power, time_alternately
from longspan.experiments.claims.runs import evenly, measure_once, read_recipe
from longspan.report import Picture
from longspan.train import Interval

DENSE, FIXED, STRIDED = "dense", "fixed", "strided"
WEIGHTS = "dense, weights kept"
SUMMARY = 8
HEADS, DIM = 2, 64
# rules of the verdict, set before any training: n sqrt n, with a margin for measurement
GROWTH = 1.6
DENSE_GROWTH = 1.75
"""smallest exponent of the time of dense attention, which must be visibly quadratic"""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Sizes: lengths to time, rounds, the contests on text and on tiles of images."""

    lengths: tuple[int, ...]
    dense: int
    """largest length for dense attention"""
    weights: int
    """largest length for dense attention that stores its weights"""
    rounds: int
    text: Contest
    image: Contest
    tile: int


PLANS: dict[str, Plan] = {
    "small": Plan(
        lengths=(256, 1024),
        dense=1024,
        weights=1024,
        rounds=1,
        text=Contest(
            seeds=1, head=1024, documents=4, train={"steps": 12, "lanes": 1, "segment_length": 1024, "carry": False}
        ),
        image=Contest(
            seeds=1, head=0, documents=4, train={"steps": 12, "lanes": 1, "segment_length": 768, "carry": False}
        ),
        tile=16,
    ),
    "full": Plan(
        lengths=(1024, 4096, 16384, 65536),
        dense=16384,
        weights=4096,
        rounds=2,
        text=Contest(seeds=1, head=2048, train={"steps": 300, "lanes": 1, "segment_length": 1024, "carry": False}),
        image=Contest(
            seeds=1,
            head=0,
            documents=60,
            train={"steps": 240, "warmup": 20, "lr": 3e-3, "lanes": 2, "segment_length": 768, "carry": False},
        ),
        tile=16,
    ),
}


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


def growth(plan: Plan, say: Say) -> dict[str, dict[str, dict[int, float]]]:
    """Measure CPU seconds, peak bytes, and query-key pairs by the definition, for each kind of attention by length."""
    curves: dict[str, dict[str, dict[int, float]]] = {"seconds": {}, "bytes": {}, "pairs": {}}
    most = {DENSE: plan.dense, WEIGHTS: plan.weights}
    for length in plan.lengths:
        timed = [way for way in (DENSE, FIXED, STRIDED) if length <= most.get(way, length)]
        for way, seconds in time_alternately({way: step_of(way, length) for way in timed}, plan.rounds).items():
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


def text_recipes(plan: Plan) -> dict[str, dict[str, Any]]:
    """Return recipes of three models of text, otherwise `recipes/lm/full.toml`; the stride is sqrt of the length."""
    return {name: recipe_with(mixer) for name, mixer in _mixers(math.isqrt(plan.text.train["segment_length"])).items()}


def image_recipes(plan: Plan) -> dict[str, dict[str, Any]]:
    """Return recipes of three models of tiles, otherwise `recipes/sparse-tiles.toml`; the stride is a row of pixels."""
    recipes = {}
    for name, mixer in _mixers(3 * plan.tile).items():
        recipe = read_recipe("sparse-tiles")
        # tiles are small enough to keep activations
        recipe["model"] |= {"mixers": [mixer], "checkpoint": False}
        recipe["task"]["tile"] = plan.tile
        recipes[name] = recipe
    return recipes


def frequency_bits(plan: Plan) -> float:
    """Return held-out bits per byte of a predictor that knows only the frequencies of bytes in training tiles."""
    task = tasks.build(image_recipes(plan)[DENSE]["task"])
    counts = np.ones(task.vocab_size)
    for item in task.documents("train").items:
        counts += np.bincount(item.cut(0, len(item)).targets, minlength=len(counts))
    held_out = evenly(task.documents("validation"), plan.image.documents).items
    targets = np.concatenate([item.cut(0, len(item)).targets for item in held_out])
    return float(-np.log2(counts / counts.sum())[targets].mean())


def measure(folder: Path, plan: Plan, say: Say) -> Outcome:
    """Measure growth, then train all models; a second call resumes from the folder."""
    grown = _by_length(measure_once(folder / "growth.json", lambda: growth(plan, say)))
    measured: dict[str, Any] = {"growth": grown, "text": contest(folder / "text", text_recipes(plan), plan.text, say)}
    if importlib.util.find_spec("skimage") is None:
        say("skipping images, which are not installed; install them with: pip install --no-deps scikit-image")
    else:
        measured["image"] = contest(folder / "image", image_recipes(plan), plan.image, say)
        measured["frequencies"] = measure_once(folder / "frequencies.json", lambda: {"bits": frequency_bits(plan)})[
            "bits"
        ]
    return outcome(measured, plan)


def _shown(values: Mapping[int, float], scale: float, unit: str) -> str:
    """Return values by length as text, with their unit and their growth as a power of the length."""
    words = ", ".join(
        f"{length:,}: {scale * value:,.{0 if scale * value >= 100 else 2}f}" for length, value in values.items()
    )
    return f"{words} {unit} (n^{power(values):.2f})"


def outcome(measured: Mapping[str, Any], plan: Plan) -> Outcome:
    """Judge the claim by its measurements: return the verdict, the numbers next to the paper's, and plots."""
    grown, text, image = measured["growth"], measured["text"], measured.get("image")
    time_powers, memory_powers = (
        {way: power(values) for way, values in grown[key].items()} for key in ("seconds", "bytes")
    )
    grows = time_powers[DENSE] >= DENSE_GROWTH and all(
        max(time_powers[way], memory_powers[way]) <= GROWTH for way in (FIXED, STRIDED)
    )
    on_text = differences(text, DENSE)[FIXED]
    on_images = None if image is None else differences(image, DENSE)[STRIDED]
    # a dense model no better than byte frequencies or chance is not a reference (rule added after the first result)
    learned = image is not None and bits_of(image[DENSE]) < min(measured["frequencies"], 8.0)
    met = (grows, on_text.high <= EQUAL, learned and on_images is not None and on_images.high <= EQUAL)
    leads = [on_text] if on_images is None else [on_text, on_images]
    expected = {DENSE: "n^2", WEIGHTS: "n^2", FIXED: "n^1.5", STRIDED: "n^1.5"}
    figures = [
        *(
            Figure(f"CPU time, forward and backward, {way}", expected[way], _shown(values, 1e3, "ms"))
            for way, values in grown["seconds"].items()
        ),
        *(
            Figure(f"peak memory, forward and backward, {way}", expected[way], _shown(values, 1e-6, "MB"))
            for way, values in grown["bytes"].items()
        ),
        *(
            Figure(f"weights per head by the definition, {way}", expected[way], _shown(values, 1e-6, "million"))
            for way, values in grown["pairs"].items()
        ),
        *_bits(text, {FIXED: "enwik8 0.99 (dense 1.00)", STRIDED: "worse: enwik8 1.13"}, "text"),
        *(
            []
            if image is None
            else [Figure("bits per byte on images, frequencies of bytes only", "", f"{measured['frequencies']:.4f}")]
        ),
        *([] if image is None else _bits(image, {FIXED: "2.85", STRIDED: "2.80 (dense 2.82), CIFAR-10"}, "images")),
    ]
    return Outcome(
        verdict=verdict_of(met, leads),
        figures=figures,
        size=_size(measured, plan),
        note=_note(grows, leads, differences(text, DENSE)[STRIDED]) + seeds_note(text),
        data=dict(measured),
        pictures=_pictures(grown),
        seconds=seconds_of(text) + (0.0 if image is None else seconds_of(image)),
    )


def _bits(models: ModelRecords, paper: Mapping[str, str], where: str) -> list[Figure]:
    """Return the rows of the results table for the held-out bits per byte of each model."""
    return bit_figures(models, DENSE, paper, f"bits per byte on {where}")


def _size(measured: Mapping[str, Any], plan: Plan) -> str:
    """Describe models, data and training of all measurements."""
    text, image = plan.text, plan.image
    words = (
        f"time and memory of the operations alone: batch 1, {HEADS} heads of {DIM}, fp32, one thread, strides of "
        f"sqrt(n), {SUMMARY} summary columns; CPU time, median of {plan.rounds} alternating round(s); peak "
        "resident memory above that before, each in its own process. Text: 4 layers of 128, State of the Union "
        f"speeches, {text.train['steps']:,} steps of {text.train['lanes']} x {text.train['segment_length']:,} bytes, "
        f"{text.seeds} seed(s); held-out text: the first {text.head:,} bytes of "
        f"{len(measured['text'][DENSE][0]['names'])} speeches"
    )
    if "image" in measured:
        words += (
            f". Images: 4 layers of 128, tiles of {plan.tile} x {plan.tile} x 3 bytes of eight photographs, "
            f"{image.train['steps']:,} steps of {image.train['lanes']} tile(s), {image.seeds} seed(s); held-out "
            f"images: {len(measured['image'][DENSE][0]['names'])} tiles of other photographs"
        )
    return f"{words}; {INTERVALS}"


def _note(grows: bool, leads: list[Interval], strided: Interval) -> str:
    """Explain the verdict; `leads` are differences to dense: fixed on text, and strided on images if there are any."""

    parts = [
        f"Time and memory grow no faster than n^{GROWTH} (and time of dense attention at least n^{DENSE_GROWTH}): "
        f"{'yes' if grows else 'no'}. Fixed patterns on text match dense attention (the upper end of the interval is "
        f"at most {EQUAL} bits per byte): {as_good(leads[0])}, {signed(leads[0])}."
    ]
    if len(leads) == 1:
        parts.append(
            "Images were not installed (pip install --no-deps scikit-image), so that part was not measured and the "
            "claim holds at most in part."
        )
    else:
        parts.append(f"Strided patterns on images match dense attention: {as_good(leads[1])}, {signed(leads[1])}.")
    parts.append(
        f"Strided patterns on text, which the paper advises against: {signed(strided)}. Neither sparse nor dense "
        "attention stores weights here, so memory is linear in the length; the paper stores them, as does the row "
        "'weights kept'. The models are small and trained briefly, the images are few and dissimilar."
        + next((words for lead in leads if (words := caution(lead, "dense attention"))), "")
    )
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


SPARSE = Claim(
    name="sparse",
    system="Sparse Transformer",
    source="Child et al. 2019, sections 4.3, 5.1 and 7, tables 1 and 2",
    text="Factorized patterns need time and memory of n sqrt n without loss of quality: fixed ones on text, strided "
    "ones on images.",
    measure=measure,
    minutes={"small": 0.8, "full": 8},
    plans=PLANS,
)
