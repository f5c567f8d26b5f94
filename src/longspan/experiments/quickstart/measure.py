"""What is asked, and the claims that are checked against the answers."""

from dataclasses import dataclass
from typing import Any

from longspan.cli.console import StatusLine
from longspan.experiments.checks import Check
from longspan.experiments.tour import Clock
from longspan.report import si_bytes
from longspan.tasks import MemoryTask
from longspan.tasks.memory import Kind
from longspan.train import Answers, evaluate_answers

LENGTHS = (1, 4, 16, 64, 256, 1024, 4096)
ACCURACY, SURE = 0.95, 256
RESIDENT_GROWTH, SPEED_CHANGE = 0.05, 0.10
TRAIN_SECONDS, TOTAL_SECONDS = 480, 720
# rows read side by side, at every length, so that speed and memory can be compared
BATCH = 8
_COLUMNS = (("segments", 9), ("tokens", 10), ("memorize", 10), ("detect", 10), ("tokens/s", 10), ("memory", 10))


@dataclass(frozen=True)
class Reading:
    """What was found at one number of segments, by kind."""

    segments: int
    answers: dict[str, Answers]

    @property
    def tokens(self) -> int:
        """Of each sample."""
        return self.segments * next(iter(self.answers.values())).tokens // self.segments

    @property
    def tokens_per_second(self) -> float:
        """Of all rows together."""
        total = sum(answers.tokens * len(answers.right) for answers in self.answers.values())
        return total / max(sum(answers.seconds for answers in self.answers.values()), 1e-9)

    @property
    def resident(self) -> int | None:
        """Most bytes that the process held."""
        return next(iter(self.answers.values())).resident


def plan(longest: int, count: int) -> list[tuple[int, int]]:
    """(segments, questions of each kind): fewer where each takes long."""
    return [
        (length, count if length <= 64 else max(count // 2, 1) if length <= 256 else max(count // 16, 1))
        for length in LENGTHS
        if length <= longest
    ]


def kinds_of(task: MemoryTask) -> tuple[Kind, ...]:
    """What is asked: a model that detects a fact anywhere also remembers one that stands first."""
    return ("reasoning",) if task.config.kind == "reasoning" else ("memorize", "detect")


def ask(model: Any, task: MemoryTask, questions: list[tuple[int, int]]) -> list[Reading]:
    """Ask at every length, with a row of the table for each as it is known."""
    kinds = kinds_of(task)
    columns = [column for column in _COLUMNS if column[0] not in ("memorize", "detect")]
    columns[2:2] = [(kind, 10) for kind in kinds]
    print(" ".join(f"{name:>{width}}" for name, width in columns), flush=True)
    readings: list[Reading] = []
    for segments, count in questions:
        status = StatusLine(every=30.0)

        def show(share: float, segments: int = segments, status: StatusLine = status) -> None:
            status.show(f"{segments:>9,} {share:>10.0%} read")

        reading = Reading(
            segments,
            evaluate_answers(
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
    """All checks; those of clocks are not fatal, nor is the goal beyond the bar."""
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
        checks.append(_clock("Time of training", clock.laps["train"], TRAIN_SECONDS))
    checks.append(_clock("Time of everything", clock.total, TOTAL_SECONDS))
    return checks


def _accuracy(kind: str, readings: list[Reading], *, fatal: bool) -> Check:
    worst = min(readings, key=lambda reading: reading.answers[kind].accuracy)
    answer = worst.answers[kind]
    first, last = (f"{reading.segments:,}" for reading in (readings[0], readings[-1]))
    return Check(
        name=f"{kind}: right answers at {first} to {last} segments, {'the bar' if fatal else 'the goal'}",
        value=f"{sum(answer.right)} of {len(answer.right)} at worst, at {worst.segments:,}",
        bar=f"{ACCURACY:.0%}",
        passed=answer.accuracy >= ACCURACY,
        fatal=fatal,
    )


def _constant(readings: list[Reading]) -> list[Check]:
    """Memory and speed at the longest text against those at 16 segments."""
    base = next((reading for reading in readings if reading.segments == 16), readings[0])
    last = readings[-1]
    if last.segments <= base.segments:
        return []
    checks = []
    if base.resident and last.resident:
        grown = last.resident / base.resident - 1
        checks.append(
            Check(
                name=f"Resident memory at {last.segments:,} segments is that at {base.segments}",
                value=f"{si_bytes(base.resident)} and {si_bytes(last.resident)}: {100 * grown:+.1f}%".replace("-", "−"),
                bar=f"+{RESIDENT_GROWTH:.0%}",
                passed=grown <= RESIDENT_GROWTH,
            )
        )
    change = last.tokens_per_second / base.tokens_per_second - 1
    checks.append(
        Check(
            name=f"Tokens per second at {last.segments:,} segments are those at {base.segments}",
            value=f"{base.tokens_per_second:,.0f} and {last.tokens_per_second:,.0f}: {100 * change:+.1f}%".replace(
                "-", "−"
            ),
            bar=f"within {SPEED_CHANGE:.0%}",
            passed=abs(change) <= SPEED_CHANGE,
            fatal=False,
        )
    )
    return checks


def _clock(name: str, seconds: float, bar: float) -> Check:
    return Check(
        name=name, value=f"{seconds / 60:.1f} min", bar=f"{bar / 60:g} min", passed=seconds <= bar, fatal=False
    )
