"""`compressive`: Transformer-XL with half of its memory compressed, at equal cost of attention; all and rare words."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from longspan.experiments.claims.base import Claim, Figure, Say
from longspan.experiments.claims.continued import (
    Comparison,
    Criterion,
    Judgment,
    ModelSpec,
    Plan,
    Remedy,
    Results,
    TrainedRuns,
    ahead,
    bit_figures,
    criteria_text,
    grade,
    if_flat,
    plans,
)
from longspan.report import Picture
from longspan.report.figures import Mark, interval_series, line_figure, picture_of
from longspan.report.tables import signed
from longspan.train import Interval
from longspan.train import lm_evaluation as lm

SEGMENT = 128
OURS, PEER = "compressive, conv", "transformer_xl, memory of 128"
XL = "Transformer-XL"
# Both see 128 states before a segment; in ours half of them summarize four tokens each. The other models are ablations:
# no compressed slots after the same recent memory, and the paper's other compressions (table 4).
MIXERS: dict[str, dict[str, Any]] = {
    PEER: {"name": "transformer_xl", "segment": SEGMENT, "mem_len": 128},
    OURS: {"name": "compressive", "segment": SEGMENT, "mem_len": 64, "compressed_len": 64, "ratio": 4},
    "transformer_xl, memory of 64": {"name": "transformer_xl", "segment": SEGMENT, "mem_len": 64},
}
for _kind in ("mean", "max", "dilated", "most_used"):
    MIXERS[f"compressive, {_kind}"] = {**MIXERS[OURS], "compression": _kind}
# the mechanisms have relative positions
MODELS = [ModelSpec(name=name, model={"mixers": [mixer], "positions": "none"}) for name, mixer in MIXERS.items()]
_FAST = {"lr": 1e-3}


def _changed(name: str, base: str, **fields: Any) -> ModelSpec:
    """Return a model under another name, with other fields of its mixer."""
    return ModelSpec(name=name, model={"mixers": [{**MIXERS[base], **fields}], "positions": "none"})


REMEDIES = (
    Remedy(what="the mean of four states", cause="storing", pair=("compressive, mean", PEER), models=()),
    Remedy(
        what="two states per slot instead of four",
        cause="storing",
        pair=("compressive, two to one", PEER),
        models=(_changed("compressive, two to one", OURS, ratio=2),),
    ),
    Remedy(
        what="slots in addition to the memory of 128",
        cause="needing",
        pair=("compressive, memory of 128", PEER),
        models=(_changed("compressive, memory of 128", OURS, mem_len=128),),
    ),
    Remedy(
        what="a rate of 1e-3",
        cause="optimizing",
        pair=("compressive, rate 1e-3", "transformer_xl, rate 1e-3"),
        models=(
            replace(_changed("compressive, rate 1e-3", OURS), train=_FAST),
            replace(_changed("transformer_xl, rate 1e-3", PEER), train=_FAST),
        ),
    ),
)
RARE = 100
"""a word is rare if it occurs fewer times than this in the training text"""

_PAIR = {"models": (PEER, OURS)}
PLANS = plans(Plan, tiny=_PAIR, small=_PAIR)


def inspect(runs: TrainedRuns, say: Say) -> dict[str, Any]:
    """Return the difference of both models by the frequency of words, as plain data; empty if one of them failed."""
    if not runs.seeds(OURS, PEER):
        return {}
    _, task = runs.opened(OURS)
    documents = runs.documents(task, runs.plan.documents, runs.plan.reach)
    counts, seen = lm.count_text(documents, task.tokenizer), lm.count_words(task.texts("train"))
    buckets = lm.by_frequency({OURS: runs.losses(OURS), PEER: runs.losses(PEER)}, counts, seen)
    say(f"counted the words of {len(documents)} documents in the training text")
    return {"buckets": [_record(bucket) for bucket in buckets]}


def _record(bucket: lm.Bucket) -> dict[str, Any]:
    """Return a bucket of word frequencies as plain data."""
    return {
        "seen": _seen(bucket),
        "rare": bucket.last is not None and bucket.last <= RARE,
        "words": bucket.amount,
        "gain": list(bucket.gains[PEER]),
        "base": bucket.values[PEER].value,
    }


def judge(results: Results) -> Judgment:
    """Judge the claim: the compressed memory is better over all bytes, and gains most on rare words."""
    buckets = results.inspected.get("buckets", [])
    rare = [bucket for bucket in buckets if bucket["rare"]]
    frequent = [bucket for bucket in buckets if not bucket["rare"]]
    better = bool(rare) and all(bucket["gain"][2] < 0 for bucket in rare)
    most = bool(rare) and (not frequent or _gain(rare) < _gain(frequent))
    criteria = [
        ahead(results, OURS, PEER),
        Criterion(
            what=f"Better in every range of words that occur fewer than {RARE} times in the training text, with "
            "intervals below zero, and by more bits per rare word than per frequent one",
            met=if_flat(results, (OURS, PEER), better and most),
            measured=f"{sum(bucket['gain'][2] < 0 for bucket in rare)} of {len(rare)} ranges are better",
        ),
    ]
    paper = {PEER: "0.98 (enwik8), 36.3 (PG-19)", OURS: "0.97 (enwik8), 33.6 (PG-19)"}
    return Judgment(
        verdict=grade(criteria),
        figures=[
            *bit_figures(results, PEER, paper),
            *(
                Figure(
                    f"bits per word minus {XL}, words seen {bucket['seen']} times in training",
                    "" if index else "rarer words gain more",
                    f"{signed(Interval(*bucket['gain']))} of {bucket['base']:.2f} ({bucket['words']:,} words)",
                )
                for index, bucket in enumerate(buckets)
            ),
        ],
        note=f"{criteria_text(criteria)} Both see 128 states before a segment of {SEGMENT}, of which the older 64 of "
        f"the Compressive Transformer summarize {MIXERS[OURS]['ratio']} tokens each, so a layer reaches 320 bytes "
        "before its segment instead of 128. Words are separated by white space. The paper's models are hundreds of "
        "times larger and trained on books.",
        pictures=[_picture(buckets)] if buckets else [],
    )


def _gain(buckets: Sequence[Mapping[str, Any]]) -> float:
    """Return the mean difference in bits per word over some buckets, below zero if the compressed memory is better."""
    return float(np.average([bucket["gain"][0] for bucket in buckets], weights=[bucket["words"] for bucket in buckets]))


def _seen(bucket: lm.Bucket) -> str:
    """Return the range of word frequencies in a bucket as text, such as "10 to 99"."""
    if bucket.last is None:
        return f"{bucket.first:,} and more"
    return f"{bucket.first:,}" if bucket.last == bucket.first + 1 else f"{bucket.first:,} to {bucket.last - 1:,}"


def _picture(buckets: Sequence[Mapping[str, Any]]) -> Picture:
    """Plot the difference in bits per word to Transformer-XL against the frequency of words."""
    series = interval_series(range(len(buckets)), [Interval(*bucket["gain"]) for bucket in buckets], kind="points")
    return picture_of(
        line_figure,
        "compressive",
        [series],
        xlabel="occurrences of a word in the training text",
        ylabel=f"bits per word minus {XL}",
        marks=[Mark(0.0, horizontal=True)],
        xticks={index: bucket["seen"] for index, bucket in enumerate(buckets)},
        alt="Bits per word of the Compressive Transformer minus those of Transformer-XL, by frequency of the word.",
    )


COMPARISON = Comparison(
    name="compressive", models=MODELS, pairs=[(OURS, PEER)], judge=judge, inspect=inspect, remedies=REMEDIES
)
COMPRESSIVE = Claim(
    name="compressive",
    system="Compressive Transformer",
    source="Rae et al. 2020, sections 5.1, 5.2 and 5.6, tables 3, 4 and 6, figure 4",
    text="At the same cost of attention, a half-compressed memory is better, most of all for rare words.",
    parallel=COMPARISON.measure,
    minutes={"tiny": 0.2, "small": 4, "full": 130},
    plans=PLANS,
)
