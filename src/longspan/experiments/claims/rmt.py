"""`rmt`: trained on at most five segments, answers after 4,096.

Over 4,096 segments even rare writes of segments without a fact add up. So the full size mines hard negatives in
training (`longspan.train.hard_negatives`), and after training the gates of the memory are calibrated on noise that is
not that of the test (`longspan.train.gate_calibration`).
Every training, calibration and evaluation is saved, so the claim runs in parts: interrupt it and call it again.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from longspan.experiments.claims.base import Claim, Figure, Outcome, Say
from longspan.experiments.claims.runs import measure_once, read_recipe, train_or_resume, trained_seconds
from longspan.files import read_json
from longspan.models import save_model
from longspan.report import Picture
from longspan.report.figures import Mark, interval_series, line_figure, picture_of
from longspan.tasks import MemoryTask
from longspan.tasks.memory import Kind
from longspan.train import Interval, MemoryEvaluation, evaluate_memory, load_run
from longspan.train.gate_calibration import calibrate_gates, upper_bound

BATCH = 32
KINDS: tuple[Kind, ...] = ("memorize", "detect", "reasoning")
MINING = ("train.mine_every=50", "train.mine_segments=2000")
"""assignments of the full size that mine hard negatives; a search reads a million tokens, forward only"""
TINY_RECIPE = (
    *("model.dim=16", "model.num_heads=2", "model.memory.segment_length=96"),
    *("task.segment_length=96", "task.vocab_size=512", "task.noise_documents=2", "train.tokens=800"),
)
"""assignments of the size `tiny`: a narrower model, shorter segments, less text"""
GOAL = {"memorize": 0.95, "detect": 0.95, "reasoning": 0.90}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Sizes, by kind of task where they differ."""

    seeds: int
    """number of trainings of each kind"""
    steps: Mapping[str, int]
    """optimizer steps"""
    evaluations: tuple[tuple[int, int, bool], ...]
    """(segments, samples, only the first seed) of each evaluation"""
    silent: Mapping[str, int]
    """segments without a fact on which gates are calibrated"""
    mining: tuple[str, ...] = ()
    """assignments that mine hard negatives in training"""
    recipe: tuple[str, ...] = ()
    """further assignments of all trainings"""


PLANS: dict[str, Plan] = {
    "tiny": Plan(
        seeds=1,
        steps={"memorize": 3, "detect": 3, "reasoning": 3},
        evaluations=((1, 4, False), (2, 2, True)),
        silent={"memorize": 252, "detect": 252, "reasoning": 252},
        recipe=TINY_RECIPE,
    ),
    "small": Plan(
        seeds=1,
        steps={"memorize": 450, "detect": 450, "reasoning": 1600},
        evaluations=((1, 64, False), (16, 64, False), (64, 32, False), (256, 16, False)),
        silent={"memorize": 5_000, "detect": 20_000, "reasoning": 20_000},
    ),
    "full": Plan(
        seeds=3,
        steps={"memorize": 450, "detect": 450, "reasoning": 1600},
        evaluations=(*((segments, 128, False) for segments in (1, 4, 16, 64, 256)), (1024, 64, True), (4096, 64, True)),
        silent={"memorize": 100_000, "detect": 1_000_000, "reasoning": 100_000},
        mining=MINING,
    ),
}


def train_once(folder: Path, kind: Kind, seed: int, steps: int, *assignments: str) -> None:
    """Train the recipe for a kind of task in a folder, or resume it."""
    name = "rmt-reasoning" if kind == "reasoning" else "rmt"
    settings = (f"task.kind={kind}", f"train.seed={seed}", f"train.steps={steps}")
    train_or_resume(read_recipe(name, *settings, *assignments), folder)


def calibrate_once(folder: Path, seed: int, silent: int) -> dict[str, Any]:
    """Calibrate the gates of the run in a folder, write the run with them to `calibrated`, and return the record."""

    def calibrate() -> dict[str, Any]:
        """Read the noise, or resume reading it."""
        model, task = load_run(folder)
        record = calibrate_gates(
            model, cast(MemoryTask, task), silent=silent, batch=BATCH, seed=seed, cache=folder / f"gates-{silent}"
        )
        for file in ("recipe.json", "tokenizer.json", "digests.json"):
            (folder / "calibrated").mkdir(exist_ok=True)
            shutil.copy(folder / file, folder / "calibrated" / file)
        save_model(model, folder / "calibrated" / "model")
        return asdict(record)

    return measure_once(folder / f"calibration-{silent}.json", calibrate)


