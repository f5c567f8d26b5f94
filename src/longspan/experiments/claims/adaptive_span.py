"""`adaptive-span`: spans that heads learn, and their FLOPs and loss next to fixed spans of the same maximum."""

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from longspan.cost import scaling
from longspan.experiments.claims.base import Claim, Figure, Outcome, Say, signed
from longspan.experiments.claims.contest import (
    EQUAL,
    INTERVALS,
    Contest,
    ModelRecords,
    as_good,
    bit_figures,
    by_layer,
    caution,
    contest,
    difference,
    differences,
    numbers,
    recipe_with,
    run_folder,
    seconds_of,
    seeds_note,
    verdict_of,
)
from longspan.experiments.claims.growth import time_alternately
from longspan.experiments.claims.runs import measure_once
from longspan.report.heads import Heads, head_figure
from longspan.train import Interval, load_run

FIXED, ADAPTIVE, SHORT = "fixed", "adaptive", "fixed, short"
RAMP = 32
# rules of the verdict, set before any training
FEWER = 0.3
"""smallest share of forward FLOPs to save"""
NEAR = 100
"""characters; most spans must be shorter, as in the paper's figure"""
FAR = 0.25
"""share of the maximum; some span must be longer"""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Sizes: largest span, length of the text for FLOPs and time, rounds of timing, the contest."""

    max_span: int
    length: int
    rounds: int
    contest: Contest


PLANS: dict[str, Plan] = {
    "small": Plan(
        max_span=256,
        length=1024,
        rounds=1,
        contest=Contest(seeds=1, head=1024, documents=4, train={"steps": 12, "lanes": 4, "segment_length": 256}),
    ),
    "full": Plan(
        max_span=1024,
        length=8192,
        rounds=3,
        contest=Contest(seeds=2, head=4096, train={"steps": 450, "lanes": 4, "segment_length": 256}),
    ),
}


def recipes(plan: Plan) -> dict[str, dict[str, Any]]:
    """Return the recipes of the models, which differ from `recipes/lm/adaptive_span.toml` in their mixer only.

    The short window equals the initial length of learned spans, so the difference from it is what learning adds.
    """
    mixers = {
        FIXED: {"name": "window", "window": plan.max_span},
        ADAPTIVE: {"name": "adaptive_span", "max_span": plan.max_span, "ramp": RAMP},
        SHORT: {"name": "window", "window": RAMP},
    }
    return {name: recipe_with(mixer, "adaptive_span") for name, mixer in mixers.items()}


def inspect_heads(folder: Path, plan: Plan, seed: int) -> dict[str, Any]:
    """Return the learned spans by layer, and FLOPs per token and time of both models, for one seed."""
    models = {name: load_run(run_folder(folder, name, seed))[0] for name in (FIXED, ADAPTIVE)}
    tokens = torch.randint(256, (1, plan.length), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        seconds = time_alternately({name: _reading(model, tokens) for name, model in models.items()}, plan.rounds)
    return {
        "spans": [core.spans for core in models[ADAPTIVE].cores()],
        "flops": {name: model.flops(plan.length) / plan.length for name, model in models.items()},
        # forward, by the convention of scaling papers: a third of training
        "counted": {
            name: scaling.model_training_flops(model, 1.0, length=plan.length) / 3 for name, model in models.items()
        },
        "seconds": seconds,
    }


def _reading(model: Any, tokens: torch.Tensor) -> Callable[[], object]:
    """Return a function without arguments that runs the model on tokens (1, length), for timing."""
    return lambda: model.last(tokens)


def measure(folder: Path, plan: Plan, say: Say) -> Outcome:
    """Train all models, then measure; a second call resumes from the folder."""
    models = contest(folder, recipes(plan), plan.contest, say)
    looks = []
    for seed in range(plan.contest.seeds):
        looks.append(measure_once(folder / f"spans-{seed}.json", partial(inspect_heads, folder, plan, seed)))
        say(f"seed {seed}: " + "; ".join(numbers(layer) for layer in looks[-1]["spans"]))
    return outcome({"models": models, "looks": looks}, plan)


def _saved(looks: list[dict[str, Any]], key: str) -> float:
    """Return the share of the fixed model's cost that the adaptive one saves, a mean over seeds."""
    return 1 - statistics.mean(float(look[key][ADAPTIVE] / look[key][FIXED]) for look in looks)


def _beyond(models: ModelRecords) -> Interval:
    """Return bits per character of learned spans minus those of the short fixed window."""
    return difference(models[ADAPTIVE], models[SHORT])


