"""Language models that differ only in their mechanism, at equal parameters and equal tokens.

Claims about one mechanism share this comparison and its rules.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from longspan.experiments.claims.base import Figure, Say, Verdict, graded, signed
from longspan.experiments.claims.language_modelling import as_trained, bits_of, difference, evaluate_held_out, recipe_of
from longspan.experiments.claims.runs import train_or_resume, trained_seconds
from longspan.tasks.base import Documents, heads
from longspan.train import Interval

EQUAL = 0.02
"""bits per byte: a model matches another if the upper end of the interval of their difference is at most this. Models
that the papers call equal differ by 0.01 to 0.02 in their own tables."""
LEAD = 0.1
"""bits per byte: a larger lead over a model that sees at least as much shows that it has hardly started to learn. Then
a claim holds at most in part. This rule was added after the first results; it can only weaken a verdict."""
INTERVALS = "95 % intervals by bootstrap over documents, losses summed over seeds"

ModelRecords = dict[str, list[dict[str, Any]]]
"""Records of each model, one per seed: its evaluation, `parameters`, `seconds` of training."""


@dataclass(frozen=True, kw_only=True)
class Contest:
    """Sizes of a comparison: training seeds, held-out text, and the fields of `[train]` that all models share."""

    seeds: int
    head: int
    """bytes of each held-out document"""
    documents: int = 0
    """number of held-out documents, evenly spaced; 0: all"""
    train: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A comparison of two models, and names of extra models, which are trained with one seed."""

    contest: Contest
    extra_models: tuple[str, ...] = ()


def recipe_with(mixer: Mapping[str, Any], name: str = "full") -> dict[str, Any]:
    """Return the recipe `lm/NAME.toml` with another mixer."""
    recipe = recipe_of(name)
    recipe["model"]["mixers"] = [dict(mixer)]
    return recipe


def run_folder(folder: Path, name: str, seed: int) -> Path:
    """Return the folder of the run of a model and a seed."""
    return folder / name.replace(",", "").replace(" ", "-") / f"seed-{seed}"


def evenly(documents: Documents, count: int) -> Documents:
    """Return `count` evenly spaced documents; all of them if `count` is 0 or larger than their number."""
    if not count or count >= len(documents):
        return documents
    chosen = [index * len(documents) // count for index in range(count)]
    return Documents(
        [documents[index] for index in chosen],
        [documents.names[index] for index in chosen],
        f"{documents.fingerprint}:{count}",
    )


def contest(folder: Path, recipes: Mapping[str, Mapping[str, Any]], plan: Contest, say: Say) -> ModelRecords:
    """Train and evaluate every model with every seed; a second call resumes from the folder."""
    models: ModelRecords = {name: [] for name in recipes}
    for seed in range(plan.seeds):
        for name, recipe in recipes.items():
            run = run_folder(folder, name, seed)
            # the loss that counts is measured afterwards
            settings = {"seed": seed, "threads": 1, "eval_every": 0, "final_eval_tokens": 1000, "checkpoint_every": 100}
            train_or_resume({**recipe, "train": {**recipe["train"], **settings, **plan.train}}, run)
            record = evaluate_held_out(
                run,
                f"evenly-{plan.documents}x{plan.head}",
                lambda documents: heads(evenly(documents, plan.documents), plan.head),
                alone=False,
            )
            models[name].append({**record, "seconds": trained_seconds([run])})
            bits, seconds = as_trained(record).bits_per_unit, models[name][-1]["seconds"]
            say(f"{name}, seed {seed}: {bits:.3f} bits per byte after {seconds:.0f} s")
    return models


def by_layer(looks: Sequence[Mapping[str, Any]], key: str) -> list[list[float]]:
    """Return the values of `key` by layer, with the heads of all seeds in one list."""
    return [[value for look in looks for value in look[key][index]] for index in range(len(looks[0][key]))]


def numbers(values: Sequence[float], digits: int = 0) -> str:
    """Format values with a number of decimal digits, separated by commas."""
    return ", ".join(f"{value:.{digits}f}" for value in values)


def differences(models: ModelRecords, base: str) -> dict[str, Interval]:
    """Return bits per byte of every other model minus those of `base`, with intervals."""
    return {name: difference(records, models[base]) for name, records in models.items() if name != base}


def bit_figures(models: ModelRecords, base: str, paper: Mapping[str, str], what: str = "bits per byte") -> list[Figure]:
    """Return one row per model for the results table: its bits per byte, and the difference to `base`."""
    gap = differences(models, base)
    figures = []
    for name, records in models.items():
        seed_bits = [as_trained(record).bits_per_unit for record in records]
        ours = f"{bits_of(records):.4f}"
        if len(seed_bits) > 1:
            ours += f" (seeds {', '.join(f'{value:.4f}' for value in seed_bits)})"
        if name in gap:
            ours += f"; {signed(gap[name])} relative to {base}"
        figures.append(
            Figure(f"{what}, {name}", paper.get(name, ""), f"{ours}; {records[0]['parameters']:,} parameters")
        )
    return figures


def as_good(lead: Interval) -> str:
    """Say whether a model matches another: "yes", "no", or undecided if `EQUAL` lies within the interval."""
    return "yes" if lead.high <= EQUAL else "no" if lead.low > EQUAL else "undecided, the interval is too wide"


def verdict_of(met: Sequence[bool], leads: Sequence[Interval]) -> Verdict:
    """Return the verdict: all parts are met, some, or none; at most in part if a lead is too large to be credible."""
    return graded(all(met) and not any(map(doubtful, leads)), any(met))


def doubtful(lead: Interval) -> bool:
    """Return whether a lead is larger than differences between fully trained models, so that it proves little."""
    return lead.high < -LEAD


def caution(lead: Interval, what: str) -> str:
    """Return a sentence for the note if a model is far better than `what`, which sees more; else an empty text."""
    if not doubtful(lead):
        return ""
    return (
        f" A lead of more than {LEAD} shows that {what} has not yet learned in this short training which keys matter, "
        "while near ones are a good guess; it says nothing about fully trained models such as the paper's. So the "
        "claim holds at most in part (a rule added after the first results)."
    )


def seeds_note(models: ModelRecords) -> str:
    """Return a sentence for the note about differences between seeds of one model."""
    bits_by_model = [[as_trained(record).bits_per_unit for record in records] for records in models.values()]
    if len(bits_by_model[0]) == 1:
        return " With one seed per model, differences apply to these trainings only."
    widest = max(max(values) - min(values) for values in bits_by_model)
    return f" Seeds of one model differ by up to {widest:.3f} bits, which the intervals do not cover."


def seconds_of(models: ModelRecords) -> float:
    """Return the seconds of training of all models and seeds."""
    return float(sum(record["seconds"] for records in models.values() for record in records))
