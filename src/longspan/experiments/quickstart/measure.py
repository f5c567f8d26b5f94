"""The questions of the quickstart, and checks on the answers."""

from dataclasses import dataclass
from typing import Any

from longspan.cli.console import StatusLine
from longspan.experiments.checks import Check, speed_check, time_check
from longspan.experiments.tour import Clock
from longspan.report import si_bytes
from longspan.tasks import MemoryTask
from longspan.tasks.memory import Kind
from longspan.train import MemoryEvaluation, evaluate_memory, wilson

LENGTHS = (1, 4, 16, 64, 256, 1024, 4096)
ACCURACY, SURE = 0.95, 256
RESIDENT_GROWTH = 0.05
TRAIN_SECONDS, TOTAL_SECONDS = 480, 720
# rows per batch, the same at every length so that speed and memory can be compared
BATCH = 8
_COLUMNS = (("segments", 9), ("tokens", 10), ("memorize", 10), ("detect", 10), ("tokens/s", 10), ("memory", 10))


@dataclass(frozen=True)
class Reading:
    """Answers by kind of question, after texts of the same number of segments."""

    segments: int
    answers: dict[str, MemoryEvaluation]

    @property
    def tokens(self) -> int:
        """Length of each sample."""
        return self.segments * next(iter(self.answers.values())).tokens // self.segments

    @property
    def tokens_per_second(self) -> float:
        """Tokens read per second, summed over the rows of a batch."""
        total = sum(answers.tokens * len(answers.right) for answers in self.answers.values())
        return total / max(sum(answers.seconds for answers in self.answers.values()), 1e-9)

    @property
    def resident(self) -> int | None:
        """Peak resident bytes of the process; None where the system does not report it."""
        return next(iter(self.answers.values())).resident


def plan(longest: int, count: int) -> list[tuple[int, int]]:
    """Return (segments, questions of each kind) for every length up to `longest`; long texts get fewer questions."""
    return [
        (length, count if length <= 64 else max(count // 2, 1) if length <= 256 else max(count // 16, 1))
        for length in LENGTHS
        if length <= longest
    ]


def kinds_of(task: MemoryTask) -> tuple[Kind, ...]:
    """Return the kinds of questions that a model of this task is evaluated on.

    A model trained to detect a fact anywhere can also memorize one at the start.
    """
    return ("reasoning",) if task.config.kind == "reasoning" else ("memorize", "detect")


def ask(model: Any, task: MemoryTask, questions: list[tuple[int, int]]) -> list[Reading]:
    """Evaluate the model at every length and print a row of the table after each."""
    kinds = kinds_of(task)
    columns = [column for column in _COLUMNS if column[0] not in ("memorize", "detect")]
    columns[2:2] = [(kind, 10) for kind in kinds]
    print(" ".join(f"{name:>{width}}" for name, width in columns), flush=True)
    readings: list[Reading] = []
    for segments, count in questions:
        status = StatusLine(every=30.0)

        def show(share: float, segments: int = segments, status: StatusLine = status) -> None:
            """Show the share of the texts that was read, for one number of segments."""
            status.show(f"{segments:>9,} {share:>10.0%} read")

        reading = Reading(
            segments,
            evaluate_memory(
                model,
                task,
                segments=segments,
                count=count,
                kinds=kinds,
                batch=BATCH,
                progress=show if status.live else None,
            ),
        )
        readings.append(reading)
        cells = [f"{segments:,}", f"{reading.tokens:,}"]
        cells += [f"{sum(reading.answers[kind].right)} of {len(reading.answers[kind].right)}" for kind in kinds]
        cells += [f"{reading.tokens_per_second:,.0f}", "" if reading.resident is None else si_bytes(reading.resident)]
        status.show(" ".join(f"{cell:>{width}}" for cell, (_, width) in zip(cells, columns, strict=True)))
        status.end()
    return readings


def check(readings: list[Reading], clock: Clock) -> list[Check]:
    """Return all checks of the quickstart; those of time and of more than `SURE` segments are not fatal."""
    kinds = list(readings[0].answers)
    checks = []
    for kind in kinds:
        sure = [reading for reading in readings if reading.segments <= SURE]
        far = [reading for reading in readings if reading.segments > SURE]
        checks.append(_accuracy(kind, sure, fatal=True))
        if far:
            checks.append(_accuracy(kind, far, fatal=False))
    checks += _constant(readings)
    if "train" in clock.laps:
        checks.append(time_check("Training time", clock.laps["train"], TRAIN_SECONDS))
    checks.append(time_check("Total time", clock.total, TOTAL_SECONDS))
    return checks


def _accuracy(kind: str, readings: list[Reading], *, fatal: bool) -> Check:
    """Check that the accuracy over all lengths reaches the bar, by its 95 % interval.

    The check passes where the lower end reaches the bar, and fails where the upper end, of all lengths together or of
    one of them, stays below it. Between the two the questions are too few to tell.
    """
    answers = [reading.answers[kind] for reading in readings]
    right, count = sum(sum(answer.right) for answer in answers), sum(len(answer.right) for answer in answers)
    interval = wilson(right, count)
    worst = min(readings, key=lambda reading: reading.answers[kind].accuracy)
    at_worst = worst.answers[kind]
    failed = min(interval.high, *(answer.interval().high for answer in answers)) < ACCURACY
    passed = interval.low >= ACCURACY and not failed
    first, last = (f"{reading.segments:,}" for reading in (readings[0], readings[-1]))
    return Check(
        name=f"{kind}: accuracy at {first} to {last} segments, {'the bar' if fatal else 'the goal'}",
        value=f"{right} of {count}, interval {interval.low:.1%} to {interval.high:.1%}; lowest {sum(at_worst.right)} "
        f"of {len(at_worst.right)}, at {worst.segments:,}",
        bar=f"lower end at least {ACCURACY:.0%}",
        passed=passed,
        undecided=not passed and not failed,
        fatal=fatal,
    )


def _constant(readings: list[Reading]) -> list[Check]:
    """Check that memory and speed at the longest text equal those at 16 segments."""
    base = next((reading for reading in readings if reading.segments == 16), readings[0])
    last = readings[-1]
    if last.segments <= base.segments:
        return []
    checks = []
    if base.resident and last.resident:
        grown = last.resident / base.resident - 1
        checks.append(
            Check(
                name=f"Resident memory at {last.segments:,} segments equals that at {base.segments}",
                value=f"{si_bytes(base.resident)} and {si_bytes(last.resident)}: {100 * grown:+.1f}%".replace("-", "−"),
                bar=f"at most +{RESIDENT_GROWTH:.0%}",
                passed=grown <= RESIDENT_GROWTH,
            )
        )
    name = f"Speed at {last.segments:,} segments equals that at {base.segments}"
    checks.append(speed_check(name, base.tokens_per_second, last.tokens_per_second, "tokens/s"))
    return checks
