"""`routing`: half of the heads routed by content against local heads of equal FLOPs, and the usage of clusters."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from longspan.contract.replay import Choices
from longspan.experiments.claims.base import Claim, Figure, Outcome, Say, graded
from longspan.experiments.claims.contest import (
    INTERVALS,
    Contest,
    ModelRecords,
    Plan,
    bit_figures,
    contest,
    differences,
    recipe_of,
    recipe_with,
    run_folder,
    seconds_of,
)
from longspan.experiments.claims.runs import measure_once
from longspan.experiments.figures import picture_of
from longspan.models import build_model
from longspan.report import Picture
from longspan.report.figures import Mark, Series, line_figure
from longspan.tasks.base import Documents, heads
from longspan.train import load_run

ROUTED, LOCAL, BALANCED, DENSE = "routed and local heads", "local heads", "the paper's equal clusters", "dense"
PIECE = 2048
"""bytes that a model reads at once, for which clusters, windows and FLOPs are chosen"""


PLANS: dict[str, Plan] = {
    "small": Plan(contest=Contest(seeds=1, head=2048, documents=4, train={"steps": 30})),
    "full": Plan(contest=Contest(seeds=2, head=8192, train={"steps": 800}), extra_models=(BALANCED, DENSE)),
}


def mixer_of(name: str) -> dict[str, Any]:
    """Return the mixer that every layer of a model has."""
    if name == DENSE:
        return {"name": "full"}
    if name == LOCAL:
        return {"name": "window", "window": equal_window()}
    mixer: dict[str, Any] = recipe_of("routing")["model"]["mixers"][0]
    local, routed = mixer["mixers"]
    return {**mixer, "mixers": [local, {**routed, "selection": "balanced"}]} if name == BALANCED else mixer


def flops(mixer: Mapping[str, Any]) -> int:
    """Return the FLOPs of a forward pass over `PIECE` bytes of a model with this mixer in every layer."""
    table = recipe_of("routing")["model"]
    return int(build_model({**table, "vocab_size": 256, "mixers": [dict(mixer)]}).flops(PIECE))


@cache
def equal_window() -> int:
    """Return the smallest window with which local heads cost at least the FLOPs of routed and local ones."""
    routed_flops = flops(mixer_of(ROUTED))
    low, high = 1, PIECE
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if flops({"name": "window", "window": middle}) < routed_flops else (low, middle)
    return low


def _recorded_in(choices: Choices) -> Callable[..., tuple[Any, ...]]:
    """Return a forward pre-hook of a core that records its choices of clusters in `choices`."""

    def hook(core: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return the positional arguments of a core with a layout that records its choices."""
        *rest, rows = arguments
        return (*rest, rows.with_choices(choices))

    return hook


@torch.no_grad()
def usage(model: Any, documents: Documents) -> list[list[float]]:
    """Return the share of tokens per cluster, largest first, for every routed head of every layer."""
    counts: list[np.ndarray[Any, Any]] = []
    clusters = recipe_of("routing")["model"]["mixers"][0]["mixers"][1]["num_clusters"]
    for document in documents.items:
        tokens = torch.from_numpy(np.asarray(document.cut(0, min(len(document), PIECE)).tokens)).long()
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


def compare(folder: Path, plan: Plan, say: Say) -> Outcome:
    """Train and evaluate all models; a second call resumes from the folder."""
    recipes = {name: recipe_with(mixer_of(name), "routing") for name in (LOCAL, ROUTED, *plan.extra_models)}
    models = contest(folder, {name: recipes[name] for name in (LOCAL, ROUTED)}, plan.contest, say)
    models |= contest(folder, {name: recipes[name] for name in plan.extra_models}, replace(plan.contest, seeds=1), say)
    shares: list[list[float]] = []
    for seed in range(plan.contest.seeds):
        run = run_folder(folder, ROUTED, seed)
        shares += measure_once(run / "usage.json", partial(_used, run, plan.contest))["shares"]
    return outcome(models, shares, plan.contest)