def _figures(
    models: ModelRecords, looks: list[dict[str, Any]], spans: list[float], layers: list[list[float]], plan: Plan
) -> list[Figure]:
    """Return the rows of the results table.

    Args:
        models: evaluations of all models.
        looks: what `inspect_heads` returned, per seed.
        spans: learned spans of all heads, layers and seeds.
        layers: the same spans by layer.
        plan: sizes.
    """
    near = sum(value < NEAR for value in spans) / len(spans)
    flops, counted = looks[0]["flops"], looks[0]["counted"]
    papers = {ADAPTIVE: "equally good: enwik8 1.02 (12 layers; Transformer-XL 1.06)"}
    return [
        *bit_figures(models, FIXED, papers, "bits per character"),
        Figure(f"adaptive minus fixed spans of {RAMP}", "", f"{signed(_beyond(models))} bits per character"),
        Figure("mean span, in characters", "314 (text8, 12 layers, at most 8,192)", f"{sum(spans) / len(spans):.0f}"),
        *(
            Figure(f"spans of layer {index + 1}", "shortest in the lowest layers" if not index else "", numbers(layer))
            for index, layer in enumerate(layers)
        ),
        Figure(f"heads with spans below {NEAR} characters", "most", f"{near:.0%} of {len(spans)}"),
        Figure("longest span", "more than 1,000 of 4,096", f"{max(spans):.0f} of {plan.max_span:,}"),
        Figure(
            "forward FLOPs per character, computed",
            "up to 70 % fewer",
            f"{flops[ADAPTIVE] / 1e6:.2f} M against {flops[FIXED] / 1e6:.2f} M with fixed spans: "
            f"{_saved(looks, 'flops'):.0%} fewer",
        ),
        Figure(
            "forward FLOPs per character by the convention of scaling laws (pairs attended to)",
            "",
            f"{counted[ADAPTIVE] / 1e6:.2f} M against {counted[FIXED] / 1e6:.2f} M: "
            f"{_saved(looks, 'counted'):.0%} fewer",
        ),
        Figure(
            f"time to read {plan.length:,} characters, relative to fixed spans",
            "that of a fixed span of 2,048 at a maximum of 8,192 (training)",
            f"{1 - _saved(looks, 'seconds'):.2f} times (CPU time, one thread, alternating)",
        ),
    ]


def outcome(measured: Mapping[str, Any], plan: Plan) -> Outcome:
    """Judge the claim by its measurements: return the verdict, the numbers next to the paper's, and plots."""
    models, looks = measured["models"], measured["looks"]
    spans = [value for look in looks for layer in look["spans"] for value in layer]
    layers = by_layer(looks, "spans")
    near = sum(value < NEAR for value in spans) / len(spans)
    gap = differences(models, FIXED)[ADAPTIVE]
    good, fewer = gap.high <= EQUAL, _saved(looks, "flops") >= FEWER
    uneven = near > 0.5 and max(spans) > FAR * plan.max_span
    met = (good, fewer, uneven)
    settings = plan.contest.train
    return Outcome(
        verdict=verdict_of(met, [gap]),
        figures=_figures(models, looks, spans, layers, plan),
        size=f"4 layers of 128 with 4 heads, spans of at most {plan.max_span:,}, ramp {RAMP}, bytes of State of the "
        f"Union speeches, {settings['steps']:,} steps of {settings['lanes']} x {settings['segment_length']} bytes with "
        f"carried states, AdamW (the paper: Adagrad), {plan.contest.seeds} seed(s); held-out text: the first "
        f"{plan.contest.head:,} bytes of {len(models[FIXED][0]['names'])} speeches; {INTERVALS}",
        note=f"Matches fixed spans (the upper end of the interval is at most {EQUAL} bits per character): "
        f"{as_good(gap)}, {signed(gap)}. At least {FEWER:.0%} fewer FLOPs: {'yes' if fewer else 'no'}. Most heads "
        f"below {NEAR} characters and one beyond {FAR:.0%} of the maximum: {'yes' if uneven else 'no'}. The model is "
        "small and trained briefly, so it uses little distant context, and short spans cost it little."
        + seeds_note(models)
        + caution(gap, "attention over the whole maximum")
        + f" Learned spans minus fixed ones of {RAMP} characters: {signed(_beyond(models))}.",
        data=dict(measured),
        pictures=[
            head_figure(
                "adaptive-span",
                [(Heads(index + 1, 1), layer) for index, layer in enumerate(layers)],
                ylabel="learned span in characters",
                ylim=(-0.03 * max(1.0, *spans), None),
            )
        ],
        seconds=seconds_of(models),
    )


ADAPTIVE_SPAN = Claim(
    name="adaptive-span",
    system="Adaptive Span",
    source="Sukhbaatar et al. 2019, sections 3.2 and 3.3, tables 1 and 2, figures 3 and 4",
    text="Every head learns its span: most need fewer than 100 characters, a few need many more, and the model matches "
    "one with fixed spans of the same maximum at a fraction of the FLOPs.",
    measure=measure,
    minutes={"small": 0.3, "full": 9},
    plans=PLANS,
)
