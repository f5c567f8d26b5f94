"""`reformer-depth`: memory of activations in a training step against the depth of the model."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longspan.experiments.claims.activations import blocks_alone, blocks_in_process
from longspan.experiments.claims.base import Claim, Figure, Outcome, Say, graded
from longspan.experiments.claims.runs import measure_once
from longspan.files import write_json
from longspan.report import Picture
from longspan.report.figures import Series, line_figure, picture_of

MIXERS: tuple[dict[str, Any], ...] = (
    {"name": "window", "window": 64, "blocks": True},
    {"name": "lsh", "selection": "sorted", "bucket_size": 64, "num_buckets": 64},
)
"""Reformer's layers: local and LSH, alternating."""
KINDS = {
    "plain": "ordinary blocks",
    "checkpoint": "ordinary blocks, each recomputed",
    "reversible": "reversible blocks",
    "reversible, ffn_chunk": "reversible blocks, feed-forward in chunks",
}
GROWTH = 1.25
"""largest ratio of peaks, deepest to shallowest, that counts as independent of the depth"""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Sizes: depths, tokens per text, width of the model."""

    layers: tuple[int, ...]
    length: int
    dim: int
    alone: bool = True
    """every training step in a process of its own; False: all in one, which is faster and less exact"""


PLANS: dict[str, Plan] = {
    "tiny": Plan(layers=(2, 4), length=256, dim=32, alone=False),
    "small": Plan(layers=(2, 8), length=1024, dim=64),
    "full": Plan(layers=(2, 4, 8, 16, 32), length=2048, dim=128),
}


def _measure(folder: Path, plan: Plan, say: Say) -> Outcome:
    """Measure a training step of each kind of block at each depth; a second call resumes from the folder."""
    by_mode: dict[str, list[dict[str, float]]] = {}
    if not plan.alone:
        _measure_together(folder, plan)
    for mode in KINDS:
        for layers in plan.layers:
            record = measure_once(_path(folder, mode, layers), lambda: _timed(mode, layers, plan))  # noqa: B023 - called at once
            by_mode.setdefault(mode, []).append(record)
            say(f"{KINDS[mode]}, {layers} layers: {record['peak'] / 1e6:.1f} MB")
    return outcome(by_mode, plan)


def _path(folder: Path, mode: str, layers: int) -> Path:
    """Return the file of a measurement."""
    return folder / f"{mode.replace(', ', '-')}-{layers}.json"


def _measure_together(folder: Path, plan: Plan) -> None:
    """Measure what is not saved yet in one process, and save it."""
    runs = [(mode, layers) for mode in KINDS for layers in plan.layers if not _path(folder, mode, layers).is_file()]
    begin = time.perf_counter()
    records = blocks_in_process([(*run, plan.length, plan.dim, MIXERS) for run in runs])
    share = (time.perf_counter() - begin) / max(len(runs), 1)
    for run, record in zip(runs, records, strict=True):
        write_json(_path(folder, *run), {**record, "process": share})


def _timed(mode: str, layers: int, plan: Plan) -> dict[str, float]:
    """Measure a training step in a separate process, and the seconds that the process ran."""
    begin = time.perf_counter()
    measurements = blocks_alone(mode, layers, plan.length, plan.dim, MIXERS)
    return {**measurements, "process": time.perf_counter() - begin}


def outcome(by_mode: dict[str, list[dict[str, float]]], plan: Plan) -> Outcome:
    """Judge the claim by its measurements: return the verdict, the numbers next to the paper's, and plots."""
    depths = ", ".join(f"{layers}" for layers in plan.layers)
    figures = []
    for mode, records in by_mode.items():
        peaks = [record["peak"] for record in records]
        figures.append(
            Figure(
                f"{KINDS[mode]}: peak MB, {depths} layers",
                "independent of the depth" if "reversible" in mode else "grows with the depth",
                f"{_megabytes(peaks)} (deepest over shallowest: {peaks[-1] / peaks[0]:.2f})",
            )
        )
    figures += [
        Figure(
            f"{KINDS[mode]}: MB saved by autograd, {depths} layers",
            "inputs and outputs of one layer" if mode == "reversible" else "",
            _megabytes([record["saved"] for record in by_mode[mode]]),
        )
        for mode in ("plain", "reversible")
    ]
    times = [by_mode["reversible"][-1]["seconds"] / by_mode[mode][-1]["seconds"] for mode in ("plain", "checkpoint")]
    figures.append(
        Figure(
            f"CPU time of a step, {plan.layers[-1]} layers, reversible over ordinary and over recomputed blocks",
            "a second forward pass",
            f"{times[0]:.2f}, {times[1]:.2f}",
        )
    )
    grown = {mode: records[-1]["peak"] / records[0]["peak"] for mode, records in by_mode.items()}
    flat = grown["reversible"] <= GROWTH and by_mode["reversible"][-1]["saved"] == by_mode["reversible"][0]["saved"]
    less = by_mode["reversible"][-1]["peak"] < by_mode["plain"][-1]["peak"]
    return Outcome(
        verdict=graded(flat and less, less),
        figures=figures,
        size=f"a forward and backward pass on one text of {plan.length:,} tokens, dim {plan.dim}, 4 heads, local "
        "layers (chunks of 64) and LSH (chunks of 64, 2 rounds, sorted) alternating, dropout 0.1, fp32, 1 thread; "
        f"{'each in its own process' if plan.alone else 'all in one process'}: peak resident memory minus that before "
        "the pass and minus gradients of the parameters",
        note="Only small parts grow with the depth: the buckets of LSH layers, which are stored for the backward pass "
        "(one byte per token, head and round), and states of random generators. Whether reversibility costs quality is "
        "not measured here.",
        data=dict(by_mode),
        pictures=[_picture(by_mode, plan)],
        seconds=sum(record["process"] for records in by_mode.values() for record in records),
    )


def _megabytes(values: list[float]) -> str:
    """Return bytes as text in MB, separated by commas."""
    return ", ".join(f"{value / 1e6:.1f}" for value in values)


def _picture(by_mode: dict[str, list[dict[str, float]]], plan: Plan) -> Picture:
    """Plot peak memory against the number of layers, one line per kind of block."""
    series = [
        Series(x=list(plan.layers), y=[record["peak"] / 1e6 for record in records], label=KINDS[mode], kind="marked")
        for mode, records in by_mode.items()
    ]
    return picture_of(
        line_figure,
        "reformer-depth",
        series,
        xlabel="layers",
        ylabel="peak MB of activations, forward and backward",
        xscale="log2",
        ylim=(0, None),
        xticks=list(plan.layers),
        alt="Peak memory of activations against the number of layers, ordinary, recomputed and reversible blocks.",
    )


REFORMER_DEPTH = Claim(
    name="reformer-depth",
    system="Reformer",
    source="Kitaev et al. 2020, section 3 and table 3",
    text="With reversible layers the memory of activations does not depend on the number of layers.",
    measure=_measure,
    minutes={"tiny": 0.1, "small": 0.6, "full": 4},
    plans=PLANS,
)
