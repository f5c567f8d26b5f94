"""`routing`: half of the heads routed by content against local heads of equal FLOPs, and the usage of clusters."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from longspan.contract.replay import Choices
from longspan.experiments.claims.base import Claim, Figure, Say
from longspan.experiments.claims.continued import (
    CEILING,
    Comparison,
    Judgment,
    Look,
    ModelSpec,
    Plan,
    Remedy,
    Results,
    TrainedRuns,
    ahead,
    another_rate,
    bit_figures,
    changed_model,
    criteria_text,
    grade,
    measure_with,
    plans,
)
from longspan.models import build_model
from longspan.report import Picture
from longspan.report.figures import Mark, Series, line_figure, picture_of
from longspan.tasks.base import Documents
from longspan.train.starts import start_model

ROUTED, LOCAL, BALANCED = "routed and local heads", "local heads", "the paper's equal clusters"
WINDOW = 128
"""of the local heads next to routed ones, and of a cluster"""

PLANS = plans(Plan, tiny={"models": (ROUTED, LOCAL)}, small={"models": (ROUTED, LOCAL)})


def routed_mixer(plan: Plan, num_heads: int, **fields: Any) -> dict[str, Any]:
    """Return a mixer with half of the heads local and half routed, with as many clusters as fill a piece.

    Args:
        plan: sizes.
        num_heads: of the layer.
        fields: of the routed heads; their window, which is the size of a cluster too, is `WINDOW` otherwise.
    """
    half = num_heads // 2
    local = {"name": "window", "window": WINDOW, "num_heads": num_heads - half}
    routed = {"name": "routing", "window": WINDOW, "num_heads": half, **fields}
    routed["num_clusters"] = max(plan.length // routed["window"], 2)
    return {"name": "mixed_heads", "mixers": [local, routed]}


def flops(plan: Plan, sizes: Mapping[str, Any], *mixers: Mapping[str, Any]) -> int:
    """Return the FLOPs of a forward pass over a piece of a model with these mixers by layer; nothing is stored.

    `sizes`: the `[model]` table of the start.
    """
    with torch.device("meta"):
        return int(build_model({**sizes, "vocab_size": 256, "mixers": [*map(dict, mixers)]}).flops(plan.length))


def equal_window(plan: Plan, sizes: Mapping[str, Any], **fields: Any) -> int:
    """Return the smallest window with which local heads cost at least the FLOPs of routed and local ones.

    `fields`: of the routed heads.
    """
    least = flops(plan, sizes, routed_mixer(plan, sizes["num_heads"], **fields))
    low, high = 1, plan.length
    while low < high:
        middle = (low + high) // 2
        enough = flops(plan, sizes, {"name": "window", "window": middle}) >= least
        low, high = (low, middle) if enough else (middle + 1, high)
    return low


def models(plan: Plan) -> list[ModelSpec]:
    """Return the models, all of which read the same pieces as dense attention."""
    sizes = start_model(plan.start)
    table = {
        ROUTED: routed_mixer(plan, sizes["num_heads"]),
        LOCAL: {"name": "window", "window": equal_window(plan, sizes)},
        BALANCED: routed_mixer(plan, sizes["num_heads"], selection="balanced"),
    }
    return [ModelSpec(name=name, model={"mixers": [mixer]}, carries=False) for name, mixer in table.items()]


def remedies(plan: Plan, ours: ModelSpec, local: ModelSpec) -> list[Remedy]:
    """Return the remedies.

    Routed heads use their queries as keys, so they lose the keys of the start. They see the last tokens of a cluster,
    and the token that matters may be in another one. Lower layers need near tokens most.

    Args:
        plan: sizes.
        ours, local: the models that are compared.
    """
    sizes = start_model(plan.start)
    heads, layers = sizes["num_heads"], sizes["num_layers"]
    large = 2 * WINDOW
    separate = routed_mixer(plan, heads, shared_qk=False)
    upper = [local.model["mixers"][0]] * (layers - layers // 2) + [ours.model["mixers"][0]] * (layers // 2)
    wide = {"name": "window", "window": equal_window(plan, sizes, window=large)}
    wide_spec = ModelSpec(name=f"{LOCAL}, window {wide['window']}", model={"mixers": [wide]}, carries=False)
    clusters = changed_model(
        ours,
        wide_spec.name,
        f"clusters of {large}",
        "retrieving",
        mixers=[routed_mixer(plan, heads, window=large)],
    )
    return [
        changed_model(ours, LOCAL, "keys of their own", "retaining", mixers=[separate]),
        replace(clusters, models=[*clusters.models, wide_spec]),
        changed_model(ours, LOCAL, "routed heads in the upper half of the layers", "needing", mixers=upper),
        another_rate("1e-3", ours, local),
    ]


def _recorded_in(choices: Choices) -> Callable[..., tuple[Any, ...]]:
    """Return a forward pre-hook of a core that records its choices of clusters in `choices`."""

    def hook(core: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return the positional arguments of a core with a layout that records its choices."""
        *rest, rows = arguments
        return (*rest, rows.with_choices(choices))

    return hook


