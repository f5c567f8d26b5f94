"""`entmax`: whether heads learn different sparsity, how sparse they become, and loss and time relative to softmax."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from longspan.experiments.claims.base import Claim, Figure, Outcome, Say, signed
from longspan.experiments.claims.contest import (
    EQUAL,
    INTERVALS,
    Contest,
    ModelRecords,
    as_good,
    bit_figures,
    by_layer,
    contest,
    differences,
    doubtful,
    numbers,
    recipe_with,
    run_folder,
    seconds_of,
    seeds_note,
    verdict_of,
)
from longspan.experiments.claims.growth import time_alternately
from longspan.experiments.claims.runs import evenly, measure_once
from longspan.report.heads import Heads, head_figure
from longspan.tasks.base import heads
from longspan.train import load_run
from longspan.train.layer_hooks import head_supports

SOFTMAX, LEARNED = "softmax", "entmax"
# rules of the verdict, set before any training
SPREAD = 0.3
"""smallest range of the alphas of a training, which lie in [1, 2]"""
SPARSE = 0.5
"""largest share of visible keys with a nonzero weight"""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Sizes: window, held-out documents and bytes of each whose weights are counted, the contest."""

    window: int
    counted: tuple[int, int]
    contest: Contest


PLANS: dict[str, Plan] = {
    "small": Plan(
        window=128,
        counted=(2, 256),
        contest=Contest(seeds=1, head=1024, documents=4, train={"steps": 12, "lanes": 4, "segment_length": 256}),
    ),
    "full": Plan(
        window=256,
        counted=(8, 1024),
        contest=Contest(seeds=2, head=2048, train={"steps": 280, "lanes": 4, "segment_length": 256}),
    ),
}


def recipes(plan: Plan) -> dict[str, dict[str, Any]]:
    """Return the recipes of the two models, which differ from `recipes/lm/entmax.toml` in their mixer only."""
    mixers: dict[str, dict[str, Any]] = {SOFTMAX: {"name": "window"}, LEARNED: {"name": "entmax", "alpha_init": 1.5}}
    return {name: recipe_with({**mixer, "window": plan.window}, "entmax") for name, mixer in mixers.items()}


def inspect_heads(folder: Path, plan: Plan, seed: int) -> dict[str, Any]:
    """Return alphas by layer, and per head how many keys are visible and have a nonzero weight on held-out text."""
    models = {name: load_run(run_folder(folder, name, seed)) for name in (SOFTMAX, LEARNED)}
    model, task = models[LEARNED]
    tokens = torch.randint(256, (4, plan.window), generator=torch.Generator().manual_seed(seed))
    count, head = plan.counted
    documents = heads(evenly(task.documents("validation"), count), head)
    _, supports = head_supports(model, documents, model.cores(), chunk=256)
    return {
        "alpha": [core.alpha.tolist() for core in model.cores()],
        "sizes": [support.sizes for support in supports],
        "shares": [support.shares for support in supports],
        "kept": sum(float(support.kept.sum()) for support in supports),
        "seen": sum(float(support.seen.sum()) for support in supports),
        "tokens": supports[0].queries,
        "seconds": time_alternately({name: _training(variant, tokens) for name, (variant, _) in models.items()}, 3),
    }


def _training(model: Any, tokens: torch.Tensor) -> Callable[[], object]:
    """Return a function without arguments, to be timed: a forward and backward pass on tokens (batch, length)."""
    return lambda: model(tokens)[0].sum().backward()


def measure(folder: Path, plan: Plan, say: Say) -> Outcome:
    """Train both models, then measure; a second call resumes from the folder."""
    models = contest(folder, recipes(plan), plan.contest, say)
    looks = []
    for seed in range(plan.contest.seeds):
        looks.append(measure_once(folder / f"support-{seed}.json", partial(inspect_heads, folder, plan, seed)))
        say(f"seed {seed}, alphas: " + "; ".join(numbers(layer, 2) for layer in looks[-1]["alpha"]))
    return outcome({"models": models, "looks": looks}, plan)


