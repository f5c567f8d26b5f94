"""`performer-speed`: time and memory against length: operations alone, and layers with and without attention."""

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from longspan import ops, reference
from longspan.experiments.claims import performer_layers
from longspan.experiments.claims.base import Claim, Figure, Outcome, Say, graded
from longspan.experiments.claims.growth import Step, growth_picture, peak_bytes, power, time_alternately
from longspan.experiments.claims.performer_layers import ATTENTION, BIDIRECTIONAL, CAUSAL, DENSE, FEATURES, NONE
from longspan.experiments.claims.runs import measure_once

PLANS = {"tiny": (64, 256), "small": (1024, 4096), "full": (1024, 4096, 16384, 65536)}
_HEADS, _DIM = 4, 64
_PAIRS = 3
NEAR = 2.0
"""times as long as a layer without attention, below which a layer is near this bound"""
_WEIGHTS = "dense, all weights kept"


LAYERS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    DENSE: ATTENTION[DENSE],
    _WEIGHTS: lambda q, k, v: reference.full_attention(q, k, v),
    CAUSAL: ATTENTION[CAUSAL],
    BIDIRECTIONAL: ATTENTION[BIDIRECTIONAL],
    "linear": lambda q, k, v: ops.linear_attention(ops.elu_features(q), ops.elu_features(k), v)[0],
    NONE: lambda q, k, v: q + k + v,
}
"""Kinds of attention that are timed, by their names in the report and in saved records."""
_MOST = {DENSE: 16384, _WEIGHTS: 4096}
"""largest lengths at which quadratic attention is measured"""


def step_of(name: str, length: int) -> Step:
    """Return a function that runs a kind of attention forward and backward on `length` random tokens.

    To warm up, one such pass on 128 tokens runs before this function returns.
    """

    def step(count: int) -> Step:
        """Return a forward and backward pass on inputs of `count` tokens."""
        inputs = [torch.randn(1, _HEADS, count, _DIM, requires_grad=True) for _ in range(3)]
        return lambda: torch.autograd.grad(LAYERS[name](*inputs).sum(), inputs)

    step(128)()
    return step(length)


def _measured(length: int) -> dict[str, dict[str, float]]:
    """Return seconds and peak bytes of each kind of attention at one length, and how long measuring took."""
    names = [name for name in LAYERS if length <= _MOST.get(name, length)]
    started = time.perf_counter()
    return {
        "seconds": time_alternately({name: step_of(name, length) for name in names}, _PAIRS),
        "bytes": {name: float(peak_bytes(step_of, name, length)) for name in names},
        "took": {"all": time.perf_counter() - started},
    }


def _measure(folder: Path, lengths: tuple[int, ...], say: Say) -> Outcome:
    """Time all kinds of attention at all lengths; a second call resumes from the folder."""
    measured: dict[str, dict[str, dict[int, float]]] = {"seconds": {}, "bytes": {}, "took": {}}
    by_length = {}
    for length in lengths:
        if length <= performer_layers.LONGEST:
            by_length[length] = measure_once(
                folder / f"layers-{length}.json", partial(performer_layers.layer_seconds, length, _PAIRS)
            )
            times = performer_layers.ratios(by_length[length])
            say(f"{length:,}, layers: " + ", ".join(f"{n} {x:.2f} times no attention" for n, x in times.items()))
        for what, values in measure_once(folder / f"length-{length}.json", partial(_measured, length)).items():
            for name, value in values.items():
                measured[what].setdefault(name, {})[length] = value
        say(
            f"{length:,}: "
            + ", ".join(f"{n} {1e3 * v[length]:.1f} ms" for n, v in measured["seconds"].items() if length in v)
        )
    length = max(by_length)
    tries = measure_once(folder / f"remedies-{length}.json", partial(performer_layers.remedy_seconds, length, _PAIRS))
    return replace(outcome(measured, by_length), tables=[performer_layers.remedies_table(tries, length)])