@torch.no_grad()
def usage(model: Any, documents: Documents, length: int) -> list[list[float]]:
    """Return the share of tokens per cluster, largest first, for every routed head of every layer.

    Args:
        model: with routed heads.
        documents: of which the first `length` tokens are read.
        length: of a piece.
    """
    counts: list[np.ndarray[Any, Any]] = []
    # the last layers route, if any do
    clusters = model.config.mixers[-1]["mixers"][1]["num_clusters"]
    for document in documents.items:
        tokens = torch.from_numpy(np.asarray(document.cut(0, min(len(document), length)).tokens)).long()
        choices = Choices()
        hooks = [core.register_forward_pre_hook(_recorded_in(choices)) for core in model.cores()]
        model(tokens[None], None)
        for hook in hooks:
            hook.remove()
        chosen = torch.cat([layer[0] for layer in choices.recorded])
        cluster_counts = np.stack([np.bincount(head.numpy(), minlength=clusters) for head in chosen])
        counts.append(cluster_counts)
    total = np.sum(counts, axis=0)
    return np.sort(total / total.sum(1, keepdims=True))[:, ::-1].tolist()  # type: ignore[no-any-return]


def inspect(runs: TrainedRuns, say: Say, plan: Plan, specs: Sequence[ModelSpec]) -> dict[str, Any]:
    """Return the usage of clusters of all seeds, the FLOPs of the models, and the window of the local heads."""
    shares: list[list[float]] = []
    for seed in runs.seeds(ROUTED):
        shares += runs.once(f"usage-{seed}", partial(_used, runs, plan, seed))["shares"]
    sizes = start_model(plan.start)
    (window,) = (spec.model["mixers"][0]["window"] for spec in specs if spec.name == LOCAL)
    costs = {spec.name: flops(plan, sizes, spec.model["mixers"][0]) for spec in specs}
    say("counted the tokens of every cluster")
    return {"shares": shares, "flops": {CEILING: flops(plan, sizes, {"name": "full"}), **costs}, "window": window}


def _used(runs: TrainedRuns, plan: Plan, seed: int, name: str = ROUTED) -> dict[str, Any]:
    """Measure the usage of clusters by the model of a run on the held-out documents."""
    model, task = runs.opened(name, seed)
    return {"shares": usage(model, runs.documents(task, plan.documents, plan.length), plan.length)}


def shown(runs: TrainedRuns, name: str, plan: Plan) -> str:
    """Describe how many clusters of a model are used."""
    shares = _used(runs, plan, 0, name)["shares"]
    return f"{np.mean(_busy(shares)):.1f} of {len(shares[0])}"