def _figures(models: ModelRecords, looks: list[dict[str, Any]], spreads: list[float], share: float) -> list[Figure]:
    """Return the rows of the results table.

    Args:
        models: evaluations of both models.
        looks: what `inspect_heads` returned, per seed.
        spreads: range of the learned alphas, per seed.
        share: share of visible keys with a nonzero weight.
    """
    alphas, sizes = by_layer(looks, "alpha"), by_layer(looks, "sizes")
    times = [look["seconds"][LEARNED] / look["seconds"][SOFTMAX] for look in looks]
    return [
        *bit_figures(models, SOFTMAX, {LEARNED: "equally good: 26.93 BLEU against 26.02 (EN-DE)"}),
        *(
            Figure(f"alphas of layer {index + 1}", "spread over (1, 2)" if not index else "", numbers(layer, 2))
            for index, layer in enumerate(alphas)
        ),
        *(
            Figure(f"keys with a nonzero weight per query, layer {index + 1}", "", numbers(layer, 1))
            for index, layer in enumerate(sizes)
        ),
        Figure("range of the alphas, per seed", "about 1", numbers(spreads, 2)),
        Figure("share of visible keys with a nonzero weight", "well below 1", f"{share:.1%}"),
        Figure(
            "time forward and backward, relative to softmax",
            "1.33 (75 % of the throughput)",
            f"{numbers(times, 2)} times (CPU time, one thread, alternating)",
        ),
    ]


def outcome(measured: Mapping[str, Any], plan: Plan) -> Outcome:
    """Judge the claim by its measurements: return the verdict, the numbers next to the paper's, and plots."""
    models, looks = measured["models"], measured["looks"]
    spreads = []
    for look in looks:
        values = [value for layer in look["alpha"] for value in layer]
        spreads.append(max(values) - min(values))
    share = sum(look["kept"] for look in looks) / sum(look["seen"] for look in looks)
    gap = differences(models, SOFTMAX)[LEARNED]
    good, differ, sparse = gap.high <= EQUAL, min(spreads) >= SPREAD, share <= SPARSE
    met = (good, differ, sparse)
    settings = plan.contest.train
    return Outcome(
        verdict=verdict_of(met, [gap]),
        figures=_figures(models, looks, spreads, share),
        size=f"4 layers of 128 with 4 heads, windows of {plan.window} keys, bytes of State of the Union speeches, "
        f"{settings['steps']:,} steps of {settings['lanes']} x {settings['segment_length']} bytes with carried "
        f"states, {plan.contest.seeds} seed(s), alphas from 1.5; held-out text: the first "
        f"{plan.contest.head:,} bytes of {len(models[SOFTMAX][0]['names'])} speeches; {INTERVALS}; weights counted on "
        f"{looks[0]['tokens']:,} bytes",
        note=f"Matches softmax (the upper end of the interval is at most {EQUAL} bits per byte): {as_good(gap)}, "
        f"{signed(gap)}. Alphas range over at least {SPREAD} in every training: {'yes' if differ else 'no'}. At most "
        f"{SPARSE:.0%} of the visible keys have a nonzero weight: {'yes' if sparse else 'no'}. The paper's models "
        "translate; these predict bytes, are small and trained briefly."
        + seeds_note(models)
        + (
            " This early in training, a lead shows how fast a model starts to learn, not how good it becomes."
            if doubtful(gap)
            else ""
        ),
        data=dict(measured),
        pictures=[
            head_figure(
                "entmax",
                [(Heads(index + 1, 1), layer) for index, layer in enumerate(by_layer(looks, "alpha"))],
                ylabel="learned alpha: 1 is the softmax, 2 the sparsemax",
                ylim=(0.95, 2.05),
            )
        ],
        seconds=seconds_of(models),
    )


ENTMAX = Claim(
    name="entmax",
    system="Adaptively Sparse Transformer",
    source="Correia et al. 2019, sections 4 and 5, table 1 and figures 2 and 3",
    text="Every head learns its own alpha between softmax and sparsemax and gives most keys zero weight, and the model "
    "matches softmax attention.",
    measure=measure,
    minutes={"small": 0.4, "full": 6},
    plans=PLANS,
)