def ask_once(folder: Path, kind: Kind, segments: int, count: int, seed: int) -> dict[str, Any]:
    """Return the answers of a run at one length, from the file of an earlier evaluation if there is one."""

    def measure() -> dict[str, Any]:
        """Load the model of the run and return its answers after `segments` segments."""
        model, task = load_run(folder)
        answers = evaluate_memory(
            model, cast(MemoryTask, task), segments=segments, count=count, kinds=(kind,), batch=BATCH, seed=seed
        )
        return answers[kind].record()

    return measure_once(folder / f"answers-{segments}x{count}.json", measure)


def _measure(folder: Path, plan: Plan, say: Say) -> Outcome:
    """Train one model per kind of question and seed, then evaluate each at all lengths of text.

    A second call resumes from the folder: finished trainings and evaluations are not repeated.
    """
    by_kind: dict[str, dict[int, list[dict[str, Any]]]] = {kind: {} for kind in KINDS}
    calibrations: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    # long texts last, so that an interrupted call has all short ones
    for kind in KINDS:
        for seed in range(plan.seeds):
            train_once(folder / f"{kind}-{seed}", kind, seed, plan.steps[kind], *plan.mining, *plan.recipe)
            say(f"{kind}, seed {seed}: trained")
            record = calibrate_once(folder / f"{kind}-{seed}", seed, plan.silent[kind])
            calibrations[kind].append(record)
            say(f"{kind}, seed {seed}: {record['false_writes']} of {record['silent']:,} segments without a fact write")
    for segments, count, first_only in plan.evaluations:
        for kind in KINDS:
            for seed in range(1 if first_only else plan.seeds):
                record = ask_once(folder / f"{kind}-{seed}" / "calibrated", kind, segments, count, seed)
                by_kind[kind].setdefault(segments, []).append(record)
                say(f"{kind}, seed {seed}: {record['k']} of {record['n']} at {segments:,} segments")
    runs = [folder / f"{kind}-{seed}" for kind in KINDS for seed in range(plan.seeds)]
    seconds = trained_seconds(runs)
    model = read_json(runs[0] / "recipe.json")["model"]
    return _outcome(by_kind, calibrations, plan, seconds, _gate_training(runs), model)


def _gate_training(runs: Sequence[Path]) -> str:
    """Describe how gates were trained: `gate_floor` and the search for hard negatives in the recipes of all runs."""
    tables = [read_json(run / "recipe.json")["train"] for run in runs]
    floors = sorted({table.get("gate_floor", 0.0) for table in tables})
    searches = sorted({table.get("mine_every", 0) for table in tables})
    text = f"gate_floor {', '.join(f'{floor:g}' for floor in floors)}"
    return text + (f", mine_every {', '.join(map(str, searches))}" if any(searches) else "")


def seeds_interval(right: Sequence[Sequence[bool]], *, samples: int = 10_000, seed: int = 0) -> Interval:
    """Return the accuracy over several trainings, with a bootstrap over trainings and over samples within each."""
    random = np.random.default_rng(seed)
    shares = [np.asarray(answers, dtype=np.float64) for answers in right]
    value = float(np.mean([share.mean() for share in shares]))
    drawn = np.zeros(samples)
    for index in range(samples):
        chosen = random.integers(len(shares), size=len(shares))
        drawn[index] = np.mean([random.binomial(len(shares[i]), shares[i].mean()) / len(shares[i]) for i in chosen])
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Interval(value, float(low), float(high))


def intervals(records: list[dict[str, Any]]) -> Interval:
    """Return the accuracy with its interval: a bootstrap over trainings and samples, or Wilson's if all are correct."""
    right = [[letter == "1" for letter in record["answers"]] for record in records]
    value = seeds_interval(right)
    if value.low < value.high:
        return value
    answers = MemoryEvaluation("", 1, 1, [answer for part in right for answer in part], [])
    return answers.interval()


