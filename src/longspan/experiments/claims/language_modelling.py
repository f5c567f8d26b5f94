"""`language-modelling`: every mechanism on the same bytes, at equal parameters, equal tokens and equal time."""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from longspan import mixers
from longspan.errors import ConfigError
from longspan.experiments.claims.base import Claim, Figure, Outcome, Say, graded, signed
from longspan.experiments.claims.runs import measure_once, read_recipe, train_or_resume, trained_seconds
from longspan.experiments.figures import picture_of
from longspan.files import read_json
from longspan.report import Picture
from longspan.report.figures import Mark, Series, line_figure
from longspan.tasks.base import Documents, heads
from longspan.train import Interval, evaluate_text, load_run, read_log, recipe_names
from longspan.train.evaluate import Evaluation

DENSE = "full"
RECIPES = [name.removeprefix("lm/") for name in recipe_names() if name.startswith("lm/")]
NAMES = tuple(dict.fromkeys(name for name in (*mixers.names(), *RECIPES) if name in RECIPES))
"""All of recipes/lm/NAME.toml: mechanisms in the order of the registry, then other models."""
WITHOUT = {"transformer_xl": "segments_relative", "compressive": "segments_relative", "infini": "segments"}
"""Models that must beat the same model without memory, and that model: it has the same parameters and reads the same
bytes in the same order, every segment alone."""
LIMIT = 4.0
"""times the minutes of dense attention after which a run at equal tokens is stopped and reported as such"""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Sizes: mechanisms, training seeds, minutes of dense attention, bytes of each held-out document, settings."""

    names: tuple[str, ...]
    seeds: int
    minutes: float
    head: int
    settings: tuple[str, ...] = ("equal tokens", "equal time")
    documents: int = 0
    """number of held-out documents; 0: all"""
    train: Mapping[str, Any] = field(default_factory=dict)
    """fields of `[train]` to set; `steps` makes runs independent of the clock"""
    longer: int = 0
    """steps of a longer contest of the models in `WITHOUT`; 0: none"""
    longer_seeds: int = 1


PLANS: dict[str, Plan] = {
    "small": Plan(names=(DENSE, "transformer_xl", "segments_relative"), seeds=1, minutes=0.5, head=2048, documents=8),
    "full": Plan(names=NAMES, seeds=3, minutes=1.0, head=8192, longer=800),
}


def recipe_of(name: str) -> dict[str, Any]:
    """Return the recipe `lm/NAME.toml` of a mechanism."""
    return read_recipe(f"lm/{name}")


def _train(folder: Path, name: str, seed: int, limits: Mapping[str, Any], plan: Plan) -> None:
    """Train a mechanism's recipe in a folder, or resume it.

    Args:
        folder: of the run.
        name: of the recipe, `lm/NAME.toml`.
        seed: of the training.
        limits: fields of `[train]` that end the run, `steps` or `minutes`.
        plan: sizes.
    """
    recipe = recipe_of(name)
    del recipe["train"]["steps"]
    # the loss that counts is measured afterwards
    recipe["train"] |= {"seed": seed, "final_eval_tokens": 1000, "threads": 1, **limits, **plan.train}
    train_or_resume(recipe, folder)


def steps_and_tokens(folder: Path) -> tuple[int, int]:
    """Return the numbers of optimizer steps and training tokens of a run."""
    lines = read_log(folder / "log.jsonl")
    return int(max(line["step"] for line in lines)), int(max(line.get("tokens", 0) for line in lines))


def measure(folder: Path, plan: Plan) -> dict[str, Any]:
    """Return nats of each held-out document, with and without carried states, from a file if there is one."""
    return evaluate_held_out(
        folder, f"held-out-{plan.documents}x{plan.head}", lambda documents: heads(documents, plan.head, plan.documents)
    )


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


def compare(folder: Path, plan: Plan, say: Say) -> Outcome:
    """Train and evaluate all models; a second call resumes from the folder."""
    if DENSE not in plan.names:
        raise ConfigError(f"language-modelling: {DENSE!r} must be among the mechanisms: it sets the number of tokens")
    by_setting: dict[str, dict[str, list[dict[str, Any]]]] = {setting: {} for setting in plan.settings}
    for seed in range(plan.seeds):
        dense = folder / DENSE / "equal time" / f"seed-{seed}"
        _train(dense, DENSE, seed, {"minutes": plan.minutes}, plan)
        dense_steps, _ = steps_and_tokens(dense)
        per_step = {name: tokens_per_step(name) for name in plan.names}
        steps = {name: max(dense_steps * per_step[DENSE] // per_step[name], 1) for name in plan.names}
        for setting in plan.settings:
            for name in plan.names:
                # dense attention at equal time is also dense attention at equal tokens
                run = dense if name == DENSE else folder / name / setting / f"seed-{seed}"
                limits: dict[str, Any] = {"minutes": plan.minutes}
                if setting == "equal tokens" and name != DENSE:
                    limits = {"steps": steps[name], "minutes": LIMIT * plan.minutes}
                _train(run, name, seed, limits, plan)
                record = _record(run, plan, steps[name] if setting == "equal tokens" else 0)
                by_setting[setting].setdefault(name, []).append(record)
                _report(say, f"{setting}, {name}, seed {seed}", record)
    longer: dict[str, list[dict[str, Any]]] = {}
    for seed in range(plan.longer_seeds if plan.longer else 0):
        for name in dict.fromkeys([*WITHOUT, *WITHOUT.values()]):
            run = folder / name / "longer" / f"seed-{seed}"
            _train(run, name, seed, {"steps": plan.longer, "minutes": None}, plan)
            longer.setdefault(name, []).append(_record(run, plan, plan.longer) | curve(run))
            _report(say, f"longer, {name}, seed {seed}", longer[name][-1])
    return outcome(by_setting, plan, longer)


def _record(run: Path, plan: Plan, target_steps: int) -> dict[str, Any]:
    """Evaluate a run; return its losses, its steps, the steps it should have made, its tokens and its time."""
    steps_done, read = steps_and_tokens(run)
    record = measure(run, plan) | {"steps": steps_done, "wanted": target_steps, "trained_on": read}
    return record | {"seconds": trained_seconds([run])}


def curve(run: Path) -> dict[str, list[float]]:
    """Return the training loss in bits per byte (`training`) by bytes read (`read`), from the log of a run."""
    lines = {line["tokens"]: line["bits_per_byte"] for line in read_log(run / "log.jsonl") if "bits_per_byte" in line}
    return {"read": list(lines), "training": list(lines.values())}


def _report(say: Say, what: str, record: Mapping[str, Any]) -> None:
    """Print the held-out bits per byte of a run."""
    say(f"{what}: {as_trained(record).bits_per_unit:.3f} bits per byte after {record['steps']:,} steps")


def tokens_per_step(name: str) -> int:
    """Return the number of tokens that an optimizer step of a model's recipe reads."""
    table = recipe_of(name)["train"]
    return int(table["lanes"] * table["segment_length"] * table.get("bptt_segments", 1))


