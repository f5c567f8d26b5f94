"""`performer-protein`: ReLU and softmax features against exact attention on proteins, and similarity from attention.

First exact attention is trained in three sizes, and its learning curves are compared with counting the residues of the
sequence itself. Then the best model continues with exact attention and with both kinds of features in its place.
"""

import importlib.util
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch

from longspan.errors import UnsupportedError
from longspan.experiments.claims.base import Claim, Figure, Outcome, Say, Verdict, graded
from longspan.experiments.claims.protein_curve import (
    Reach,
    beyond,
    curve_figures,
    curve_picture,
    curve_table,
    extrapolate,
)
from longspan.experiments.claims.protein_runs import (
    PRIOR,
    Job,
    Plan,
    Shape,
    TrainedRun,
    by_frequency,
    continued_job,
    first_job,
    first_sequences,
    held_out_of,
    train_all,
)
from longspan.experiments.claims.runs import measure_once
from longspan.experiments.claims.similarity import (
    Agreement,
    agreement,
    attention_between,
    blosum62,
    even_attention,
    rank_of_pair,
    similarity_by_heads,
    similarity_by_pairs,
    similarity_of_embeddings,
)
from longspan.experiments.figures import matrix_figure
from longspan.report import Picture
from longspan.report.figures import Panel, picture_of
from longspan.report.tables import signed
from longspan.tasks import ProteinTask
from longspan.tasks.base import Array
from longspan.tasks.protein import AMINO_ACIDS, ProteinDocument
from longspan.train import Evaluation, load_run
from longspan.train.workers import ONE_WORKER, Workers

MIXERS: dict[str, dict[str, Any]] = {
    "exact": {"name": "full"},
    "softmax features": {"name": "performer", "kind": "positive", "redraw_every": 100},
    "ReLU features": {"name": "performer", "kind": "relu", "redraw_every": 0},
}
PAIRS = ("DE", "FY")
# similar amino acids are neighbors, so that BLOSUM62 has blocks along its diagonal
ORDER = "CSTAGPDEQNHRKMILVWYF"
# two losses count as equal if they differ by less than this share of the gain of exact attention over frequencies
EQUAL = 0.1
# bits per residue beyond composition: the goal of the first trainings; less is what the note calls little
LITTLE = 0.05

PLANS: dict[str, Plan] = {
    "tiny": Plan(
        shapes=(Shape(layers=1, dim=16, heads=2, steps=2), Shape(layers=2, dim=16, heads=2, steps=2)),
        scored=6,
        # every pair of amino acids must occur in one of them
        mapped=8,
        points=2,
        lanes=2,
        length=64,
        continued=0.5,
        features=8,
        copies=1,
        recipe=(("task", "validation_fraction", 0.2),),
        sequences=300,
        relabelings=100,
        # two points do not determine a law
        draws=0,
    ),
    "small": Plan(
        shapes=(Shape(layers=2, dim=32, heads=2, steps=300), Shape(layers=2, dim=64, heads=2, steps=300)),
        scored=200,
        mapped=40,
        warmup=50,
        continued=0.2,
        features=64,
        copies=2,
        draws=20,
    ),
    # 82 million residues, ten times the 8 million of all training sequences; the largest model reads half of them,
    # because with 82 million it alone would take three hours
    "full": Plan(
        shapes=(
            Shape(layers=2, dim=64, heads=2, steps=20_000),
            Shape(layers=3, dim=96, heads=3, steps=20_000),
            Shape(layers=4, dim=128, heads=4, steps=10_000),
        ),
        scored=2000,
        mapped=200,
        draws=100,
    ),
}


class Scored(NamedTuple):
    """The models of the second part: their evaluations, similarities, and the number of sequences mapped."""

    scores: dict[str, Evaluation]
    """of the predictors by frequency and of each model"""
    ways: dict[str, dict[str, Array]]
    """(20, 20) similarities by method ("by heads", "by pairs", "of embeddings") and model"""
    mapped: int


