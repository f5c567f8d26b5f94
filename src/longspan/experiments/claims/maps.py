"""`rmt-maps`: attention of memory tokens when memory is written, kept and read."""

from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from longspan.experiments.claims.base import Claim, Figure, Outcome, Say
from longspan.experiments.claims.rmt import TINY_RECIPE, train_once
from longspan.experiments.claims.runs import trained_seconds
from longspan.experiments.figures import heat_figure
from longspan.mixers import BatchLayout
from longspan.report.figures import picture_of
from longspan.tasks import MemoryTask
from longspan.train import load_run

_SHOWN = 24


class Plan(NamedTuple):
    """Sizes of the training and of what is measured."""

    samples: int
    """test samples whose attention is measured"""
    steps: int = 450
    recipe: tuple[str, ...] = ()
    """assignments of the training"""


PLANS = {"tiny": Plan(24, steps=3, recipe=TINY_RECIPE), "small": Plan(32), "full": Plan(128)}


def attention_maps(model: Any, tokens: Tensor, memory: Tensor) -> Tensor:
    """Return the attention weights (heads, columns, columns) of the last layer of a recurrent memory's backbone.

    Args:
        model: a `RecurrentClassifier`, whose `recurrent` is that recurrent memory.
        tokens: (1, length) token ids of one segment.
        memory: (1, count, dim) memory tokens before it; columns = count + length.
    """
    recurrent = model.recurrent
    stack = recurrent.backbone
    x = torch.cat([memory, stack.embedding(tokens)], 1)
    rows = BatchLayout(torch.zeros(1, dtype=torch.int64), x.shape[1])
    h = stack.add_positions(x, rows)
    for block in stack.layers[:-1]:
        h, _, _ = block(h, None, rows, False)
    last = stack.layers[-1]
    return cast(Tensor, last.mixer.attention_map(last.mixer_norm(h))[0])


def _one(model: Any, task: MemoryTask, seed: int) -> dict[str, Any] | None:
    """Return shares of attention in the segments of a sample; None if neither of the first two has a whole fact."""
    sample = task.sample("test", 4, [5, seed], kind="detect")
    parts = list(sample)
    where = [index for index, part in enumerate(parts) if part.whole]
    if not where or where[0] > 1:
        return None
    memory, _ = model.recurrent.cell.empty(1)
    count, state, maps = memory.shape[1], None, {}
    fact = task.encode(" " + sample.what.facts[0])
    for index, part in enumerate(parts):
        tokens = torch.from_numpy(part.tokens)[None]
        if index in (where[0], where[0] + 1, len(parts) - 1):
            role = {where[0]: "write", len(parts) - 1: "read"}.get(index, "keep")
            maps[role] = (attention_maps(model, tokens, memory), part.tokens)
        _, state = model(tokens, state)
        memory = state.memory
    written, start = maps["write"][0], _find(maps["write"][1], fact)
    on_fact = written[:, :count, count + start : count + start + len(fact)].sum(-1).max().item()
    on_memory = maps["keep"][0][:, :count, :count].sum(-1).max().item()
    read = maps["read"][0][:, -1, :count].sum(-1).max().item()
    return {
        "on_fact": on_fact,
        "kept": on_memory,
        "read": read,
        "maps": maps,
        "start": start,
        "count": count,
        "fact": fact,
    }


def _find(tokens: Any, fact: Any) -> int:
    """Return the index at which the token ids `fact` first occur in `tokens`."""
    starts = [i for i in range(len(tokens) - len(fact) + 1) if np.array_equal(tokens[i : i + len(fact)], fact)]
    return starts[0]


@torch.no_grad()
def _measure(folder: Path, plan: Plan, say: Say) -> Outcome:
    """Train a model on *detect* and measure where its memory tokens attend, over test samples."""
    run = folder / "detect-0"
    with torch.enable_grad():
        train_once(run, "detect", 0, plan.steps, *plan.recipe)
    model, task = cast("tuple[Any, MemoryTask]", load_run(run))
    samples = [sample for seed in range(plan.samples) if (sample := _one(model, task, seed)) is not None]
    uniform = len(samples[0]["fact"]) / (task.config.segment_length + samples[0]["count"])
    shares = {name: np.array([sample[name] for sample in samples]) for name in ("on_fact", "kept", "read")}
    say(", ".join(f"{name} {values.mean():.2f}" for name, values in shares.items()))
    return Outcome(
        verdict="holds" if shares["on_fact"].mean() > 10 * uniform else "holds in part",
        figures=[
            Figure(what, paper, f"{shares[name].mean():.2f} (least {shares[name].min():.2f}), n = {len(samples)}")
            for name, what, paper in (
                (
                    "on_fact",
                    f"write: share of a memory token's attention on the fact ({uniform:.3f} if even)",
                    "visible",
                ),
                ("kept", "keep: share of a memory token's attention on memory, in a segment of noise", "visible"),
                ("read", "read: share of the last token's attention on memory, at the end of the question", "visible"),
            )
        ],
        size="last layer of the `rmt` model, the head and memory token that attend most, test samples of 4 segments",
        note="Shares are of the attention of one head; the memory token that attends most is shown.",
        data={name: values.tolist() for name, values in shares.items()},
        pictures=[_picture(task, samples[0])],
        seconds=trained_seconds([run]),
    )


def _picture(task: MemoryTask, sample: dict[str, Any]) -> Any:
    """Draw the attention of the memory tokens on the words around the fact, for the head that attends to it most."""
    weights, tokens = sample["maps"]["write"]
    count, first = sample["count"], max(0, sample["start"] - 8)
    head = int(
        weights[:, :count, count + sample["start"] : count + sample["start"] + len(sample["fact"])].sum((1, 2)).argmax()
    )
    shown = weights[head, :count, count + first : count + first + _SHOWN].tolist()
    words = [task.tokenizer.decode([int(t)]).decode("utf-8", "replace").strip() or "·" for t in tokens]
    return picture_of(
        heat_figure,
        "rmt-maps",
        shown,
        rows=[str(index + 1) for index in range(count)],
        columns=words[first : first + _SHOWN],
        xlabel="the segment, around the fact",
        ylabel="memory token",
        numbers=False,
        alt="Attention of the memory tokens on the tokens around the fact, in the segment where it is written.",
        caption="Writing: memory tokens attend to the words of the fact.",
    )


RMT_MAPS = Claim(
    name="rmt-maps",
    system="Recurrent Memory Transformer",
    source="Bulatov et al. 2023, figure 5",
    text="Attention shows the operations of memory: it is written from the fact, kept over noise, and read by the "
    "question.",
    measure=_measure,
    minutes={"tiny": 0.1, "small": 4, "full": 5},
    plans=PLANS,
)
