"""`performer-protein`: ReLU and softmax features against exact attention on proteins, and similarity from attention."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from longspan.experiments.claims.base import Claim, Figure, Outcome, Say, Verdict, graded, signed
from longspan.experiments.claims.runs import measure_once, read_recipe, train_or_resume, trained_seconds
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
from longspan.experiments.figures import matrix_figure, picture_of
from longspan.files import read_json, write_text
from longspan.report import Picture
from longspan.report.figures import Panel
from longspan.tasks import Documents, ProteinTask
from longspan.tasks.base import Array
from longspan.tasks.protein import AMINO_ACIDS, FIRST, ProteinDocument, is_amino_acid
from longspan.tasks.sources import read_source
from longspan.train import Evaluation, evaluate_text, load_run

MIXERS: dict[str, dict[str, Any]] = {
    "exact": {"name": "full"},
    "softmax features": {"name": "performer", "kind": "positive", "num_features": 64, "redraw_every": 100},
    "ReLU features": {"name": "performer", "kind": "relu", "num_features": 64, "redraw_every": 0},
}
PAIRS = ("DE", "FY")
# similar amino acids are neighbors, so that BLOSUM62 has blocks along its diagonal
ORDER = "CSTAGPDEQNHRKMILVWYF"
# two losses count as equal if they differ by less than this share of the gain of exact attention over frequencies
EQUAL = 0.1
# weight of frequencies against a sequence's own residues: they count as this many (100 to 400 score alike)
PRIOR = 200
# bits per residue beyond composition that the note calls little
LITTLE = 0.05


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Sizes: optimizer steps, held-out sequences to score, and sequences whose attention is mapped."""

    steps: int
    scored: int
    mapped: int
    longest: int = 250
    """most residues of a mapped sequence"""
    recipe: tuple[tuple[str, str, Any], ...] = ()
    """fields of the recipe to set: (table, field, value)"""
    sequences: int = 0
    """sequences to read, the first of the file; 0: all"""
    relabelings: int = 10_000
    """of the amino acids, for the p-values"""


PLANS: dict[str, Plan] = {
    "tiny": Plan(
        steps=3,
        scored=6,
        # every pair of amino acids must occur in one of them
        mapped=8,
        recipe=(("train", "lanes", 2), ("train", "segment_length", 64), ("task", "validation_fraction", 0.2)),
        sequences=300,
        relabelings=100,
    ),
    "small": Plan(steps=250, scored=400, mapped=40),
    "full": Plan(steps=2000, scored=2000, mapped=200),
}


def _train(folder: Path, mixer: dict[str, Any], plan: Plan) -> None:
    """Train the recipe `protein` with another mixer in a folder, or resume it."""
    # the losses that count are measured afterwards, so one sequence is enough at the end of training
    recipe = read_recipe("protein", steps=plan.steps, final_eval_tokens=1000)
    recipe["model"]["mixers"] = [mixer]
    for table, name, value in plan.recipe:
        recipe[table][name] = value
    if plan.sequences:
        recipe["task"]["source"] = str(_first_sequences(folder.with_name("sequences.fasta"), plan.sequences))
    train_or_resume(recipe, folder)


def _first_sequences(path: Path, count: int) -> Path:
    """Write the first `count` sequences of the source to a FASTA file, unless an earlier call did; return its path."""
    if not path.is_file():
        sequences = read_source("proteins")[:count]
        write_text(path, "".join(f">{name}\n{bytes(residues).decode()}\n" for name, residues in sequences))
    return path


def _score(folder: Path, model: Any, documents: Documents) -> Evaluation:
    """Evaluate a model on held-out sequences, or read the file of an earlier evaluation."""

    def measure() -> dict[str, Any]:
        """Evaluate the model on the documents and return the record."""
        width = read_json(folder / "recipe.json")["train"]["segment_length"]
        return evaluate_text(model, documents, chunk=width, memory=False, unit="residue").record()

    record = measure_once(folder / f"scored-{len(documents)}.json", measure)
    return Evaluation.of(record, documents.names, "residue")


def _map(folder: Path, model: Any, documents: list[ProteinDocument]) -> Array:
    """Return attention between amino acids summed over sequences, (layers * heads, 20, 20), computed or from a file."""

    def measure() -> dict[str, Any]:
        """Sum the attention between amino acids over all documents."""
        parts = [attention_between(model, torch.from_numpy(document.tokens)) for document in documents]
        return {"between": np.sum(parts, 0).tolist()}

    return np.array(measure_once(folder / f"attention-{len(documents)}.json", measure)["between"])


