"""`language-modelling`: every mechanism and memory, continued from one trained start on the same bytes of code."""

from typing import Any

from longspan import mixers
from longspan.experiments.claims.base import Claim, Figure
from longspan.experiments.claims.continued import (
    CEILING,
    FLOOR,
    Comparison,
    Judgment,
    ModelSpec,
    Pair,
    Plan,
    Remedy,
    Results,
    ahead,
    from_recipe,
    grade,
    plans,
)
from longspan.train import recipe_names

RECIPES = [name.removeprefix("lm/") for name in recipe_names() if name.startswith("lm/")]
NAMES = tuple(dict.fromkeys(name for name in (*mixers.names(), *RECIPES) if name in RECIPES))
"""All of recipes/lm/NAME.toml: mechanisms in the order of the registry, then other models."""
WITHOUT = {"transformer_xl": "segments_relative", "compressive": "segments_relative", "infini": "segments"}
"""Models that must beat the same model without memory, and that model: it has the same parameters and reads the same
bytes in the same order, every segment alone."""
PAIRS: tuple[Pair, ...] = tuple(WITHOUT.items())
_FAST = {"lr": 2e-3}
# These compute something else than a softmax over most keys, and begin above 3 bits. At the rate of a comparison linear
# and performer stay at 3.9 bits from step 60 on, and the others are still falling at the end.
_OPTIONS: dict[str, dict[str, Any]] = {
    **{name: {"train": _FAST} for name in ("linear", "performer", "gated_delta", "routing")},
    # pieces of 4,096 are twice as long as those of the recipe
    "lsh": {"train": _FAST, "changes": {"num_buckets": 64}},
    # its state grows: after 10^5 bytes of a document a step of carried states takes ten times as long as the first one
    "sparse": {"carries": False},
    # gates move by less than 0.2 at the rate of a comparison: they would stay closed where the recipe has them
    "infini": {"changes": {"gate_init": -1.0}},
}
MODELS = tuple(from_recipe(name, **_OPTIONS.get(name, {})) for name in NAMES if name not in (FLOOR, CEILING))

_OPEN, _SHORT = {"gate_init": -1.0}, {"segment": 32}
_INFINI = {"name": "infini", "segment": 128}
REMEDIES = (
    Remedy(
        what="a rate of 2e-3",
        cause="optimizing",
        pair=("infini, rate 2e-3", "segments, rate 2e-3"),
        models=(
            from_recipe("infini", label="infini, rate 2e-3", changes=_OPEN, train=_FAST),
            from_recipe("segments", label="segments, rate 2e-3", train=_FAST),
        ),
    ),
    Remedy(
        what="segments of 32 bytes instead of 128",
        cause="needing",
        pair=("infini of 32", "segments of 32"),
        models=(
            from_recipe("infini", label="infini of 32", changes={**_OPEN, **_SHORT}),
            from_recipe("segments", label="segments of 32", changes=_SHORT),
        ),
    ),
    Remedy(
        what="the delta update of the memory",
        cause="retaining",
        pair=("infini, delta", "segments"),
        models=(ModelSpec(name="infini, delta", model={"mixers": [{**_INFINI, **_OPEN, "update": "delta"}]}),),
    ),
    Remedy(
        what="gates nearly closed at the start",
        cause="retrieving",
        pair=("infini, gates -3", "segments"),
        models=(from_recipe("infini", label="infini, gates -3"),),
    ),
)
"""For infini, which gains least. By the position in a segment, memory takes away 0.02 bits where a segment begins and
adds 0.003 where it has its own context: it cannot address what was just read, because its keys have no positions, and a
head's gate is the same at every position."""

_XL = ("transformer_xl", "segments_relative")
PLANS = plans(
    Plan,
    tiny={
        "models": _XL,
        "length": 512,
        "steps": 20,
        "reach": 1024,
        "curve_documents": 4,
        "curve_reach": 512,
        "train": {"lr": 2e-3, "warmup": 5},
    },
    small={"models": _XL},
)


def judge(results: Results) -> Judgment:
    """Judge the claim: models with memory beat the same models without it, where both are flat."""
    known = {*results.runs, *results.failures}
    pairs = [pair for pair in PAIRS if set(pair) <= known]
    criteria = [ahead(results, *pair, first=True) for pair in pairs]
    figures = []
    for (name, base), criterion in zip(pairs, criteria, strict=True):
        what = f"{name}, bits per byte relative to {base}, the same without memory"
        figures.append(Figure(f"{what}, first {results.plan.first:,} bytes", "better", criterion.measured))
        figures.append(Figure(f"{what}, all bytes", "", ahead(results, name, base).measured))
    return Judgment(
        verdict=grade(criteria),
        figures=figures,
        note="It holds if models with memory are better than the same models without it over the first "
        f"{results.plan.first:,} bytes of every document, with an interval below zero and flat runs of both, for "
        f"{', '.join(WITHOUT)}; in part if this is true for some of them. If none is better, it does not hold where "
        "all runs are flat, and is undecided where some are not.",
    )


COMPARISON = Comparison(name="language-modelling", models=MODELS, pairs=PAIRS, judge=judge, remedies=REMEDIES)
LANGUAGE_MODELLING = Claim(
    name="language-modelling",
    system="all",
    source="the papers' tables of language modeling, at a small size",
    text="Models with memory beat the same models without it; beside them, all other mechanisms after the same "
    "training.",
    parallel=COMPARISON.measure,
    restore=COMPARISON.restore,
    minutes={"tiny": 0.2, "small": 4, "full": 180},
    plans=PLANS,
)