def measure(folder: Path, plan: Plan, say: Say, workers: Workers = ONE_WORKER) -> Outcome:
    """Train exact attention in all sizes, continue the best with every mixer, score and map; a second call resumes.

    Raises:
        LongspanError: a run failed.
        UnsupportedError: scipy, which the extrapolation needs, is missing.
    """
    # said before hours of training, not after them
    if plan.draws and importlib.util.find_spec("scipy") is None:
        raise UnsupportedError("performer-protein: its extrapolation needs scipy; pip install 'longspan[scaling]'")
    source = str(first_sequences(folder / "sequences.fasta", plan.sequences)) if plan.sequences else ""
    firsts = [replace(first_job(folder, shape, plan, source), quiet=workers.count > 1) for shape in plan.shapes]
    # the longest first, so that no process waits for it at the end
    exact = train_all(firsts[::-1], workers, say)[::-1]
    _, task = cast("tuple[Any, ProteinTask]", load_run(firsts[0].run))
    held_out = held_out_of(task, plan)
    counts = {
        "frequencies": by_frequency(held_out, task.frequencies()),
        "frequencies in the sequence itself": by_frequency(held_out, task.frequencies(), PRIOR),
    }
    counted = counts["frequencies in the sequence itself"]
    for run in exact:
        say(f"exact {run.folder.name}: {signed(beyond(counted, run)[-1])} bits better than counting")
    best = min(zip(firsts, exact, strict=True), key=lambda pair: pair[1].last.bits_per_unit)
    continued = _continue(folder, best[0], say, workers)
    scored = _scored(continued, counts, plan)
    for name in MIXERS:
        say(f"{name}: {_score_text(scored.scores[name])}")
    reaches = {run.folder.name: extrapolate(run, counted, LITTLE, draws=plan.draws) for run in exact if plan.draws}
    return _outcome(plan, exact, reaches, best[0], scored, sum(run.seconds for run in (*exact, *continued.values())))


def _continue(folder: Path, best: Job, say: Say, workers: Workers) -> dict[str, TrainedRun]:
    """Continue the best model with every mixer; return the runs by the mixer's name."""
    every = []
    for name, mixer in MIXERS.items():
        table = mixer if name == "exact" else {**mixer, "num_features": best.plan.features}
        every.append(replace(continued_job(folder, _folder_of(name), table, best), quiet=workers.count > 1))
    # those with features take longer
    return dict(zip(MIXERS, train_all(every[::-1], workers, say)[::-1], strict=True))


def _folder_of(name: str) -> str:
    """Return the name of the folder of a continued model."""
    return name.split()[0].lower()


def _scored(runs: Mapping[str, TrainedRun], counts: Mapping[str, Evaluation], plan: Plan) -> Scored:
    """Map the attention of the continued models, and return it with all evaluations."""
    maps: dict[str, Array] = {}
    words: dict[str, Array] = {}
    for name, run in runs.items():
        model, task = cast("tuple[Any, ProteinTask]", load_run(run.folder))
        # all runs have the same task, and so the same sequences
        items = (cast(ProteinDocument, item) for item in task.documents("validation").items)
        short = [document for document in items if len(document) <= plan.longest + 2][: plan.mapped]
        maps[name] = _map(run.folder, model, short)
        words[name] = similarity_of_embeddings(model)
    even = np.sum([even_attention(torch.from_numpy(document.tokens)) for document in short], 0)
    ways = {
        "by heads": {name: similarity_by_heads(between) for name, between in maps.items()},
        "by pairs": {name: similarity_by_pairs(between, even) for name, between in maps.items()},
        "of embeddings": words,
    }
    return Scored({**counts, **{name: run.last for name, run in runs.items()}}, ways, len(short))


def _map(folder: Path, model: Any, documents: list[ProteinDocument]) -> Array:
    """Return attention between amino acids summed over sequences, (layers * heads, 20, 20), computed or from a file."""

    def measure() -> dict[str, Any]:
        """Sum the attention between amino acids over all documents."""
        parts = [attention_between(model, torch.from_numpy(document.tokens)) for document in documents]
        return {"between": np.sum(parts, 0).tolist()}

    return np.array(measure_once(folder / f"attention-{len(documents)}.json", measure)["between"])


def _score_text(evaluation: Evaluation) -> str:
    """Return perplexity and accuracy with their intervals as text."""
    bits, share = evaluation.interval(), evaluation.accuracy_interval()
    return (
        f"perplexity {2**bits.value:.2f} [{2**bits.low:.2f}, {2**bits.high:.2f}], "
        f"accuracy {share.value:.2%} [{share.low:.2%}, {share.high:.2%}]"
    )