def _used(run: Path, plan: Contest) -> dict[str, Any]:
    """Measure the usage of clusters by the model of a run on the held-out documents."""
    model, task = load_run(run)
    return {"shares": usage(model, heads(task.documents("validation"), plan.head, plan.documents))}


def outcome(models: ModelRecords, shares: list[list[float]], plan: Contest) -> Outcome:
    """Judge the claim by its measurements: return the verdict, the numbers next to the paper's, and plots.

    Args:
        models: records of `contest`.
        shares: shares of tokens per cluster for each routed head, largest first.
        plan: sizes.
    """
    figures = bit_figures(models, LOCAL, {ROUTED: "0.99 (enwik8)"})
    figures += [
        Figure(f"GFLOPs per piece, {name}", "", f"{flops(mixer_of(name)) / 1e9:.2f}" + _window(name)) for name in models
    ]
    even = 1 / len(shares[0])
    busy = [sum(share > even / 10 for share in head) for head in shares]
    figures.append(
        Figure(
            "clusters with at least a tenth of an even share",
            "",
            f"{np.mean(busy):.1f} of {len(shares[0])} on average, at least {min(busy)}; the largest takes "
            f"{np.mean([head[0] for head in shares]):.0%} of the tokens",
        )
    )
    minus = differences(models, LOCAL)[ROUTED]
    return Outcome(
        verdict=graded(minus.high < 0, minus.value < 0),
        figures=figures,
        size="4 layers of 128, in each 2 heads with a window of 128 and 2 routed to 16 clusters of 128, against 4 "
        f"local heads of equal FLOPs; pieces of {PIECE:,} bytes of State of the Union speeches, "
        f"{plan.train['steps']:,} steps of one piece, {plan.seeds} seeds, one seed for extra models; held-out text: "
        f"the first {plan.head:,} bytes of {len(models[LOCAL][0]['names'])} speeches; {INTERVALS}",
        note=_note(models, busy, len(shares[0])),
        data={"models": models, "shares": shares},
        pictures=[_picture(shares)],
        seconds=seconds_of(models),
    )


def _note(models: ModelRecords, busy: list[int], clusters: int) -> str:
    """Explain the verdict and its limitations: collapsed clusters, too short a training."""
    parts = [
        "It holds if the routed model is better than local heads, with an interval of the difference below zero; in "
        "part if it is better but the interval includes zero."
    ]
    if 2 * min(busy) < clusters or 4 * np.mean(busy) < 3 * clusters:
        parts.append(
            f"Clusters collapsed ({np.mean(busy):.1f} of {clusters} busy, {min(busy)} in the worst head): these heads "
            "route less than they could, so the difference says little about routing."
        )
    if DENSE in models and differences(models, LOCAL)[DENSE].value > 0:
        parts.append(
            "After so few steps a model mainly uses near tokens: dense attention, which sees everything that local "
            "heads see, is behind them too."
        )
    parts.append(
        "The routed heads are strict, so that decoding equals training; in the paper all clusters take the same number "
        "of tokens."
    )
    return " ".join(parts)


def _window(name: str) -> str:
    """Return the window of the local heads as text, or "" for other models."""
    return f" (window {equal_window()})" if name == LOCAL else ""


def _picture(shares: list[list[float]]) -> Picture:
    """Plot the share of tokens per cluster, largest first, for each routed head and their mean."""
    count = len(shares[0])
    ranks = list(range(1, count + 1))
    mean = np.mean(shares, axis=0).tolist()
    series = [Series(x=ranks, y=mean, label="mean", kind="marked", color=0)]
    series += [
        Series(x=ranks, y=head, label="" if index else "one head", kind="faint", color=1)
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


ROUTING = Claim(
    name="routing",
    system="Routing Transformer",
    source="Roy et al. 2021, sections 5.2 to 5.5, tables 2 to 5",
    text="Routed and local heads together are better than local heads alone at the same cost.",
    measure=compare,
    minutes={"small": 1, "full": 30},
    plans=PLANS,
)
