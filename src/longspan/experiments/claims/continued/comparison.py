"""A comparison as a claim: trains and measures all runs, adds seeds where the verdict needs them, and judges."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from longspan.comparison.results import bits_per_byte
from longspan.config import nearest
from longspan.errors import ConfigError, LongspanError
from longspan.experiments.claims.base import Figure, Outcome, Say, Verdict
from longspan.experiments.claims.continued import report
from longspan.experiments.claims.continued.plan import CEILING, EARLY, FLOOR, ModelSpec, Plan, floor_and_ceiling
from longspan.experiments.claims.continued.remedies import Look, Remedy, looks_at, remedies_table
from longspan.experiments.claims.continued.results import Pair, Results, needs_seeds, without_run
from longspan.experiments.claims.continued.single_run import Job, is_record_of, train_and_measure
from longspan.experiments.claims.continued.trained import TrainedRuns
from longspan.files import write_json
from longspan.report import Picture, Table
from longspan.train.starts import start_folder
from longspan.train.workers import ONE_WORKER, Done, Workers, run_jobs

P = TypeVar("P", bound=Plan)
Runs = dict[str, list[Mapping[str, Any]]]
"""Records of `train_and_measure`, one per seed, by model."""


@dataclass(frozen=True, kw_only=True)
class Judgment:
    """What a claim makes of the results."""

    verdict: Verdict
    figures: list[Figure]
    """numbers on which the verdict hangs"""
    note: str
    """the criteria, and what limits them"""
    pictures: Sequence[Picture] = ()
    """of what the claim measures beside losses"""
    tables: Sequence[Table] = ()
    """the same"""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A claim about models that continue from a common start."""

    name: str
    """of the claim"""
    models: Sequence[ModelSpec]
    """besides floor and ceiling, which every comparison has"""
    pairs: Sequence[Pair]
    """models on whose order the verdict hangs"""
    judge: Callable[[Results], Judgment]
    inspect: Callable[[TrainedRuns, Say], Mapping[str, Any]] | None = None
    """measures trained runs beside their losses; returns plain data, which becomes `Results.inspected`"""
    remedies: Sequence[Remedy] = ()
    """tried at sizes that ask for it (`Plan.remedies`), unless the claim holds as a whole"""
    look: Look | None = None
    """at models with a remedy, where the verdict asks for more than losses"""

    def measure(self, folder: Path, plan: Plan, say: Say, workers: Workers = ONE_WORKER) -> Outcome:
        """Train, measure and judge; a second call with the same folder resumes.

        Args:
            folder: of all runs.
            plan: sizes.
            say: prints a line of progress.
            workers: how many runs are trained at a time, and until when one may begin; a model without a run is
                listed and decides nothing.

        Raises:
            ConfigError: the plan names a model that the comparison does not have.
            LongspanError: every run failed; the message is that of the first.
        """
        results = self.results(folder, plan, say, workers)
        judgment = self.judge(results)
        tables, tried = [*judgment.tables, *report.tables(results)], {}
        if plan.remedies and self.remedies and judgment.verdict != "holds":
            say("trying remedies, because the claim does not hold as a whole")
            runs, failures = _collected(_train_first(self._remedy_models(), folder, plan, say, workers))
            every = replace(results, runs={**results.runs, **runs}, failures={**results.failures, **failures})
            opened = TrainedRuns(folder=folder, plan=plan)
            shown = {} if self.look is None else looks_at(self.look, opened, self.pairs, self.remedies)
            tables.insert(0, remedies_table(every, self.pairs, self.remedies, self.look, shown))
            tried = {"models": runs, "failures": failures, "looks": shown}
        return Outcome(
            verdict=judgment.verdict,
            figures=judgment.figures,
            tables=tables,
            size=report.size_text(results),
            note=" ".join((judgment.note, report.flat_text(), report.context_text(results))),
            data={**results.record(), "tried": tried},
            pictures=[*judgment.pictures, *report.pictures(self.name, results, self.pairs)],
            seconds=sum(run["seconds"] for runs in results.runs.values() for run in runs),
        )

    def results(self, folder: Path, plan: Plan, say: Say, workers: Workers = ONE_WORKER) -> Results:
        """Train and measure every model with one seed, and those of close pairs with all seeds of the plan.

        The models on which the verdict hangs come first.
        """
        specs = [*floor_and_ceiling(plan), *self._chosen(plan)]
        decisive = {FLOOR, CEILING, *(name for pair in self.pairs for name in pair)}
        first, rest = ([spec for spec in specs if (spec.name in decisive) == wanted] for wanted in (True, False))
        ended = _train_first(first, folder, plan, say, workers)
        bits = {job.spec.name: bits_per_byte(done.value) for job, done in ended if not done.failure}
        close = needs_seeds(bits, self.pairs) if plan.seeds > 1 else []
        if close:
            say(f"more seeds, because the verdict hangs on close models: {', '.join(close)}")
            more = [
                replace(job, seed=seed) for seed in range(1, plan.seeds) for job, _ in ended if job.spec.name in close
            ]
            ended += _train(more, workers, say)
        ended += _train_first(rest, folder, plan, say, workers)
        if all(done.failure for _, done in ended):
            raise LongspanError(f"{self.name}: every run failed: {ended[0][1].failure}")
        # in the order of the models, whatever was trained first
        ended.sort(key=lambda run: [spec.name for spec in specs].index(run[0].spec.name))
        runs, failures = _collected(ended)
        inspected = {} if self.inspect is None else self.inspect(TrainedRuns(folder=folder, plan=plan), say)
        return Results(plan, runs, failures, inspected)

    def restore(self, folder: Path, plan: Plan, data: Mapping[str, Any]) -> int:
        """Write the records of an earlier result into the folder of its runs, so that these are not trained again.

        Only records of the same recipe and the same measurements are taken, where the folder has none.

        Args:
            folder: of all runs.
            plan: sizes.
            data: `Outcome.data` of the earlier result.

        Returns:
            Number of runs.
        """
        assert self.inspect is None, f"{self.name}: inspects trained models, of which a record has no weights"
        records = {**data.get("tried", {}).get("models", {}), **data.get("models", {})}
        specs = {spec.name: spec for spec in (*floor_and_ceiling(plan), *self._chosen(plan), *self._remedy_models())}
        restored = 0
        for spec in specs.values():
            for record in records.get(spec.name, []):
                job = Job(spec=spec, plan=plan, seed=record.get("seed", 0), folder=folder)
                if not job.run.exists() and is_record_of(record, job):
                    write_json(job.record, record)
                    restored += 1
        return restored

    def _remedy_models(self) -> list[ModelSpec]:
        """Return the models that only remedies have."""
        return [*{spec.name: spec for remedy in self.remedies for spec in remedy.models}.values()]

    def _chosen(self, plan: Plan) -> list[ModelSpec]:
        """Return the models that the plan names, all if it names none."""
        known = {spec.name: spec for spec in self.models}
        for name in plan.models:
            if name not in known:
                raise ConfigError(f"{self.name}: unknown model {name!r}{nearest(name, known)}")
        return [known[name] for name in plan.models or known]