def _outcome(
    plan: Plan,
    exact: Sequence[TrainedRun],
    reaches: Mapping[str, Reach | None],
    best: Job,
    scored: Scored,
    seconds: float,
) -> Outcome:
    """Return the verdict and the numbers next to the paper's.

    Args:
        plan: sizes.
        exact: first trainings with exact attention.
        reaches: residues at which each of them would reach the goal, by the name of its folder.
        best: the first training from which the compared models start.
        scored: the compared models.
        seconds: of training.
    """
    scores, blosum = scored.scores, blosum62()
    counted = scores["frequencies in the sequence itself"]
    agreed = {
        way: {name: agreement(matrix, blosum, samples=plan.relabelings) for name, matrix in matrices.items()}
        for way, matrices in scored.ways.items()
    }
    by_heads, heads = scored.ways["by heads"], agreed["by heads"]
    verdict, note = judge(scores, heads)
    return Outcome(
        verdict=verdict,
        figures=[
            *curve_figures(exact, counted, reaches, LITTLE),
            *_score_figures(scores),
            *_similarity_figures(by_heads, agreed),
        ],
        tables=[curve_table(exact, counted)],
        size=_size_text(plan, best, scored),
        note=note,
        data={
            "bits": {name: evaluation.interval() for name, evaluation in scores.items()},
            "accuracy": {name: evaluation.accuracy_interval() for name, evaluation in scores.items()},
            "amino_acids": AMINO_ACIDS,
            "agreement": {
                way: {name: match._asdict() for name, match in by_model.items()} for way, by_model in agreed.items()
            },
            "similarity": {
                way: {name: matrix.round(4).tolist() for name, matrix in matrices.items()}
                for way, matrices in scored.ways.items()
            },
            "best": best.run.name,
            "curves": {
                run.folder.name: {
                    "parameters": run.parameters,
                    "seconds": run.seconds,
                    "residues": [point.residues for point in run.points],
                    "bits": [point.evaluation.bits_per_unit for point in run.points],
                    "beyond": beyond(counted, run),
                }
                for run in exact
            },
            "extrapolated": {name: reach and reach.record() for name, reach in reaches.items()},
        },
        pictures=[curve_picture(exact, counted, LITTLE), _picture(by_heads, heads, blosum)],
        seconds=seconds,
    )


def _score_figures(scores: Mapping[str, Evaluation]) -> list[Figure]:
    """Return the rows of the losses of all predictors and of the differences of the models."""
    paper = {"softmax features": "about equal to exact attention", "ReLU features": "best"}
    figures = [
        Figure(f"masked residues, {name}", paper.get(name, ""), _score_text(evaluation))
        for name, evaluation in scores.items()
    ]
    for name in MIXERS:
        if name != "exact":
            less = scores[name].minus(scores["exact"])
            expected = "below 0" if name.startswith("ReLU") else "about 0"
            figures.append(Figure(f"bits per residue, {name} minus exact", expected, signed(less)))
    return figures


def _similarity_figures(by_heads: Mapping[str, Array], agreed: Mapping[str, Mapping[str, Agreement]]) -> list[Figure]:
    """Return the rows of the similarities of amino acids by every method, and of the ranks of the paper's pairs."""
    figures = []
    for name in MIXERS:
        seen = "finds similar pairs" if name != "exact" else ""
        figures += [
            Figure(
                f"similarity {way} against BLOSUM62, {name}", seen if way == "by heads" else "", _agreed(by_model[name])
            )
            for way, by_model in agreed.items()
        ]
        ranks = ", ".join(f"({pair[0]}, {pair[1]}) {rank_of_pair(by_heads[name], pair)}" for pair in PAIRS)
        figures.append(Figure(f"rank among 190 pairs by heads, {name}", "among the first" if seen else "", ranks))
    return figures


def _size_text(plan: Plan, best: Job, scored: Scored) -> str:
    """Return models, data and training as text."""
    shapes = ", ".join(f"{shape.name} ({shape.steps:,} steps)" for shape in plan.shapes)
    counted, steps = scored.scores["frequencies"], round(plan.continued * best.recipe["train"]["steps"])
    return (
        f"encoders with exact attention of layers x width {shapes} of {plan.lanes} x {plan.length} residues of "
        f"UniProt, one seed; the best, {best.run.name}, continued for {max(steps, 1):,} steps with each mixer, "
        f"{plan.features} features, same batches; {len(counted.names):,} held-out sequences of other families, "
        f"{int(counted.tokens.sum()):,} masked residues; maps of {scored.mapped} of them; intervals 95 %, bootstrap "
        "over sequences; p-values by relabeling the amino acids"
    )