def _calibration_figure(kind: str, records: Sequence[Mapping[str, Any]]) -> Figure:
    """Return the row on the gates of one kind of task, over all trainings."""
    false, silent = (sum(record[name] for record in records) for name in ("false_writes", "silent"))
    missed, whole = (sum(record[name] for record in records) for name in ("missed", "whole"))
    before = sum(record["false_writes_before"] for record in records) / sum(
        record["silent_before"] for record in records
    )
    return Figure(
        f"{kind}: share of segments without a fact that write, after calibration",
        "",
        f"{false} of {silent:,}, at most {upper_bound(false, silent):.1e} (95 %; {before:.1e} before); recall "
        f"{1 - missed / max(whole, 1):.4f} of {whole:,} facts",
    )


def _outcome(
    by_kind: dict[str, dict[int, list[dict[str, Any]]]],
    calibrations: Mapping[str, Sequence[Mapping[str, Any]]],
    plan: Plan,
    seconds: float,
    gate_training: str,
    model: Mapping[str, Any],
) -> Outcome:
    """Return the verdict and the numbers next to the paper's, from records by kind of task and segments."""
    figures, reached, length = [], True, model["memory"]["segment_length"]
    for kind, lengths in by_kind.items():
        for segments, records in lengths.items():
            value = intervals(records)
            k, n = sum(record["k"] for record in records), sum(record["n"] for record in records)
            reached = reached and value.value >= GOAL[kind]
            figures.append(
                Figure(
                    f"{kind}, {segments:,} segments ({segments * length:,} tokens)",
                    "near perfect" if kind != "reasoning" else "lower than the other kinds",
                    f"{k} of {n} ({value.value:.3f} [{value.low:.3f}, {value.high:.3f}]), "
                    f"{len(records)} seed{'s' if len(records) > 1 else ''}",
                )
            )
    figures += [_calibration_figure(kind, records) for kind, records in calibrations.items()]
    records = [record for lengths in by_kind.values() for group in lengths.values() for record in group]
    silent, false = sum(record["silent"] for record in records), sum(record["false_writes"] for record in records)
    cut, whole = sum(record["cut_facts"] for record in records), sum(record["k_of_whole_facts"] for record in records)
    total = sum(record["n"] for record in records)
    note = (
        f"{false:,} of {silent:,} segments without a fact wrote to memory. In {cut} of {total:,} samples a segment "
        f"border cuts the fact in two; of the others {whole / max(total - cut, 1):.1%} were answered correctly. In the "
        f"longest texts a noise sentence occurs {max(record['repeats'] for record in records):.1f} times on average."
    )
    return Outcome(
        verdict="holds" if reached else "holds in part",
        figures=figures,
        size=f"encoder of {model['num_layers']} layers of {model['dim']}, {model['memory']['num_memory_tokens']} "
        f"memory tokens, segments of {length}, trained on at most 5 of them for "
        f"{', '.join(f'{steps:,}' for steps in plan.steps.values())} steps ({gate_training}), {plan.seeds} seeds; "
        "intervals 95 %, bootstrap over seeds and samples (Wilson if all are correct)",
        note=note,
        data={
            **{kind: {str(key): value for key, value in lengths.items()} for kind, lengths in by_kind.items()},
            "calibrations": dict(calibrations),
        },
        pictures=[_picture(by_kind, length)],
        seconds=seconds + sum(record["seconds"] for record in records),
    )


def _picture(by_kind: dict[str, dict[int, list[dict[str, Any]]]], length: int) -> Picture:
    """Plot accuracy with its intervals against the number of segments, one line per kind of task."""
    series = [
        interval_series(list(lengths), [intervals(records) for records in lengths.values()], label=kind)
        for kind, lengths in by_kind.items()
    ]
    return picture_of(
        line_figure,
        "rmt",
        series,
        xlabel=f"segments of {length} tokens",
        ylabel="accuracy",
        marks=[Mark(5, "longest in training"), Mark(1 / 6, "chance", horizontal=True)],
        xscale="log2",
        xticks=list(next(iter(by_kind.values()))),
        ylim=(0, 1.16),
        alt="Accuracy on the three memory tasks against the number of segments.",
    )


RMT = Claim(
    name="rmt",
    system="Recurrent Memory Transformer",
    source="Bulatov et al. 2023, section 3 and figures 1 and 4",
    text="Trained on a few segments, the model answers after 4,096 segments, 2,043,904 tokens: memorize, detect and "
    "memorize, and reasoning over two facts.",
    measure=_measure,
    minutes={"tiny": 0.1, "small": 20, "full": 420},
    plans=PLANS,
)
