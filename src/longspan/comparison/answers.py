"""Measures runs on a task whose answers are scored, such as `passkey`: the accuracy at several lengths of its samples.

A run is trained on samples of one length. Its held-out samples have that length and multiples of it, so that the
figures show up to which length a model recalls.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from longspan import tasks
from longspan.comparison.measure import costs_of, fastest, made_of, training_of, weights_of
from longspan.comparison.results import Compared
from longspan.errors import CheckpointError, LongspanError
from longspan.files import data_digest, read_object, write_json
from longspan.tasks import Documents
from longspan.tasks.base import Array, heads
from longspan.train import Evaluation, Interval, evaluate_text, load_run, share_bootstrap, wilson
from longspan.train.opening import stored_recipe
from longspan.train.run_summary import read_summaries
from longspan.version import __version__

TASKS: Mapping[str, Mapping[str, Any]] = {
    "associate": {"name": "associate"},
    "copy": {"name": "copy"},
    # a single question per text teaches too little, so training texts repeat the number
    "passkey": {"name": "passkey", "length": 512, "mentions": 4, "graded": "mentions"},
    "needle": {"name": "needle", "length": 512, "mentions": 4, "graded": "mentions"},
    "memorize": {"name": "memory", "kind": "memorize"},
    "detect": {"name": "memory", "kind": "detect"},
    "reasoning": {"name": "memory", "kind": "reasoning"},
}
"""`[task]` tables by the name that `--data` takes"""
TIMES = (1, 2, 4, 8)
"""lengths of tests, as multiples of the length of training samples"""
EQUAL = 0.05
"""accuracy: a model is as good as the best if the interval of their difference ends at most here"""
CHUNK, ROWS = 512, 16
"""tokens per row and rows of a call; does not change the answers"""


@dataclass(frozen=True, kw_only=True)
class Samples:
    """The samples that all runs of a comparison answer."""

    count: int = 128
    """of every length"""
    reach: int = 65_536
    """no test is longer, in tokens, but for the first; 0: no limit"""


def is_recall(task: Mapping[str, Any]) -> bool:
    """Return whether a `[task]` table is of a task whose answers are scored at any length."""
    return hasattr(tasks.config_class(task.get("name", "text")), "tested_at")


def task_length(task: Mapping[str, Any]) -> int:
    """Return the tokens of a training sample of a task; raises ConfigError if the table is wrong."""
    length: int = tasks.build(task).config.length  # type: ignore[attr-defined]
    return length


def measure_answers(folder: str | Path, asked: Samples, file: Path) -> dict[str, Any]:
    """Measure the answers of a run; what `file` has of the same run and tests is read from there.

    Args:
        folder: of a run of a task of `TASKS`.
        asked: number and length of the samples.
        file: JSON file of the measurements.

    Returns:
        Plain data as `measure_run` returns it, of the samples of the training length: `names` and `bytes` (tokens) of
        the samples, `nats` and `units` (number of scored predictions). Further `lengths`: by tokens of a sample,
        `correct` and `units` of every sample, or a `problem`; `chance`: accuracy of always giving the answer that is
        most frequent; no `positions` and `distances`.

    Raises:
        CheckpointError: the folder is not a run of such a task, or is damaged.
    """
    folder = Path(folder)
    recipe = stored_recipe(folder)
    if not is_recall(recipe["task"]):
        raise CheckpointError(f"{folder}: its task has no answers to score; compare runs of {', '.join(TASKS)}")
    key = data_digest([weights_of(folder), asdict(asked), __version__])
    if file.is_file() and (saved := read_object(file)).get("key") == key:
        return saved
    model, task = load_run(folder)
    if not hasattr(model, "vocab_size") or not model.traits.causal:
        raise CheckpointError(f"{folder}: not a causal language model; `longspan compare` reads such runs only")
    lengths: dict[str, dict[str, Any]] = {}
    first = test_samples(task, folder, 1, asked.count)
    answered = _answer(model, first, task.unit)
    for times in TIMES:
        samples = first if times == 1 else test_samples(task, folder, times, asked.count)
        length = len(samples[0])
        if times > 1 and asked.reach and length > asked.reach:
            break
        try:
            answers = answered if times == 1 else _answer(model, samples, task.unit)
        except LongspanError as error:
            lengths[str(length)] = {"problem": str(error)}
            continue
        lengths[str(length)] = {"correct": answers.correct.tolist(), "units": answers.tokens.tolist()}
    record = {
        "key": key,
        "folder": str(folder),
        # samples are a function of the table and of their number
        "text": data_digest([recipe["task"], asdict(asked)]),
        "names": list(first.names),
        "bytes": first.lengths.tolist(),
        "blocks": "samples",
        "nats": answered.nats.tolist(),
        "units": answered.tokens.tolist(),
        "lengths": lengths,
        "chance": _chance(first),
        "reading": "its state carried through the sample" if model.traits.streams else "the whole sample at once",
        "bytes_per_second": None,
        "carries": bool(model.traits.streams),
        **costs_of(model),
        "bytes_per_token": 1.0,
        "mechanism": read_summaries(folder)[0].mechanism,
        "made_of": made_of(recipe["model"]),
        "training": training_of(folder, recipe),
    }
    write_json(file, record)
    return record


def add_answer_speed(record: dict[str, Any], file: Path) -> dict[str, Any]:
    """Return the record of a run with the tokens that its model reads per second, and save it, unless it has them.

    To compare runs, call this for one after another while nothing else runs.
    """
    if record["bytes_per_second"] is not None:
        return record
    folder = Path(record["folder"])
    model, task = load_run(folder)
    samples = test_samples(task, folder, 1, ROWS)
    read = int(samples.lengths.sum())
    record = {**record, "bytes_per_second": read / fastest(lambda: _answer(model, samples, task.unit))}
    write_json(file, record)
    return record


def test_samples(task: Any, folder: Path, times: int, count: int) -> Documents:
    """Return held-out samples of a task, `times` as long as those of its training.

    Args:
        task: of the run, for its configuration.
        folder: of the run, for its tokenizer.
        times: factor of the length.
        count: number of samples.
    """
    # a tenth of the samples is held out
    longer = type(task)(replace(task.config.tested_at(times), samples=10 * count))
    longer.prepare(folder, main=False)
    return heads(longer.documents("validation"), 0, count)


def _answer(model: Any, samples: Documents, unit: str) -> Evaluation:
    """Let a model predict the scored tokens of samples, given all tokens before each."""
    length = int(samples.lengths.max())
    streams = model.traits.streams
    chunk = CHUNK if streams else length
    return evaluate_text(model, samples, chunk=chunk, batch=max(ROWS * CHUNK // chunk, 1), memory=streams, unit=unit)


def _chance(samples: Documents) -> float:
    """Return the accuracy of always giving the most frequent scored token."""
    pieces = [sample.cut(0, len(sample)) for sample in samples.items]
    targets = np.concatenate([piece.targets[piece.graded] for piece in pieces])
    return float(np.bincount(targets).max() / len(targets))


@dataclass(frozen=True)
class ComparedAnswers(Compared):
    """Models that answered the same samples; the best has the highest accuracy, the mean over all lengths.

    A length that a model cannot read counts as chance.
    """

    unit: ClassVar[str] = "token"
    loss_unit: ClassVar[str] = "bits per scored token"

    @cached_property
    def names(self) -> list[str]:
        """Names of the models, the highest accuracy first; the lower loss decides between equals."""
        return sorted(self.runs, key=lambda name: (-self.overall(name).value, self.bits(name).value))

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of the samples, the shortest first."""
        (first, *_) = self.runs.values()
        return [int(length) for length in first[0]["lengths"]]

    @property
    def chance(self) -> float:
        """Accuracy of always giving the most frequent answer."""
        return float(self.record(self.best)["chance"])

    def shares(self, name: str, length: int) -> Array | None:
        """Return the share of correct predictions of every sample, (samples,) fp64, the mean over seeds.

        None if the model cannot read samples of this length.
        """
        answers = [record["lengths"][str(length)] for record in self.runs[name]]
        if any("problem" in answer for answer in answers):
            return None
        shares = [np.array(answer["correct"]) / np.array(answer["units"]) for answer in answers]
        return np.asarray(np.mean(shares, axis=0))

    def accuracy(self, name: str, length: int) -> Interval | None:
        """Return the accuracy at a length with a 95 % Wilson interval over samples, None if it cannot be read."""
        shares = self.shares(name, length)
        # by whole samples: at most as certain as it is, also at 0 and 100 %
        return None if shares is None else wilson(float(shares.sum()), len(shares))

    def _scores(self, name: str) -> Array:
        """Return the mean accuracy over lengths of every sample, (samples,)."""
        chance = float(self.record(name)["chance"])
        samples = len(self.record(name)["names"])
        by_length = [self.shares(name, length) for length in self.lengths]
        return np.asarray(
            np.mean([np.full(samples, chance) if shares is None else shares for shares in by_length], axis=0)
        )

    def overall(self, name: str) -> Interval:
        """Return the mean accuracy over all lengths with a 95 % Wilson interval over samples."""
        scores = self._scores(name)
        return wilson(float(scores.sum()), len(scores))

    def behind(self, name: str) -> Interval:
        """Return the overall accuracy of the best minus that of a model, with an interval paired by sample."""
        gaps = self._scores(self.best) - self._scores(name)
        return share_bootstrap(gaps, np.ones(len(gaps)))

    @cached_property
    def as_good(self) -> list[str]:
        """Models whose overall accuracy is at most `EQUAL` below that of the best by the interval, it first."""
        return [name for name in self.names if name == self.best or self.behind(name).high <= EQUAL]

    @cached_property
    def unsettled(self) -> list[str]:
        """Models that may be as good as the best: the interval of their difference begins, but does not end, there."""
        return [name for name in self.names if name not in self.as_good and self.behind(name).low <= EQUAL]

    def far_difference(self, name: str, base: str) -> None:
        """Return None: the samples of a task are compared by their length."""
