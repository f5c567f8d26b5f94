"""Trains the runs of a comparison: the same text, start and bytes per step for all, equal time or equal steps.

OUT/plan.json             measured seconds and memory of a step, and the steps of every model
OUT/runs/NAME-SEED/       the runs, as `longspan train` writes them
OUT/measured/NAME-SEED.json

Every run resumes from its last checkpoint, and nothing is trained or measured twice. Equal time becomes a number of
steps before training begins, so an interrupted comparison ends with the same numbers as an uninterrupted one.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from longspan import tasks
from longspan.comparison.answers import task_length
from longspan.comparison.measure import text_stamps
from longspan.comparison.reading import Reading, measure, with_speed
from longspan.comparison.results import CONSTANT, EQUAL, bits_per_byte
from longspan.config import from_dict, override, read_toml
from longspan.errors import ConfigError, LongspanError
from longspan.files import data_digest, read_object, write_json
from longspan.models import build_model
from longspan.train import TrainConfig, find_recipe, read_log, run
from longspan.train.run_summary import read_summaries
from longspan.train.starts import SHIPPED, architecture, is_ready, of_size, start_folder, start_model
from longspan.train.training_memory import step_cost, weight_bytes
from longspan.train.workers import ONE_WORKER, Done, Workers, run_jobs

Say = Callable[[str], None]
Curve = list[tuple[int, float]]
"""(step, held-out bits per byte)"""
EVALUATIONS = 8
"""held-out evaluations of a run; half of them come before runs are stopped early"""
EARLY_TOKENS = 32_768
"""held-out tokens of an evaluation during training: seconds, of runs of minutes"""
TIMED_STEPS = 8
TASK_SIZES = {"dim": 64, "num_layers": 2, "num_heads": 2, "ffn_dim": 128}
"""sizes of models of a task: answers are learned late, so many steps are worth more than width"""
OPTIMISM = 2
"""the held-out loss of the second half of a run is expected to fall by at most so many times what it fell in the second
quarter; every halving of the remaining error takes longer than the one before, so 1 is usual"""
RELATIVE, RELATIVE_OF = "relative", "code"
"""start of models with relative positions, and that with rotary positions which it continues"""


@dataclass(frozen=True, kw_only=True)
class Training:
    """How the runs of a comparison are trained."""

    models: tuple[str, ...]
    """names of recipes `lm/NAME`"""
    task: Mapping[str, Any]
    """`[task]` of all runs: a text read as bytes, or a task whose answers are scored (`comparison.answers`)"""
    init: str = ""
    """start of all runs (`train.init`); empty: random weights of the recipes' sizes"""
    seconds: float | None = None
    """training time of a run, which becomes steps by what steps take here; None: `steps`"""
    is_share: bool = False
    """whether the time is a share of a total, so that a folder keeps the time with which it began"""
    steps: int = 600
    """optimizer steps of every run if no time is given"""
    seeds: int = 1
    """runs per model"""
    length: int = 4096
    """tokens per step (bytes, of a text): one piece for models without a carried state, else `lanes` rows; of a task as
    many samples as fit, at least one"""
    lanes: int = 8
    """documents that a model with a carried state reads side by side"""
    stop_hopeless: bool = True
    """whether models are stopped at half of their steps if they cannot become the best any more; see `hopeless`"""
    changes: tuple[str, ...] = ()
    """overrides of every recipe, such as "train.lr=1e-3" """

    def __post_init__(self) -> None:
        if self.length % self.lanes:
            raise ConfigError(f"lanes = {self.lanes}: must divide the {self.length:,} bytes of a step")

    def recipe(self, name: str, seed: int, steps: int) -> dict[str, Any]:
        """Return the recipe of a run.

        Args:
            name: of the model.
            seed: of the run.
            steps: of the run, at least `EVALUATIONS`.

        Raises:
            LongspanError: there is no such recipe, or an override does not fit it.
        """
        recipe = read_toml(find_recipe(f"lm/{name}.toml"))
        made_of = architecture(recipe["model"])
        init = self.init
        if init in SHIPPED and made_of.get("positions") == "none":
            if init != RELATIVE_OF:
                raise ConfigError(
                    f"has relative positions, for which there is a start of {RELATIVE_OF} only; compare it with "
                    f"--init {RELATIVE_OF} or --init none"
                )
            init = RELATIVE
        # the sizes of `relative` are those of the start that it continues, and it may not be trained yet
        sizes = start_model(self.init) if self.init else recipe["model"] | ({} if self.is_text else TASK_SIZES)
        part = max(steps // EVALUATIONS, 1)
        table: dict[str, Any] = {
            "model": of_size(sizes, made_of),
            "task": dict(self.task),
            "train": {
                "init": init,
                "seed": seed,
                "steps": steps,
                # where the time of a step was measured too low
                **({"minutes": 2 * self.seconds / 60} if self.seconds is not None else {}),
                "lr": 3e-4 if init else recipe["train"].get("lr", 1e-3),
                "warmup": min(50, part),
                "constant": CONSTANT,
                "min_lr_ratio": 0.0,
                **self._rows(carries=recipe["train"].get("carry", True)),
                "eval_every": part,
                "eval_tokens": EARLY_TOKENS,
                "final_eval_tokens": EARLY_TOKENS,
                "checkpoint_every": part,
                "keep": 1,
                "threads": 1,
            },
        }
        for change in self.changes:
            table = override(table, change)
        if not self.is_text:
            table = _with_whole_samples(table, self.length)
        return table

    @property
    def is_text(self) -> bool:
        """Whether the runs read a text; else they answer the samples of a task."""
        return bool(self.task.get("name", "text") == "text")

    def _rows(self, *, carries: bool) -> dict[str, Any]:
        """Return the fields of `[train]` that say how many tokens a step reads, and how.

        Args:
            carries: whether the model is trained with a carried state.
        """
        if not carries or not self.is_text:
            return {"sampling": "pieces", "lanes": 1, "segment_length": self.length}
        return {"sampling": "lanes", "lanes": self.lanes, "segment_length": self.length // self.lanes}

    def key(self) -> str:
        """Return a digest of what the runs depend on, besides the models, their number and their time."""
        free = dict.fromkeys(("models", "seeds", "seconds", "is_share", "stop_hopeless"))
        text = text_stamps(self.task["source"], self.task.get("pattern")) if self.is_text else None
        return data_digest([{**asdict(self), **free}, text])


def _with_whole_samples(recipe: dict[str, Any], tokens: int) -> dict[str, Any]:
    """Let every row read a whole sample of the task, so that gradients reach from an answer to all that it needs.

    Args:
        recipe: of a task, with all overrides.
        tokens: of a step, about.
    """
    length = task_length(recipe["task"])
    rows = {"segment_length": length, "lanes": max(tokens // length, 1)}
    model = recipe["model"]
    if memory := model.get("memory"):
        segments = -(-length // memory["segment_length"])
        model = {**model, "memory": {**memory, "bptt_segments": segments}}
    return {**recipe, "model": model, "train": {**recipe["train"], **rows}}


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run of a comparison, or a part of it."""

    name: str
    """of the model"""
    seed: int
    recipe: Mapping[str, Any]
    out: Path
    """folder of the comparison"""
    reading: Reading
    """the text that is read, or the samples that are answered, after training"""
    until: int | None = None
    """step at which to stop; None: train to the end, and measure"""

    @property
    def label(self) -> str:
        """Name of the run."""
        return f"{self.name}-{self.seed}"

    @property
    def folder(self) -> Path:
        """The folder of the run."""
        return self.out / "runs" / self.label

    @property
    def file(self) -> Path:
        """The file of its measurements."""
        return self.out / "measured" / f"{self.label}.json"

    @property
    def is_trained(self) -> bool:
        """Whether the training of the run has ended."""
        return (self.folder / "model").is_dir()

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        return int(self.recipe["train"]["steps"])


@dataclass(frozen=True)
class StepOf:
    """What a training step of a model costs here: seconds, and the largest bytes of tensors with the weights."""

    seconds: float
    peak: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What will be trained: the runs in their order, and what their steps cost."""

    training: Training
    """with the time that the folder has"""
    jobs: Sequence[Job]
    costs: Mapping[str, StepOf]
    """by model"""
    failures: Mapping[str, str]
    """models without runs, and why"""

    @property
    def seconds(self) -> float:
        """Seconds of training of all runs together, if none is stopped early."""
        return sum(job.steps * self.costs[job.name].seconds for job in self.jobs)


def make_plan(training: Training, out: Path, reading: Reading, say: Say) -> Plan:
    """Measure a training step of every model, one after another, and return the plan.

    What `OUT/plan.json` has is not measured again.

    Raises:
        ConfigError: the folder has a comparison with another text, time or other settings.
    """
    file, key = out / "plan.json", training.key()
    saved: dict[str, Any] = read_object(file) if file.is_file() else {"key": key, "costs": {}}
    if saved.get("key") != key:
        raise ConfigError(f"{out}: has a comparison with another text or other options; give another folder with -o")
    seconds = saved.get("seconds", training.seconds)
    if seconds != training.seconds and not training.is_share:
        raise ConfigError(f"{out}: has a comparison with another --budget; give that, or another folder with -o")
    training = replace(training, seconds=seconds)
    costs = {name: StepOf(**cost) for name, cost in saved["costs"].items()}
    failures: dict[str, str] = {}
    missing = [name for name in training.models if name not in costs]
    if missing:
        say(f"measuring training steps of {', '.join(missing)}")

    def keep(measured: tuple[Training, str], done: Done) -> None:
        """Save the cost of a step, or the reason why there is none."""
        if done.failure:
            failures[measured[1]] = done.failure
            return
        costs[measured[1]] = done.value
        plain = {name: asdict(cost) for name, cost in costs.items()}
        write_json(file, {"key": key, "seconds": seconds, "costs": plain})

    run_jobs(_measured_step, [(training, name) for name in missing], ONE_WORKER, keep)
    jobs = []
    # all models with the first seed, then all with the second: what is not begun in time are seeds
    for seed in range(training.seeds):
        for name in training.models:
            if name in failures:
                continue
            recipe = training.recipe(name, seed, steps_of(training, costs[name]))
            jobs.append(Job(name=name, seed=seed, recipe=recipe, out=out, reading=reading))
    return Plan(training=training, jobs=jobs, costs=costs, failures=failures)


def steps_of(training: Training, cost: StepOf) -> int:
    """Return the steps of a run: as many as fit the time, a multiple of `EVALUATIONS`, at least that."""
    steps = training.steps if training.seconds is None else math.floor(training.seconds / cost.seconds)
    return max(steps // EVALUATIONS, 1) * EVALUATIONS


def _measured_step(job: tuple[Training, str]) -> StepOf:
    """Measure a training step of a model."""
    training, name = job
    recipe = training.recipe(name, 0, EVALUATIONS)
    # a text is read as bytes
    vocabulary = 256 if training.is_text else tasks.build(recipe["task"]).vocab_size
    model = build_model({**recipe["model"], "vocab_size": vocabulary})
    config: TrainConfig = replace(from_dict(TrainConfig, recipe["train"], "train"), init="")
    cost = step_cost(model, config, timed=TIMED_STEPS)
    return StepOf(seconds=cost.fastest, peak=cost.peak + weight_bytes(model))


def train_all(plan: Plan, workers: Workers, say: Say) -> tuple[dict[str, list[Any]], dict[str, str]]:
    """Train all runs and measure those that were not stopped; a second call resumes.

    Returns:
        Records of `measure_run` by model, one per seed, and the reasons of runs without one by run.
    """
    failures = dict(plan.failures)
    left = list(plan.jobs)
    if any(job.recipe["train"]["init"] == RELATIVE for job in left) and not is_ready(RELATIVE):
        say(f"training the start {RELATIVE} first, which takes about 20 minutes once")
        # otherwise all workers but one would wait for it
        start_folder(RELATIVE)
    # what a task needs is often learned suddenly, so half of a curve says little about the other half
    if plan.training.is_text and plan.training.stop_hopeless and len(plan.training.models) > 1:
        left = _first_halves(left, failures, workers, say)
    records: dict[str, list[Any]] = {}

    def report(job: Job, done: Done) -> None:
        """Say what became of a run."""
        if done.failure:
            failures[job.label] = done.failure
            say(f"{job.label}: {done.failure}")
            return
        what = f"{bits_per_byte(done.value):.4f} bits per {'byte' if plan.training.is_text else 'answer token'}"
        say(f"{job.label}: {what} after {job.steps:,} steps")

    ended = run_jobs(_trained_and_measured, left, workers, report)
    if any(not done.failure for done in ended):
        say("measuring how fast the models read, one after another")
    for job, done in zip(left, ended, strict=True):
        if not done.failure:
            records.setdefault(job.name, []).append(with_speed(done.value, job.reading, job.file))
    return records, failures


def _first_halves(jobs: Sequence[Job], failures: dict[str, str], workers: Workers, say: Say) -> list[Job]:
    """Train the first half of all runs; return those that go on, and add a reason for all others to `failures`."""
    halves = [replace(job, until=job.steps // 2) for job in jobs]

    def report(job: Job, done: Done) -> None:
        """Say how far a run is."""
        if done.failure:
            failures[job.label] = done.failure
            say(f"{job.label}: {done.failure}")
        elif not job.is_trained:
            say(f"{job.label}: {done.value[-1][1]:.3f} bits per byte at half of its steps")

    ended = run_jobs(_half_curve, halves, workers, report)
    curves: dict[str, list[Curve]] = {}
    for job, done in zip(halves, ended, strict=True):
        # the clock may have ended a run before
        if not done.failure and done.value[-1][0] == job.until:
            curves.setdefault(job.name, []).append(done.value)
    trained = {job.name for job in jobs if job.is_trained}
    for name, why in hopeless(curves).items():
        if name not in trained:
            failures |= {job.label: why for job in jobs if job.name == name}
            say(f"{name}: {why}")
    return [job for job in jobs if job.label not in failures]


def hopeless(curves: Mapping[str, Sequence[Curve]]) -> dict[str, str]:
    """Return the models that are stopped at half of their steps, with the reason.

    The loss of a model, the mean over its seeds, is extrapolated from what it fell in the second quarter of its steps:
    in the second half it falls by at most `OPTIMISM` times that. Where even this stays more than `EQUAL` above the loss
    that the best model has already, it is stopped.

    Args:
        curves: by model, the curve of every seed up to half of its steps.
    """
    quarters = {name: _mean_at(seeds, 0.5) for name, seeds in curves.items()}
    now = {name: _mean_at(seeds, 1.0) for name, seeds in curves.items()}
    now = {name: bits for name, bits in now.items() if math.isfinite(bits)}
    if not now:
        return {}
    leader = min(now, key=lambda name: now[name])
    best = now[leader]
    reasons = {}
    for name in curves:
        bits = now.get(name, math.inf)
        lowest = bits - OPTIMISM * max(quarters[name] - bits, 0.0) if name in now else bits
        if lowest > best + EQUAL:
            reasons[name] = (
                f"stopped at half of its steps with {bits:.3f} bits per byte, estimated {lowest:.3f} or more at the "
                f"end; {leader} had {best:.3f} at that time, on the text of the evaluations during training"
            )
    return reasons


def _mean_at(curves: Sequence[Curve], share: float) -> float:
    """Return the mean over curves of the loss at a share of their steps, by the nearest measurement."""
    values = [min(curve, key=lambda point: abs(point[0] - share * curve[-1][0]))[1] for curve in curves]
    return sum(values) / len(values)


def train_or_resume(
    recipe: Mapping[str, Any], folder: Path, *, progress: str = "none", until: int | None = None
) -> None:
    """Run a recipe in a folder, from its last checkpoint if there is one; a finished run is left as it is.

    Args:
        recipe, folder, progress, until: as in `longspan.train.run`.

    Raises:
        KeyboardInterrupt: the run was interrupted.
    """
    summary = read_summaries(folder)
    if summary and summary[0].state == "finished":
        return
    resume = any((folder / "checkpoints").glob("step-*"))
    result = run(recipe, folder, resume=resume, progress=progress, until=until)
    evaluated = any("validation" in line and line["step"] == until for line in read_log(folder / "log.jsonl"))
    if result.interrupted and not evaluated:
        raise KeyboardInterrupt


def _half_curve(job: Job) -> Curve:
    """Train a run up to a step, and return its curve up to there."""
    assert job.until is not None, "the first half ends at a step"
    curve = _curve(job)
    if not job.is_trained and (not curve or curve[-1][0] < job.until):
        train_or_resume(job.recipe, job.folder, until=job.until)
        curve = _curve(job)
    if not curve:
        raise LongspanError(f"{job.folder}: its log has no held-out evaluation; remove the folder to train it again")
    return curve


def _curve(job: Job) -> Curve:
    """Return (step, held-out bits per byte) of the log of a run up to the step at which the job stops."""
    last = job.steps if job.until is None else job.until
    return [
        (line["step"], line["validation"]["bits_per_byte"])
        for line in read_log(job.folder / "log.jsonl")
        if "validation" in line and line["step"] <= last
    ]


def _trained_and_measured(job: Job) -> dict[str, Any]:
    """Train a run to its end and measure it; a measured run is read from its file."""
    train_or_resume(job.recipe, job.folder)
    return measure(job.folder, job.reading, job.file)