def by_frequency(documents: Documents, frequencies: Array, prior: float = math.inf) -> Evaluation:
    """Score a predictor that knows only the frequencies of the amino acids.

    With a finite `prior` it also counts the residues of the sequence itself, and the frequencies weigh as `prior`
    residues: the best prediction that ignores order.
    """
    rows = []
    for index in range(len(documents)):
        part = documents[index].cut(0, len(documents[index]))
        residues, shares = part.targets[part.graded] - FIRST, frequencies
        if prior < math.inf:
            seen = part.tokens[is_amino_acid(part.tokens)] - FIRST
            shares = np.bincount(seen, minlength=len(frequencies)) + prior * frequencies
            shares = shares / shares.sum()
        rows.append((-np.log(shares[residues]).sum(), len(residues), (residues == shares.argmax()).sum()))
    nats, tokens, correct = np.array(rows).T
    counts = tokens.astype(np.int64)
    return Evaluation(tuple(documents.names), nats, counts, counts, correct.astype(np.int64), "residue")


def _measure(folder: Path, plan: Plan, say: Say) -> Outcome:
    """Train the three models, score them on held-out sequences and map their attention; a second call resumes."""
    scores: dict[str, Evaluation] = {}
    maps: dict[str, Array] = {}
    words: dict[str, Array] = {}
    folders = {name: folder / name.split()[0].lower() for name in MIXERS}
    for name, mixer in MIXERS.items():
        _train(folders[name], mixer, plan)
        model, task = cast("tuple[Any, ProteinTask]", load_run(folders[name]))
        held_out = task.documents("validation")
        some = Documents(held_out.items[: plan.scored], held_out.names[: plan.scored])
        short = [cast(ProteinDocument, document) for document in held_out.items if len(document) <= plan.longest + 2][
            : plan.mapped
        ]
        if not scores:
            scores["frequencies"] = by_frequency(some, task.frequencies())
            scores["frequencies in the sequence itself"] = by_frequency(some, task.frequencies(), PRIOR)
        scores[name] = _score(folders[name], model, some)
        say(f"{name}: {_score_text(scores[name])}")
        maps[name] = _map(folders[name], model, short)
        words[name] = similarity_of_embeddings(model)
    # all runs have the same task, and so the same sequences
    even = np.sum([even_attention(torch.from_numpy(document.tokens)) for document in short], 0)
    ways = {
        "by heads": {name: similarity_by_heads(between) for name, between in maps.items()},
        "by pairs": {name: similarity_by_pairs(between, even) for name, between in maps.items()},
        "of embeddings": words,
    }
    seconds = trained_seconds(folders.values())
    shape = read_json(folders["exact"] / "recipe.json")
    return _outcome(plan, shape, scores, ways, len(short), seconds)


def _score_text(evaluation: Evaluation) -> str:
    """Return perplexity and accuracy with their intervals as text."""
    bits, share = evaluation.interval(), evaluation.accuracy_interval()
    return (
        f"perplexity {2**bits.value:.2f} [{2**bits.low:.2f}, {2**bits.high:.2f}], "
        f"accuracy {share.value:.2%} [{share.low:.2%}, {share.high:.2%}]"
    )


def _outcome(
    plan: Plan,
    recipe: dict[str, Any],
    scores: dict[str, Evaluation],
    ways: dict[str, dict[str, Array]],
    mapped: int,
    seconds: float,
) -> Outcome:
    """Return the verdict and the numbers next to the paper's.

    Args:
        plan: sizes.
        recipe: of the model with exact attention.
        scores: evaluation of each model and of the predictors by frequency.
        ways: (20, 20) similarities by method ("by heads", "by pairs", "of embeddings") and model.
        mapped: number of sequences whose attention was measured.
        seconds: of training.
    """
    blosum = blosum62()
    agreed = {
        way: {name: agreement(matrix, blosum, samples=plan.relabelings) for name, matrix in matrices.items()}
        for way, matrices in ways.items()
    }
    by_heads, heads = ways["by heads"], agreed["by heads"]
    verdict, note = judge(scores, heads)
    paper = {"softmax features": "about equal to exact attention", "ReLU features": "best"}
    figures = [
        Figure(f"masked residues, {name}", paper.get(name, ""), _score_text(evaluation))
        for name, evaluation in scores.items()
    ]
    for name in MIXERS:
        if name != "exact":
            less = scores[name].minus(scores["exact"])
            figures.append(
                Figure(
                    f"bits per residue, {name} minus exact",
                    "below 0" if name.startswith("ReLU") else "about 0",
                    signed(less),
                )
            )
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
    first, model, train = next(iter(scores.values())), recipe["model"], recipe["train"]
    return Outcome(
        verdict=verdict,
        figures=figures,
        size=f"encoder of {model['num_layers']} layers of {model['dim']}, {model['num_heads']} heads, 64 features, "
        f"{plan.steps:,} steps of {train['lanes']} x {train['segment_length']} residues of UniProt, one seed, same "
        f"batches; {len(first.names):,} held-out sequences of other families, {int(first.tokens.sum()):,} "
        f"masked residues; maps of {mapped} of them; intervals 95 %, bootstrap over sequences; p-values by relabeling "
        "the amino acids",
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
                for way, matrices in ways.items()
            },
        },
        pictures=[_picture(by_heads, heads, blosum)],
        seconds=seconds,
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
    measure=_measure,
    minutes={"tiny": 0.1, "small": 6, "full": 40},
    plans=PLANS,
)