def bits_of(records: Sequence[Mapping[str, Any]]) -> float:
    """Return the held-out bits per byte of a model over all seeds."""
    return float(sum_seeds([as_trained(record) for record in records]).bits_per_unit)


def difference(ours: list[dict[str, Any]], dense: list[dict[str, Any]]) -> Interval:
    """Return bits per byte of `ours` minus `dense` over the seeds of both, with an interval over documents."""
    seeds = min(len(ours), len(dense))
    left, right = (sum_seeds([as_trained(record) for record in part[:seeds]]) for part in (ours, dense))
    return left.minus(right)


def memory_gain(records: list[dict[str, Any]]) -> Interval:
    """Return bits per byte with memory minus without, same weights, over all seeds."""
    with_memory, without = (sum_seeds([evaluation(record, key) for record in records]) for key in ("memory", "alone"))
    return with_memory.minus(without)


def own_gains(by_name: Mapping[str, list[dict[str, Any]]]) -> dict[str, Interval]:
    """Return bits per byte of models with memory minus those of the same models trained without it."""
    return {
        name: difference(by_name[name], by_name[alone])
        for name, alone in WITHOUT.items()
        if name in by_name and alone in by_name
    }


def in_order(names: Iterable[str]) -> list[str]:
    """Sort models by the order of the registry: a ranking after a minute of training would mislead."""
    return sorted(names, key=lambda name: (NAMES.index(name) if name in NAMES else len(NAMES), name))


