"""`compressive`: Transformer-XL with half of its memory compressed, at equal cost of attention; all and rare words."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from longspan.experiments.claims.base import Claim, Figure, Outcome, Say, graded, signed
from longspan.experiments.claims.contest import Contest, Plan, curve, lead, run_folder
from longspan.experiments.claims.runs import read_recipe, train_or_resume, trained_seconds
from longspan.experiments.figures import interval_series, picture_of
from longspan.files import read_tensors, write_tensors
from longspan.report import Picture
from longspan.report.figures import Mark, line_figure
from longspan.tasks.base import Array, heads
from longspan.tasks.text import TextTask
from longspan.train import lm_evaluation as lm
from longspan.train import load_run

SEGMENT = 128
OURS, PEER = "compressive, conv", "transformer_xl, memory of 128"
XL = "Transformer-XL"
# Both see 128 states before a segment; in ours half of them summarize four tokens each. Extra models, which a plan may
# name, are ablations: no compressed slots after the same recent memory, and the paper's other compressions (table 4).
MIXERS: dict[str, dict[str, Any]] = {
    PEER: {"name": "transformer_xl", "segment": SEGMENT, "mem_len": 128},
    OURS: {"name": "compressive", "segment": SEGMENT, "mem_len": 64, "compressed_len": 64, "ratio": 4},
    "transformer_xl, memory of 64": {"name": "transformer_xl", "segment": SEGMENT, "mem_len": 64},
}
for _kind in ("mean", "max", "dilated", "most_used"):
    MIXERS[f"compressive, {_kind}"] = {**MIXERS[OURS], "compression": _kind}
QUARTERS = 4
RARE = 100
"""a word is rare if it occurs fewer times than this in the training text"""


PLANS: dict[str, Plan] = {
    "small": Plan(contest=Contest(seeds=1, head=2048, documents=4, train={"steps": 60})),
    "full": Plan(contest=Contest(seeds=2, head=16_384, train={"steps": 1500})),
}


def recipe_of(name: str, seed: int, plan: Contest) -> dict[str, Any]:
    """Return the recipe of quickstart-lm with the mixer `name` and a seed."""
    recipe = read_recipe("quickstart-lm", seed=seed, eval_every=0, final_eval_tokens=2000, threads=1, **plan.train)
    recipe["model"]["mixers"] = [MIXERS[name]]
    return recipe


def losses(folder: Path, model: Any, documents: Any, plan: Contest) -> list[Array]:
    """Return the loss at every position of each held-out document, from the file of an earlier call if there is one."""
    path = folder / f"places-{plan.documents}x{plan.head}.safetensors"
    if not path.is_file():
        nats = lm.place_nats(model, documents, chunk=SEGMENT)
        write_tensors(path, {str(index): torch.from_numpy(nats_of_one) for index, nats_of_one in enumerate(nats)}, {})
    tensors, _ = read_tensors(path)
    return [tensors[str(index)].numpy() for index in range(len(tensors))]


def measure(folder: Path, plan: Plan, say: Say) -> Outcome:
    """Train and evaluate all models; a second call resumes from the folder."""
    read: dict[str, list[list[Array]]] = {}
    runs, counts, seen, parameters, sizes = [], None, {}, {}, plan.contest
    for name in (PEER, OURS, *plan.extra_models):
        for seed in range(sizes.seeds if name in (PEER, OURS) else 1):
            run = run_folder(folder, name, seed)
            train_or_resume(recipe_of(name, seed, sizes), run)
            model, task = load_run(run)
            assert isinstance(task, TextTask)
            documents = heads(task.documents("validation"), sizes.head, sizes.documents)
            if counts is None:
                counts = lm.count_text(documents, task.tokenizer)
                seen = lm.count_words(task.texts("train"))
            read.setdefault(name, []).append(losses(run, model, documents, sizes))
            parameters[name] = model.num_parameters()
            runs.append(run)
            bits = lm.summary(read[name][-1], counts)["bits_per_byte"].value
            say(f"{name}, seed {seed}: {bits:.4f} bits per byte")
    assert counts is not None
    ours, peer = ([curve(run_folder(folder, name, seed)) for seed in range(sizes.seeds)] for name in (OURS, PEER))
    gap = lead(ours, peer, width=1)[1]
    behind = [float(part.mean()) for part in np.array_split(gap, min(QUARTERS, len(gap)))]
    return outcome(read, counts, seen, sizes, parameters, trained_seconds(runs), behind)


def mean_of(parts: Sequence[Sequence[Array]]) -> list[Array]:
    """Average losses over seeds, position by position, for each document."""
    return [np.stack(document_losses).mean(0, dtype=np.float64) for document_losses in zip(*parts, strict=True)]


def outcome(
    read: Mapping[str, list[list[Array]]],
    counts: lm.TextCounts,
    seen: Mapping[bytes, int],
    plan: Contest,
    parameters: Mapping[str, int],
    seconds: float,
    behind: Sequence[float],
) -> Outcome:
    """Judge the claim by its measurements: return the verdict, the numbers next to the paper's, and plots.

    `behind` is the training loss minus that of Transformer-XL, by quarters of the training.
    """
    ours, peer = mean_of(read[OURS]), mean_of(read[PEER])
    figures, data = [], {}
    for name, parts in read.items():
        # a model of one seed is compared with the same seed of Transformer-XL
        base = peer if len(parts) == plan.seeds else read[PEER][0]
        value = lm.summary(mean_of(parts), counts)["bits_per_byte"]
        minus = lm.difference(mean_of(parts), base, counts.units)
        data[name] = {
            "bits": value.value,
            "difference": list(minus),
            "seeds": len(parts),
            "parameters": parameters[name],
        }
        paper = {PEER: "0.98 (enwik8), 36.3 (PG-19)", OURS: "0.97 (enwik8), 33.6 (PG-19)"}.get(name, "")
        figures.append(
            Figure(
                f"bits per byte, {name}",
                paper,
                f"{value.value:.4f}"
                + (f" ({signed(minus)} relative to Transformer-XL)" if name != PEER else "")
                + f", {len(parts)} seed{'s' if len(parts) > 1 else ''}, {parameters[name]:,} parameters",
            )
        )
    figures.append(
        Figure(
            f"training loss minus that of {XL}, by quarters of the training",
            "",
            ", ".join(f"{part:+.3f}" for part in behind).replace("-", "−") + " bits per byte",
        )
    )
    buckets = lm.by_frequency({OURS: ours, PEER: peer}, counts, seen)
    for bucket in buckets:
        assert bucket.gain is not None
        data[_seen(bucket)] = {"words": bucket.amount, "gain": list(bucket.gain)}
        figures.append(
            Figure(
                f"bits per word minus {XL}, words seen {_seen(bucket)} times in training",
                "rarer words gain more" if bucket is buckets[0] else "",
                f"{signed(bucket.gain)} of {bucket.values[PEER].value:.2f} ({bucket.amount:,} words)",
            )
        )
    all_words = lm.difference(ours, peer, counts.units)
    rare = [bucket for bucket in buckets if bucket.last is not None and bucket.last <= RARE]
    better = [bucket.gain is not None and bucket.gain.high < 0 for bucket in rare]
    frequent = [bucket for bucket in buckets if bucket not in rare]
    most = bool(rare) and (not frequent or _gain(rare) < _gain(frequent))
    return Outcome(
        verdict=graded(all_words.high < 0 and bool(better) and all(better) and most, all_words.high < 0 or any(better)),
        figures=figures,
        size=f"4 layers of 128, segments of {SEGMENT}, {plan.train['steps']:,} steps of 1,024 bytes of State of the "
        "Union speeches; both see 128 states before a segment, of which the Compressive Transformer's older 64 "
        f"summarize {MIXERS[OURS]['ratio']} tokens each; held-out text: the first {plan.head:,} bytes of "
        f"{len(counts.names)} speeches; 95 % intervals by bootstrap over documents, losses averaged over seeds",
        note=f"It holds if the loss is lower over all bytes and in every bucket of words that occur fewer than {RARE} "
        "times in the training text, with intervals below zero, and more bits are gained per rare word than per "
        "frequent one; in part if one of the first two is met. A layer reaches 320 bytes before its segment instead "
        "of 128. The paper's models are hundreds of times larger and trained on books.",
        data=data,
        pictures=[_picture(buckets)],
        seconds=seconds,
    )


def _gain(buckets: Sequence[lm.Bucket]) -> float:
    """Return the mean difference in bits per word over some buckets, below zero if the compressed memory is better."""
    gains = [bucket.gain.value for bucket in buckets if bucket.gain is not None]
    return float(np.average(gains, weights=[bucket.amount for bucket in buckets]))


def _seen(bucket: lm.Bucket) -> str:
    """Return the range of word frequencies in a bucket as text, such as "10 to 99"."""
    if bucket.last is None:
        return f"{bucket.first:,} and more"
    return f"{bucket.first:,}" if bucket.last == bucket.first + 1 else f"{bucket.first:,} to {bucket.last - 1:,}"


def _picture(buckets: Sequence[lm.Bucket]) -> Picture:
    """Plot the difference in bits per word to Transformer-XL against the frequency of words."""
    gains = [bucket.gain for bucket in buckets if bucket.gain is not None]
    series = interval_series(range(len(gains)), gains, kind="points")
    return picture_of(
        line_figure,
        "compressive",
        [series],
        xlabel="occurrences of a word in the training text",
        ylabel=f"bits per word minus {XL}",
        marks=[Mark(0.0, horizontal=True)],
        xticks={index: _seen(bucket) for index, bucket in enumerate(buckets)},
        alt="Bits per word of the Compressive Transformer minus those of Transformer-XL, by frequency of the word.",
    )


COMPRESSIVE = Claim(
    name="compressive",
    system="Compressive Transformer",
    source="Rae et al. 2020, sections 5.1, 5.2 and 5.6, tables 3, 4 and 6, figure 4",
    text="At the same cost of attention, a half-compressed memory is better, most of all for rare words.",
    measure=measure,
    minutes={"small": 1, "full": 32},
    plans=PLANS,
)
