"""`adaptive-span`: spans that heads learn, and their FLOPs and loss next to fixed spans of the same maximum."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from longspan.cost import scaling
from longspan.experiments.claims.base import Claim, Figure, Say
from longspan.experiments.claims.continued import (
    Comparison,
    Criterion,
    Judgment,
    Look,
    ModelSpec,
    Plan,
    Remedy,
    Results,
    TrainedRuns,
    as_good,
    bit_figures,
    changed_model,
    criteria_text,
    grade,
    if_flat,
    measure_with,
    plans,
)
from longspan.experiments.claims.growth import time_alternately
from longspan.experiments.claims.heads import by_layer, numbers
from longspan.experiments.claims.tries import Cause
from longspan.report.heads import Heads, head_figure
from longspan.report.tables import signed

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
class SpanPlan(Plan):
    """Sizes of the comparison; largest span, length of the text for FLOPs and time, rounds of timing."""

    max_span: int = 1024
    timed_length: int = 8192
    rounds: int = 3


PLANS = plans(
    SpanPlan,
    tiny={"max_span": 128, "timed_length": 256, "rounds": 1, "models": (FIXED, ADAPTIVE)},
    small={"max_span": 512, "timed_length": 2048, "rounds": 1, "models": (FIXED, ADAPTIVE)},
)


def models(plan: SpanPlan) -> list[ModelSpec]:
    """Return the models, which differ in their mixer only.

    The short window equals the initial length of learned spans, so the difference from it is what learning adds.
    """
    mixers = {
        FIXED: {"name": "window", "window": plan.max_span},
        ADAPTIVE: {"name": "adaptive_span", "max_span": plan.max_span, "ramp": RAMP},
        SHORT: {"name": "window", "window": RAMP},
    }
    return [ModelSpec(name=name, model={"mixers": [mixer]}) for name, mixer in mixers.items()]


def remedies(plan: SpanPlan) -> list[Remedy]:
    """Return the remedies, each a change of the model with learned spans.

    At the rate of a comparison, 3e-4 for 600 steps, a share of the maximum moves by at most 0.17, which is less than
    the quarter that the longest span must reach. Beyond its ramp a span has no gradient.
    """
    (ours,) = (spec for spec in models(plan) if spec.name == ADAPTIVE)
    (mixer,) = ours.model["mixers"]
    changes: list[tuple[str, Cause, dict[str, Any]]] = [
        ("spans learned at a rate of 3e-3", "optimizing", {"span_lr": 3e-3}),
        ("spans from a quarter of the maximum", "retaining", {"initial": FAR}),
        ("a ramp of a quarter of the maximum", "retrieving", {"ramp": plan.max_span // 4}),
        ("no penalty on spans", "needing", {"penalty": 0.0}),
    ]
    return [changed_model(ours, FIXED, what, cause, mixers=[{**mixer, **fields}]) for what, cause, fields in changes]


def shown(runs: TrainedRuns, name: str, plan: SpanPlan) -> str:
    """Describe the learned spans of a model as the verdict asks for them."""
    model, fixed = (runs.opened(opened)[0] for opened in (name, FIXED))
    spans = [span for core in model.cores() for span in core.spans]
    saved = 1 - model.flops(plan.timed_length) / fixed.flops(plan.timed_length)
    near = sum(span < NEAR for span in spans) / len(spans)
    return f"{near:.0%} below {NEAR}, the longest {max(spans):.0f}; {saved:.0%} fewer FLOPs"


def inspect(runs: TrainedRuns, say: Say, plan: SpanPlan) -> dict[str, Any]:
    """Return the looks at the heads of every seed."""
    looks = []
    for seed in runs.seeds(FIXED, ADAPTIVE):
        looks.append(runs.once(f"spans-{seed}", partial(inspect_heads, runs, plan, seed)))
        say(f"seed {seed}: " + "; ".join(numbers(layer) for layer in looks[-1]["spans"]))
    return {"looks": looks}


def inspect_heads(runs: TrainedRuns, plan: SpanPlan, seed: int) -> dict[str, Any]:
    """Return the learned spans by layer, and FLOPs per token and time of both models, for one seed."""
    pair = {name: runs.opened(name, seed)[0] for name in (FIXED, ADAPTIVE)}
    length = plan.timed_length
    tokens = torch.randint(256, (1, length), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        seconds = time_alternately({name: _reading(model, tokens) for name, model in pair.items()}, plan.rounds)
    return {
        "spans": [core.spans for core in pair[ADAPTIVE].cores()],
        "flops": {name: model.flops(length) / length for name, model in pair.items()},
        # forward, by the convention of scaling papers: a third of training
        "counted": {name: scaling.model_training_flops(model, 1.0, length=length) / 3 for name, model in pair.items()},
        "seconds": seconds,
    }


def _reading(model: Any, tokens: torch.Tensor) -> Callable[[], object]:
    """Return a function without arguments that runs the model on tokens (1, length), for timing."""
    return lambda: model.last(tokens)


def _saved(looks: Sequence[Mapping[str, Any]], key: str) -> float:
    """Return the share of the fixed model's cost that the adaptive one saves, a mean over seeds."""
    return 1 - statistics.mean(float(look[key][ADAPTIVE] / look[key][FIXED]) for look in looks)