def _agreed(match: Agreement) -> str:
    """Return both correlations with their p-values as text."""
    pearson = f"Pearson {match.pearson:.2f} (p {match.pearson_p:.4f})"
    return f"{pearson}, Spearman {match.spearman:.2f} (p {match.spearman_p:.4f})".replace("-", "−")


def judge(scores: dict[str, Evaluation], heads: dict[str, Agreement]) -> tuple[Verdict, str]:
    """Return the verdict on the three parts of the claim, by rules set before any training, and a note on each."""
    bits = {name: evaluation.bits_per_unit for name, evaluation in scores.items()}
    gain = bits["frequencies"] - bits["exact"]
    best = min(MIXERS, key=bits.__getitem__) == "ReLU features"
    beyond = bits["frequencies in the sequence itself"] - bits["exact"]
    gap = abs(bits["softmax features"] - bits["exact"])
    equal = gain > 0 and gap < EQUAL * gain
    alike = all(heads[name].spearman_p < 0.05 for name in MIXERS if name != "exact")
    parts = (
        f"ReLU features are {'' if best else 'not '}the best of the three.",
        f"Softmax features differ from exact attention by {gap:.4f} bits, "
        + (
            f"{gap / gain:.0%} of the {gain:.4f} bits that exact attention gains over frequencies "
            f"({'less' if equal else 'not less'} than the {EQUAL:.0%} that would count as equal)."
            if gain > 0
            else "and exact attention gains nothing over frequencies."
        ),
        f"The similarity from both Performers' attention agrees with BLOSUM62 beyond chance: "
        f"{'yes' if alike else 'no'} (Spearman, by heads, p < 0.05).",
        f"Exact attention is {beyond:+.4f} bits better than counting the residues of the sequence itself".replace(
            "-", "−"
        )
        + (", so these models learn little beyond its composition." if beyond < LITTLE else "."),
        "All three continue from the best model with exact attention, so features must make up for their approximation "
        "in a tenth of its training; the paper trains each model from nothing. "
        "With one seed per model, differences apply to these trainings only. The counts of the sequence itself "
        "and the similarity of embeddings were added after the first result and do not affect the verdict.",
    )
    met = (best, equal, alike)
    return graded(all(met), any(met)), " ".join(parts)


def _picture(by_heads: dict[str, Array], heads: dict[str, Agreement], blosum: Array) -> Picture:
    """Draw the similarity of amino acids in BLOSUM62 and in the attention of each model as heat maps."""
    order = [AMINO_ACIDS.index(letter) for letter in ORDER]
    panels = [Panel("BLOSUM62", _shown(blosum, order))]
    for name, similarity in by_heads.items():
        title = f"{name}, Spearman {heads[name].spearman:.2f}".replace("-", "−")
        panels.append(Panel(title, _shown(similarity, order)))
    marked = [(ORDER.index(pair[0]), ORDER.index(pair[1])) for pair in PAIRS]
    return picture_of(
        matrix_figure,
        "performer-protein",
        panels,
        labels=ORDER,
        marked=marked,
        below="darker: more similar, by the range of each panel; framed: (D, E) and (F, Y)",
        alt="Similarity of amino acids in BLOSUM62 and in the attention of three models; (D, E) and (F, Y) framed.",
    )


def _shown(matrix: Array, order: list[int]) -> list[list[float]]:
    """Return a matrix in another order of amino acids, with its diagonal set to NaN."""
    values = matrix[order][:, order].copy()
    np.fill_diagonal(values, math.nan)
    return cast("list[list[float]]", values.tolist())


PERFORMER_PROTEIN = Claim(
    name="performer-protein",
    system="Performer",
    source="Choromanski et al. 2021, section 4.4 and appendix C",
    text="In masked language modeling of proteins, ReLU features are best, softmax features equal exact attention, and "
    "attention finds similar amino acids, (D, E) and (F, Y) first.",
    parallel=measure,
    minutes={"tiny": 0.1, "small": 5, "full": 165},
    plans=PLANS,
)