def judge(results: Results) -> Judgment:
    """Judge the claim: routed and local heads are better than local heads of equal FLOPs."""
    criteria = [ahead(results, ROUTED, LOCAL)]
    shares, costs, window = (results.inspected[key] for key in ("shares", "flops", "window"))
    figures = bit_figures(results, LOCAL, {ROUTED: "0.99 (enwik8)"})
    figures += [
        Figure(f"GFLOPs per piece, {name}", "", f"{value / 1e9:.2f}" + (f" (window {window})" if name == LOCAL else ""))
        for name, value in costs.items()
        if name in results.runs
    ]
    busy = _busy(shares)
    if busy:
        figures.append(
            Figure(
                "clusters with at least a tenth of an even share",
                "",
                f"{np.mean(busy):.1f} of {len(shares[0])} on average, at least {min(busy)}; the largest takes "
                f"{np.mean([head[0] for head in shares]):.0%} of the tokens",
            )
        )
    return Judgment(
        verdict=grade(criteria),
        figures=figures,
        note=f"{criteria_text(criteria)} {_note(shares, busy)}",
        pictures=[_picture(shares)] if shares else [],
    )


def _busy(shares: Sequence[Sequence[float]]) -> list[int]:
    """Return, per routed head, the number of clusters with at least a tenth of an even share of the tokens."""
    return [sum(share > 1 / len(head) / 10 for share in head) for head in shares]


def _note(shares: Sequence[Sequence[float]], busy: Sequence[int]) -> str:
    """Explain the limits of the comparison: collapsed clusters, strict routing."""
    parts = []
    clusters = len(shares[0]) if shares else 0
    if busy and (2 * min(busy) < clusters or 4 * np.mean(busy) < 3 * clusters):
        parts.append(
            f"Clusters collapsed ({np.mean(busy):.1f} of {clusters} busy, {min(busy)} in the worst head): these heads "
            "route less than they could, so the difference says little about routing."
        )
    parts.append(
        f"Half of the heads have a window of {WINDOW}, half are routed to clusters of {WINDOW}. The routed heads are "
        "strict, so that decoding equals training; in the paper all clusters take the same number of tokens."
    )
    return " ".join(parts)


def _picture(shares: Sequence[Sequence[float]]) -> Picture:
    """Plot the share of tokens per cluster, largest first, for each routed head and their mean."""
    count = len(shares[0])
    ranks = list(range(1, count + 1))
    mean = np.mean(shares, axis=0).tolist()
    series = [Series(x=ranks, y=mean, label="mean", kind="marked", color=0)]
    series += [
        Series(x=ranks, y=list(head), label="" if index else "one head", kind="faint", color=1)
        for index, head in enumerate(shares)
    ]
    return picture_of(
        line_figure,
        "routing",
        series,
        xlabel="clusters of a head, largest first",
        ylabel="share of held-out tokens",
        marks=[Mark(1 / count, "even", horizontal=True)],
        xticks=ranks,
        ylim=(0, None),
        alt="Share of held-out tokens per cluster, largest first, for every routed head.",
    )


def comparison(plan: Plan) -> Comparison:
    """Return the comparison at a size."""
    specs = models(plan)
    return Comparison(
        name="routing",
        models=specs,
        pairs=[(ROUTED, LOCAL)],
        judge=judge,
        inspect=lambda runs, say: inspect(runs, say, plan, specs),
        remedies=remedies(plan, *specs[:2]),
        look=Look(column="busy clusters", measure=lambda runs, name: shown(runs, name, plan)),
    )


ROUTING = Claim(
    name="routing",
    system="Routing Transformer",
    source="Roy et al. 2021, sections 5.2 to 5.5, tables 2 to 5",
    text="Routed and local heads together are better than local heads alone at the same cost.",
    parallel=measure_with(comparison),
    minutes={"tiny": 0.3, "small": 4, "full": 150},
    plans=PLANS,
)