def _figures(looks: Sequence[Mapping[str, Any]], spans: Sequence[float], plan: SpanPlan) -> list[Figure]:
    """Return the rows of the results table that are about spans and their cost.

    Args:
        looks: what `inspect_heads` returned, per seed.
        spans: learned spans of all heads, layers and seeds.
        plan: sizes.
    """
    near = sum(value < NEAR for value in spans) / len(spans)
    flops, counted = looks[0]["flops"], looks[0]["counted"]
    return [
        Figure("mean span, in characters", "314 (text8, 12 layers, at most 8,192)", f"{sum(spans) / len(spans):.0f}"),
        *(
            Figure(f"spans of layer {index + 1}", "" if index else "shortest in the lowest layers", numbers(layer))
            for index, layer in enumerate(by_layer(looks, "spans"))
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
            f"time to read {plan.timed_length:,} characters, relative to fixed spans",
            "that of a fixed span of 2,048 at a maximum of 8,192 (training)",
            f"{1 - _saved(looks, 'seconds'):.2f} times (CPU time, one thread, alternating)",
        ),
    ]


def judge(results: Results, plan: SpanPlan) -> Judgment:
    """Judge the claim: as good as fixed spans, with fewer FLOPs, by spans most of which are short and some long."""
    figures = bit_figures(results, FIXED, {ADAPTIVE: "equally good: enwik8 1.02 (12 layers; Transformer-XL 1.06)"})
    criteria, pictures = [as_good(results, ADAPTIVE, FIXED)], []
    looks = results.inspected.get("looks", [])
    if looks:
        layers = by_layer(looks, "spans")
        spans = [value for layer in layers for value in layer]
        near, saved = sum(value < NEAR for value in spans) / len(spans), _saved(looks, "flops")
        criteria += [
            Criterion(
                what=f"At least {FEWER:.0%} fewer FLOPs than fixed spans",
                met=if_flat(results, [ADAPTIVE], saved >= FEWER),
                measured=f"{saved:.0%}",
            ),
            Criterion(
                what=f"Most heads below {NEAR} characters and one beyond {FAR:.0%} of the maximum",
                met=if_flat(results, [ADAPTIVE], near > 0.5 and max(spans) > FAR * plan.max_span),
                measured=f"{near:.0%} below, the longest {max(spans):.0f} of {plan.max_span:,}",
            ),
        ]
        figures += _figures(looks, spans, plan)
        pictures = [
            head_figure(
                "adaptive-span",
                [(Heads(index + 1, 1), layer) for index, layer in enumerate(layers)],
                ylabel="learned span in characters",
                ylim=(-0.03 * max(1.0, *spans), None),
            )
        ]
    return Judgment(
        verdict=grade(criteria),
        figures=figures,
        note=f"{criteria_text(criteria)} Spans of at most {plan.max_span:,}, a ramp of {RAMP} from which all begin, "
        f"AdamW (the paper: Adagrad).{_beyond(results)}",
        pictures=pictures,
    )


def _beyond(results: Results) -> str:
    """Return a sentence for the note: what learning adds to the spans from which heads begin."""
    if not {ADAPTIVE, SHORT} <= set(results.runs):
        return ""
    difference = results.difference(ADAPTIVE, SHORT)
    return f" Learned spans minus fixed ones of {RAMP} characters: {signed(difference)} bits per byte."


def comparison(plan: SpanPlan) -> Comparison:
    """Return the comparison at a size."""
    return Comparison(
        name="adaptive-span",
        models=models(plan),
        pairs=[(ADAPTIVE, FIXED)],
        judge=lambda results: judge(results, plan),
        inspect=lambda runs, say: inspect(runs, say, plan),
        remedies=remedies(plan),
        look=Look(column="spans", measure=lambda runs, name: shown(runs, name, plan)),
    )


ADAPTIVE_SPAN = Claim(
    name="adaptive-span",
    system="Adaptive Span",
    source="Sukhbaatar et al. 2019, sections 3.2 and 3.3, tables 1 and 2, figures 3 and 4",
    text="Every head learns its span: most need fewer than 100 characters, a few need many more, and the model matches "
    "one with fixed spans of the same maximum at a fraction of the FLOPs.",
    parallel=measure_with(comparison),
    minutes={"tiny": 0.2, "small": 4, "full": 120},
    plans=PLANS,
)
