"""What the models of a comparison read to be compared: a held-out text, or samples of a task that they answer."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from longspan.comparison.answers import ComparedAnswers, Samples, add_answer_speed, measure_answers
from longspan.comparison.measure import HeldOut, add_speed, measure_run
from longspan.comparison.results import Compared, Record

Reading: TypeAlias = HeldOut | Samples


def measure(folder: str | Path, reading: Reading, file: Path) -> dict[str, Any]:
    """Measure a run on a text (`measure_run`) or on samples of its task (`measure_answers`)."""
    if isinstance(reading, Samples):
        return measure_answers(folder, reading, file)
    return measure_run(folder, reading, file)


def with_speed(record: dict[str, Any], reading: Reading, file: Path) -> dict[str, Any]:
    """Return the record of `measure` with the speed of reading, which is measured and saved unless it is known."""
    if isinstance(reading, Samples):
        return add_answer_speed(record, file)
    return add_speed(record, reading, file)


def compared_of(runs: Mapping[str, Sequence[Record]], failures: Mapping[str, str], reading: Reading) -> Compared:
    """Return the records of `measure` as a comparison; raises DataError if they are of different texts or samples."""
    return (ComparedAnswers if isinstance(reading, Samples) else Compared)(runs, failures)
