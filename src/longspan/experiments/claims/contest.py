"""Language models that differ only in their mechanism, at equal parameters and equal tokens.

Claims about one mechanism share this comparison and its rules.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from longspan.experiments.claims.base import Figure, Say, Verdict, graded, signed
from longspan.experiments.claims.runs import evenly, measure_once, read_recipe, train_or_resume, trained_seconds
from longspan.files import read_json
from longspan.tasks.base import Documents, heads
from longspan.train import Interval, evaluate_text, load_run, read_log
from longspan.train.evaluate import Evaluation

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


def recipe_of(name: str) -> dict[str, Any]:
    """Return the recipe `lm/NAME.toml` of a mechanism."""
    return read_recipe(f"lm/{name}")


def evaluate_held_out(
    folder: Path, file: str, choose: Callable[[Documents], Documents], *, alone: bool = True
) -> dict[str, Any]:
    """Return nats of each held-out document that `choose` selects, from the file of an earlier call if there is one.

    A model that carried states in training is evaluated with them, and with `alone` also without.
    """

    def evaluate() -> dict[str, Any]:
        """Evaluate the model of the run, with carried states and without where both apply."""
        model, task = load_run(folder)
        documents = choose(task.documents("validation"))
        train = read_json(folder / "recipe.json")["train"]
        segment, carried = train["segment_length"], train["carry"]
        reset = model.traits.segment or segment
        evaluations: dict[str, Any] = {}
        streams = model.traits.streams and carried
        for memory in ((True, False) if alone else (True,)) if streams else (False,):
            # without memory: pieces as long as in training if it carried no states, else segments of the mechanism
            piece = reset if carried else segment
            value = evaluate_text(model, documents, chunk=segment, memory=memory, segment_length=piece)
            evaluations["memory" if memory else "alone"] = value.record()
        return {**evaluations, "names": list(documents.names), "parameters": model.num_parameters()}

    return measure_once(folder / f"{file}.json", evaluate)


def as_trained(record: Mapping[str, Any]) -> Evaluation:
    """Return the evaluation of a run as it was trained: with carried states or without."""
    return evaluation(record, "memory" if "memory" in record else "alone")


def evaluation(record: Mapping[str, Any], key: str) -> Evaluation:
    """Return one of a run's evaluations; `key` is `memory` (carried states) or `alone` (without)."""
    return Evaluation.of(record[key], record["names"])


def sum_seeds(parts: list[Evaluation]) -> Evaluation:
    """Join the evaluations of several seeds by summing the nats of each document."""
    return functools.reduce(Evaluation.plus, parts)


def bits_of(records: Sequence[Mapping[str, Any]]) -> float:
    """Return the held-out bits per byte of a model over all seeds."""
    return float(sum_seeds([as_trained(record) for record in records]).bits_per_unit)


def difference(ours: list[dict[str, Any]], dense: list[dict[str, Any]]) -> Interval:
    """Return bits per byte of `ours` minus `dense` over the seeds of both, with an interval over documents."""
    seeds = min(len(ours), len(dense))
    left, right = (sum_seeds([as_trained(record) for record in part[:seeds]]) for part in (ours, dense))
    return left.minus(right)


def curve(run: Path) -> dict[str, list[float]]:
    """Return the training loss in bits per byte (`training`) by bytes read (`read`), from the log of a run."""
    lines = {line["tokens"]: line["bits_per_byte"] for line in read_log(run / "log.jsonl") if "bits_per_byte" in line}
    return {"read": list(lines), "training": list(lines.values())}


def lead(ours: list[dict[str, Any]], alone: list[dict[str, Any]], width: int = 10) -> tuple[list[float], list[float]]:
    """Return the training loss with memory minus that without, on the same bytes.

    Returns bytes read, and differences averaged over seeds and over `width` lines of the log.
    """
    pairs = [
        np.subtract(with_memory["training"], without["training"])
        for with_memory, without in zip(ours, alone, strict=True)
        if with_memory["read"] == without["read"]
    ]
    width = max(min(width, len(pairs[0])), 1)
    smooth = np.convolve(np.mean(pairs, 0), np.full(width, 1 / width), "valid")
    return list(map(float, ours[0]["read"][width - 1 :])), list(map(float, smooth))


def recipe_with(mixer: Mapping[str, Any], name: str = "full") -> dict[str, Any]:
    """Return the recipe `lm/NAME.toml` with another mixer."""
    recipe = recipe_of(name)
    recipe["model"]["mixers"] = [dict(mixer)]
    return recipe


def run_folder(folder: Path, name: str, seed: int) -> Path:
    """Return the folder of the run of a model and a seed."""
    return folder / name.replace(",", "").replace(" ", "-") / f"seed-{seed}"


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