def measure_with(comparison: Callable[[P], Comparison]) -> Callable[[Path, P, Say, Workers], Outcome]:
    """Return the function `Claim.parallel` of a claim whose models or judge depend on its plan.

    Args:
        comparison: returns the comparison of a plan.
    """

    def measure(folder: Path, plan: P, say: Say, workers: Workers = ONE_WORKER) -> Outcome:
        """Train, measure and judge; see `Comparison.measure`."""
        return comparison(plan).measure(folder, plan, say, workers)

    return measure


def _train_first(
    specs: Sequence[ModelSpec], folder: Path, plan: Plan, say: Say, workers: Workers
) -> list[tuple[Job, Done]]:
    """Train and measure models with the first seed; return what became of every run."""
    quiet = workers.count > 1
    jobs = [Job(spec=spec, plan=plan, seed=0, folder=folder, quiet=quiet) for spec in specs]
    # a start that is trained at its first use would keep all workers but one waiting
    if not workers.is_over:
        for start in dict.fromkeys(plan.start_of(job.spec) for job in jobs if not job.record.is_file()):
            start_folder(start)
    return _train(jobs, workers, say)


def _train(jobs: Sequence[Job], workers: Workers, say: Say) -> list[tuple[Job, Done]]:
    """Train and measure runs; return what became of every one. Runs that are measured already are read."""
    # a worker takes seconds to start, and would only read the file
    left = [job for job in jobs if not job.record.is_file()]
    measured = [(job, Done(train_and_measure(job))) for job in jobs if job not in left]
    ended = run_jobs(train_and_measure, left, workers, lambda job, done: say(_line(job, done)))
    outcomes = {job.run: done for job, done in (*measured, *zip(left, ended, strict=True))}
    return [(job, outcomes[job.run]) for job in jobs]


def _collected(ended: Sequence[tuple[Job, Done]]) -> tuple[Runs, dict[str, str]]:
    """Return the records of all runs by model, one per seed, and the messages of failed ones by model."""
    runs: Runs = {}
    failures: dict[str, str] = {}
    for job, done in ended:
        if done.failure:
            failures[job.spec.name] = done.failure
        else:
            runs.setdefault(job.spec.name, []).append(done.value)
    return runs, failures


def _line(job: Job, done: Done) -> str:
    """Describe a run that ended: its loss after few steps and at the end, and what it took from the start."""
    what = f"{job.spec.name}, seed {job.seed}"
    if done.failure:
        return f"{what}: {without_run(done.failure)}"
    run = done.value
    bits = {int(step): value for step, _, _, value in run["curve"]}
    early = ", ".join(f"{bits[step]:.3f} at step {step:,}" for step in (0, *EARLY) if step in bits)
    return (
        f"{what}: {bits_per_byte(run):.4f} bits per byte after {run['seconds']:.0f} s; {early}; "
        f"{run['taken_parameters'] / run['parameters']:.1%} of {run['parameters']:,} parameters from the start"
    )