def outcome(
    by_setting: dict[str, dict[str, list[dict[str, Any]]]], plan: Plan, longer: dict[str, list[dict[str, Any]]]
) -> Outcome:
    """Judge the claim: return the verdict, a table of all mechanisms in every setting, and the gains from memory."""
    figures = []
    for setting, by_name in by_setting.items():
        for name in in_order(by_name):
            records = by_name[name]
            seed_bits = [as_trained(record).bits_per_unit for record in records]
            short = [record for record in records if record["steps"] < record["wanted"]]
            figures.append(
                Figure(
                    f"{setting}: {name}",
                    "",
                    f"{bits_of(records):.4f} bits per byte (seeds {min(seed_bits):.3f} to {max(seed_bits):.3f}); "
                    f"{signed(difference(records, by_name[DENSE]))} relative to dense; "
                    f"{np.mean([record['trained_on'] for record in records]):,.0f} bytes read, "
                    f"{records[0]['parameters']:,} parameters" + (", stopped by the clock" if short else ""),
                )
            )
    better = []
    for setting, by_name in {plan.settings[0]: by_setting[plan.settings[0]], "longer": longer}.items():
        for name, value in own_gains(by_name).items():
            better.append(value.high < 0)
            figures += [
                Figure(
                    f"{setting}: {name}, relative to the same model trained without memory",
                    "better",
                    f"{bits_of(by_name[name]):.4f}, {signed(value)} bits per byte",
                ),
                Figure(
                    f"{setting}: {name}, relative to the same weights evaluated without memory",
                    "better",
                    f"{signed(memory_gain(by_name[name]))} bits per byte",
                ),
            ]
    records = [record for by_name in (*by_setting.values(), longer) for group in by_name.values() for record in group]
    more = (
        f"; longer: {plan.longer:,} steps of 2,048 bytes with memory and without, {plan.longer_seeds} seed(s)"
        if longer
        else ""
    )
    return Outcome(
        verdict=graded(bool(better) and all(better), any(better)),
        figures=figures,
        size=f"4 layers of 128, bytes of State of the Union speeches, {plan.seeds} training seed(s), one thread; "
        f"equal time: {plan.minutes:g} minutes per run; equal tokens: as many as dense attention reads in "
        f"that time, runs of more than {LIMIT * plan.minutes:g} minutes stopped{more}; held-out text: the first "
        f"{plan.head:,} bytes of {len(records[0]['names'])} speeches; 95 % intervals by bootstrap over documents",
        note="It holds if models with memory are better than the same models trained without it, with an interval "
        f"below zero, for {', '.join(WITHOUT)}, at equal tokens and after the longer training; in part if this is true "
        "for some of them, or in one of the two settings. A minute is too short: a model of 0.8 million parameters "
        "first learns to attend to the last few bytes, and sooner if it sees fewer keys, so mechanisms that see the "
        "fewest keys lead after a minute. This shows which mechanisms cost nothing at the start of training, not "
        "which is best in the end, so they are listed in the order of `longspan mixers` and not ranked. Models without "
        "carried states read pieces of 2,048 bytes; the others carry their state through a speech.",
        data={**by_setting, "longer": longer},
        pictures=[_picture(by_setting), *([_memory_picture(longer)] if longer else [])],
        seconds=sum(record["seconds"] for record in records),
    )


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


def _memory_picture(longer: dict[str, list[dict[str, Any]]]) -> Picture:
    """Plot the training loss of each model with memory minus that of the same model without, by bytes read."""
    series = []
    for name, alone in WITHOUT.items():
        x, y = lead(longer[name], longer[alone])
        series.append(Series(x=x, y=y, label=name))
    return picture_of(
        line_figure,
        "language-modelling-memory",
        series,
        xlabel="bytes read in training",
        ylabel="bits per byte minus the model without memory",
        marks=[Mark(0.0, horizontal=True)],
        alt="Training loss of models with memory minus that of the same models without it, against bytes read.",
    )


def _picture(by_setting: dict[str, dict[str, list[dict[str, Any]]]]) -> Picture:
    """Plot held-out bits per byte of every mechanism, with the range over seeds, for each setting."""
    first = next(iter(by_setting.values()))
    order = in_order(first)
    series = [
        Series(
            x=list(range(len(order))),
            y=[bits_of(by_name[name]) for name in order],
            low=[min(as_trained(record).bits_per_unit for record in by_name[name]) for name in order],
            high=[max(as_trained(record).bits_per_unit for record in by_name[name]) for name in order],
            label=setting,
            kind="points",
        )
        for setting, by_name in by_setting.items()
    ]
    return picture_of(
        line_figure,
        "language-modelling",
        series,
        xlabel="mechanism",
        ylabel="held-out bits per byte",
        xticks=dict(enumerate(order)),
        alt="Held-out bits per byte of every mechanism, at equal tokens and at equal time.",
    )


LANGUAGE_MODELLING = Claim(
    name="language-modelling",
    system="all",
    source="the papers' tables of language modeling, at a small size",
    text="Models with memory beat the same models without it; local and sparse attention lose little to dense.",
    measure=compare,
    minutes={"small": 4, "full": 160},
    plans=PLANS,
)