def outcome(
    measured: Mapping[str, Mapping[str, Mapping[int, float]]], layers: Mapping[int, Mapping[str, float]]
) -> Outcome:
    """Judge the claim by its measurements: return the verdict, the numbers next to the paper's, and plots.

    Args:
        measured: "seconds", "bytes" and "took" by kind of attention and length, of operations alone.
        layers: seconds by length and kind of attention, of whole layers.
    """
    ratios = {length: performer_layers.ratios(seconds) for length, seconds in layers.items()}
    figures = [
        Figure(
            f"whole layers, times as long as no attention, {name}",
            "grows with the length" if name == DENSE else "near 1",
            ", ".join(f"{length:,}: {times[name]:.2f}" for length, times in ratios.items()),
        )
        for name in next(iter(ratios.values()))
    ]
    for what, unit, factor in (("seconds", "milliseconds", 1e3), ("bytes", "MB", 1e-6)):
        for name, values in measured[what].items():
            figures.append(
                Figure(
                    f"{unit} forward and backward, {name}",
                    {DENSE: "quadratic", _WEIGHTS: "quadratic", NONE: "the bound"}.get(name, "linear, near the bound"),
                    ", ".join(f"{length:,}: {factor * value:,.1f}" for length, value in values.items())
                    + f" (last two: grows as n^{last_power(values):.2f})",
                )
            )
    linear = all(last_power(measured[what][CAUSAL]) < 1.25 for what in ("seconds", "bytes"))
    longest = max(ratios)
    times = [ratios[longest][name] for name in (CAUSAL, BIDIRECTIONAL)]
    quadratic = last_power(measured["seconds"][DENSE]) > 1.5
    return Outcome(
        verdict=graded(linear and quadratic and max(times) < NEAR, linear and quadratic),
        figures=figures,
        size=f"operations alone: batch 1, {_HEADS} heads of {_DIM}, {FEATURES} features; layers: "
        f"{performer_layers.DIM} wide, {performer_layers.HEADS} heads, feed-forward {performer_layers.INNER}; fp32; "
        f"CPU time of one thread, median of {_PAIRS} alternating rounds; memory above the inputs, each in its own "
        "process",
        note="It holds if time and memory are linear, dense attention's time is quadratic, and whole layers, causal "
        f"and bidirectional, take less than {NEAR} times as long as without attention; in part without the last. At "
        f"{longest:,} tokens they take {times[0]:.2f} and {times[1]:.2f} times as long. PyTorch's dense attention "
        "stores no weights, so its memory is linear too.",
        seconds=sum(sum(values.values()) for values in measured["took"].values()),
        data={
            "layers": {length: dict(seconds) for length, seconds in layers.items()},
            **{what: {name: dict(values) for name, values in by_name.items()} for what, by_name in measured.items()},
        },
        pictures=[
            growth_picture(
                "performer-speed",
                {name: {n: 1e3 * x for n, x in values.items()} for name, values in measured["seconds"].items()},
                ylabel="milliseconds, forward and backward",
                alt="Time of dense, performer and linear attention and of no attention against length, logarithmic.",
            ),
            growth_picture(
                "performer-speed-memory",
                {name: {n: 1e-6 * x for n, x in values.items()} for name, values in measured["bytes"].items()},
                ylabel="MB above the inputs, forward and backward",
                alt="Memory of dense, performer and linear attention and of no attention against length, logarithmic.",
            ),
        ],
    )


def last_power(values: Mapping[int, float]) -> float:
    """Return the growth between the two largest lengths, as an exponent of the length."""
    return power(dict(list(values.items())[-2:]))


PERFORMER_SPEED = Claim(
    name="performer-speed",
    system="Performer",
    source="Choromanski et al. 2021, section 4.1 and figure 3",
    text="Time and memory grow linearly with the length and are close to those of a layer without attention.",
    measure=_measure,
    minutes={"tiny": 0.1, "small": 0.5, "full": 12},
    plans=PLANS,
)
