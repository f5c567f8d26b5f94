"""`entmax`: whether heads learn different sparsity, how sparse they become, and loss and time relative to softmax."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

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
from longspan.report.heads import Heads, head_figure
from longspan.train.layer_hooks import head_supports

SOFTMAX, LEARNED = "softmax", "entmax"
# rules of the verdict, set before any training
SPREAD = 0.3
"""smallest range of the alphas of a training, which lie in [1, 2]"""
SPARSE = 0.5
"""largest share of visible keys with a nonzero weight"""


@dataclass(frozen=True, kw_only=True)
class EntmaxPlan(Plan):
    """Sizes of the comparison; window, held-out documents and bytes of each whose weights are counted."""

    window: int = 256
    counted_documents: int = 8
    counted_reach: int = 1024
    rounds: int = 3
    """rounds of timing both models, alternating"""


PLANS = plans(
    EntmaxPlan,
    tiny={"window": 32, "counted_documents": 2, "counted_reach": 100, "rounds": 1},
    small={"window": 128, "counted_documents": 2, "counted_reach": 256},
)


def _spec(name: str, window: int, **fields: Any) -> ModelSpec:
    """Return a model of `entmax` layers with these fields; without fields, of softmax layers with the same window."""
    mixer = {"name": "entmax", **fields} if fields else {"name": "window"}
    return ModelSpec(name=name, model={"mixers": [{**mixer, "window": window}]})


def models(plan: EntmaxPlan) -> list[ModelSpec]:
    """Return the two models, which differ in their mixer only; softmax is alpha 1."""
    return [_spec(SOFTMAX, plan.window), _spec(LEARNED, plan.window, alpha_init=1.5)]


def remedies(plan: EntmaxPlan) -> list[Remedy]:
    """Return the remedies.

    At the rate of a comparison, 3e-4 for 600 steps, an alpha moves by at most 0.17, so the alphas of a training range
    over 0.34 at best. Keys with weight zero get no gradient, and the start has learned with the softmax: what a head
    loses at step 0 it does not read again. Among more keys more are irrelevant.
    """
    learned, wide = _spec(LEARNED, plan.window, alpha_init=1.5), 4 * plan.window
    (mixer,) = learned.model["mixers"]
    far = {name: f"{name}, window of {wide:,}" for name in (LEARNED, SOFTMAX)}
    fast = {**mixer, "alpha_lr": 3e-3}
    return [
        changed_model(learned, SOFTMAX, "alphas learned at a rate of 3e-3", "optimizing", mixers=[fast]),
        changed_model(
            learned, SOFTMAX, "alphas from 1.1, at this rate", "retrieving", mixers=[{**fast, "alpha_init": 1.1}]
        ),
        Remedy(
            what="windows of four times as many keys",
            cause="needing",
            pair=(far[LEARNED], far[SOFTMAX]),
            models=[_spec(far[LEARNED], wide, alpha_init=1.5), _spec(far[SOFTMAX], wide)],
        ),
    ]


def shown(runs: TrainedRuns, name: str, plan: EntmaxPlan) -> str:
    """Describe the alphas and the weights of a model as the verdict asks for them."""
    model, task = runs.opened(name)
    documents = runs.documents(task, plan.counted_documents, plan.counted_reach)
    _, supports = head_supports(model, documents, model.cores(), chunk=256)
    look = {
        "alpha": [core.alpha.tolist() for core in model.cores()],
        "kept": sum(float(support.kept.sum()) for support in supports),
        "seen": sum(float(support.seen.sum()) for support in supports),
    }
    return f"alphas range over {_spreads([look])[0]:.2f}, {_share([look]):.1%} of the keys"


def inspect(runs: TrainedRuns, say: Say, plan: EntmaxPlan) -> dict[str, Any]:
    """Return the looks at the heads of every seed."""
    looks = []
    for seed in runs.seeds(SOFTMAX, LEARNED):
        looks.append(runs.once(f"support-{seed}", partial(inspect_heads, runs, plan, seed)))
        say(f"seed {seed}, alphas: " + "; ".join(numbers(layer, 2) for layer in looks[-1]["alpha"]))
    return {"looks": looks}


def inspect_heads(runs: TrainedRuns, plan: EntmaxPlan, seed: int) -> dict[str, Any]:
    """Return alphas by layer, and per head how many keys are visible and have a nonzero weight on held-out text."""
    pair = {name: runs.opened(name, seed) for name in (SOFTMAX, LEARNED)}
    model, task = pair[LEARNED]
    tokens = torch.randint(256, (4, plan.window), generator=torch.Generator().manual_seed(seed))
    documents = runs.documents(task, plan.counted_documents, plan.counted_reach)
    _, supports = head_supports(model, documents, model.cores(), chunk=256)
    times = {name: _training(variant, tokens) for name, (variant, _) in pair.items()}
    return {
        "alpha": [core.alpha.tolist() for core in model.cores()],
        "sizes": [support.sizes for support in supports],
        "shares": [support.shares for support in supports],
        "kept": sum(float(support.kept.sum()) for support in supports),
        "seen": sum(float(support.seen.sum()) for support in supports),
        "tokens": supports[0].queries,
        "seconds": time_alternately(times, plan.rounds),
    }


def _training(model: Any, tokens: torch.Tensor) -> Callable[[], object]:
    """Return a function without arguments, to be timed: a forward and backward pass on tokens (batch, length)."""
    return lambda: model(tokens)[0].sum().backward()


def _spreads(looks: Sequence[Mapping[str, Any]]) -> list[float]:
    """Return the range of the learned alphas, per seed."""
    alphas = [[value for layer in look["alpha"] for value in layer] for look in looks]
    return [max(values) - min(values) for values in alphas]


def _share(looks: Sequence[Mapping[str, Any]]) -> float:
    """Return the share of visible keys with a nonzero weight."""
    return sum(float(look["kept"]) for look in looks) / sum(float(look["seen"]) for look in looks)


def _figures(looks: Sequence[Mapping[str, Any]]) -> list[Figure]:
    """Return the rows of the results table that are about heads and time."""
    times = [look["seconds"][LEARNED] / look["seconds"][SOFTMAX] for look in looks]
    return [
        *(
            Figure(f"alphas of layer {index + 1}", "" if index else "spread over (1, 2)", numbers(layer, 2))
            for index, layer in enumerate(by_layer(looks, "alpha"))
        ),
        *(
            Figure(f"keys with a nonzero weight per query, layer {index + 1}", "", numbers(layer, 1))
            for index, layer in enumerate(by_layer(looks, "sizes"))
        ),
        Figure("range of the alphas, per seed", "about 1", numbers(_spreads(looks), 2)),
        Figure("share of visible keys with a nonzero weight", "well below 1", f"{_share(looks):.1%}"),
        Figure(
            "time forward and backward, relative to softmax",
            "1.33 (75 % of the throughput)",
            f"{numbers(times, 2)} times (CPU time, one thread, alternating)",
        ),
    ]


def judge(results: Results, plan: EntmaxPlan) -> Judgment:
    """Judge the claim: as good as softmax, with different alphas, and sparse."""
    figures = bit_figures(results, SOFTMAX, {LEARNED: "equally good: 26.93 BLEU against 26.02 (EN-DE)"})
    criteria, pictures, counted = [as_good(results, LEARNED, SOFTMAX)], [], ""
    looks = results.inspected.get("looks", [])
    if looks:
        spreads, share = _spreads(looks), _share(looks)
        criteria += [
            Criterion(
                what=f"Alphas range over at least {SPREAD} in every training",
                met=if_flat(results, [LEARNED], min(spreads) >= SPREAD),
                measured=numbers(spreads, 2),
            ),
            Criterion(
                what=f"At most {SPARSE:.0%} of the visible keys have a nonzero weight",
                met=if_flat(results, [LEARNED], share <= SPARSE),
                measured=f"{share:.1%}",
            ),
        ]
        figures += _figures(looks)
        counted = f", weights counted on {looks[0]['tokens']:,} bytes"
        pictures = [
            head_figure(
                "entmax",
                [(Heads(index + 1, 1), layer) for index, layer in enumerate(by_layer(looks, "alpha"))],
                ylabel="learned alpha: 1 is the softmax, 2 the sparsemax",
                ylim=(0.95, 2.05),
            )
        ]
    return Judgment(
        verdict=grade(criteria),
        figures=figures,
        note=f"{criteria_text(criteria)} Windows of {plan.window} keys, alphas from 1.5{counted}. The paper's models "
        "translate; these predict bytes and are small.",
        pictures=pictures,
    )


def comparison(plan: EntmaxPlan) -> Comparison:
    """Return the comparison at a size."""
    return Comparison(
        name="entmax",
        models=models(plan),
        pairs=[(LEARNED, SOFTMAX)],
        judge=lambda results: judge(results, plan),
        inspect=lambda runs, say: inspect(runs, say, plan),
        remedies=remedies(plan),
        look=Look(column="alphas and keys", measure=lambda runs, name: shown(runs, name, plan)),
    )


ENTMAX = Claim(
    name="entmax",
    system="Adaptively Sparse Transformer",
    source="Correia et al. 2019, sections 4 and 5, table 1 and figures 2 and 3",
    text="Every head learns its own alpha between softmax and sparsemax and gives most keys zero weight, and the model "
    "matches softmax attention.",
    parallel=measure_with(comparison),
    minutes={"tiny": 0.2, "small": 4, "full": 150},
    plans=PLANS,
)
