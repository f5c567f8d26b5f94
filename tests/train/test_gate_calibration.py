"""Calibration of write gates: the shift, its bounds, and what it does to a model."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from longspan import tasks
from longspan.errors import ConfigError
from longspan.models import Trace, build_model
from longspan.tasks import MemoryTask
from longspan.train import gate_calibration, resolve
from longspan.train.gate_calibration import (
    GateLogits,
    calibrate_gates,
    choose_shift,
    join,
    read_gates,
    shift_gates,
    upper_bound,
)

stats = pytest.importorskip("scipy.stats")
pytestmark = pytest.mark.usefixtures("brief_texts")
RECIPE: dict[str, Any] = {
    "model": {
        "kind": "encoder",
        "dim": 16,
        "num_layers": 1,
        "num_heads": 2,
        "classes": 6,
        "memory": {"num_memory_tokens": 2, "segment_length": 96},
    },
    "task": {"name": "memory", "vocab_size": 512, "segment_length": 96},
}


@pytest.fixture(scope="module")
def task(brief_texts: None, tmp_path_factory: pytest.TempPathFactory) -> MemoryTask:
    task = tasks.build(resolve(RECIPE)["task"])
    task.prepare(Path(tmp_path_factory.mktemp("memory")))
    assert isinstance(task, MemoryTask)
    return task


def model_for(task: MemoryTask, **memory: Any) -> Any:
    torch.manual_seed(0)
    table = resolve(RECIPE)["model"]
    return build_model({**table, "memory": {**table["memory"], **memory}, "vocab_size": task.vocab_size}).eval()


@pytest.mark.parametrize(("events", "count"), [(0, 1000), (1, 500_000), (7, 10**6), (40, 10**6)])
def test_the_bound_is_the_exact_one_of_poisson(events: int, count: int) -> None:
    assert upper_bound(events, count) == pytest.approx(stats.chi2.ppf(0.95, 2 * (events + 1)) / 2 / count, rel=1e-9)


def test_the_shift_makes_false_writes_as_rare_as_wanted() -> None:
    random = np.random.default_rng(0)
    seen = GateLogits(random.exponential(0.5, 400_000) - 4, random.normal(9, 0.5, 20_000))
    shift = choose_shift(seen, false_writes=5e-6, recall=0.99)
    # exponential tail: P(logit > x) = exp(-(x + 4) / 0.5)
    rate = np.exp(-(shift + 4) / 0.5)
    assert 0.3e-6 < rate < 4e-6
    assert (seen.whole > shift).mean() > 0.999


def test_recall_has_priority_and_gates_are_never_opened() -> None:
    random = np.random.default_rng(1)
    overlapping = GateLogits(random.normal(0, 2, 100_000), random.normal(3, 1, 10_000))
    shift = choose_shift(overlapping, false_writes=5e-6, recall=0.99)
    assert 0.99 <= (overlapping.whole - shift > 0).mean() < 0.9905
    closed = GateLogits(random.normal(-20, 0.1, 10_000), random.normal(9, 1, 1000))
    assert choose_shift(closed, false_writes=5e-6, recall=0.99) == 0


def test_logits_are_those_of_the_gates_segment_by_segment(task: MemoryTask) -> None:
    model = model_for(task)
    logits = read_gates(model, task, samples=range(3, 8), segments=4, batch=2, seed=5)
    one_by_one = [read_gates(model, task, samples=range(i, i + 1), segments=4, seed=5) for i in range(3, 8)]
    for both in zip(logits, join(one_by_one), strict=True):
        np.testing.assert_allclose(np.sort(both[0]), np.sort(both[1]), atol=1e-5)
    assert len(logits.silent) + len(logits.whole) <= 5 * 3
    seen: list[tuple[int, int, float]] = []
    read_gates(model, task, samples=range(2), segments=4, seed=5, on_segment=lambda *what: seen.append(what))
    for row, index, logit in seen:
        parts = list(task.sample("train", 4, [5, 3, row], negatives=False))
        assert not parts[index].fact
        state = None
        for part in parts[: index + 1]:
            traces: list[Trace] = []
            _, state = model(torch.from_numpy(part.tokens)[None], state, traces=traces)
        assert traces[-1].logits is not None
        assert float(traces[-1].logits.detach().max()) == pytest.approx(logit, abs=1e-5)


def test_a_shift_lowers_every_logit_of_the_gates(task: MemoryTask) -> None:
    model = model_for(task)
    # one segment, which reads the initial memory
    before = read_gates(model, task, samples=range(4), segments=2)
    shift_gates(model, 1.5)
    after = read_gates(model, task, samples=range(4), segments=2)
    np.testing.assert_allclose(after.silent, before.silent - 1.5, atol=1e-5)


def test_a_calibration_reports_rates_of_other_noise(task: MemoryTask) -> None:
    model = model_for(task)
    shares: list[float] = []
    result = calibrate_gates(model, task, silent=900, segments=8, batch=16, recall=0.0, progress=shares.append)
    assert shares == sorted(shares)
    assert shares[-1] == 1
    # an untrained gate is open (bias 1), and recall of 0 lets the shift close it
    assert result.false_writes_before > 0.9 * result.silent_before
    assert result.shift > 0
    assert result.false_writes < 0.05 * result.silent
    assert result.false_write_bound == upper_bound(result.false_writes, result.silent)
    assert result.recall == 1 - result.missed / result.whole
    again = model_for(task)
    shift_gates(again, result.shift)
    torch.testing.assert_close(again.recurrent.update.bias, model.recurrent.update.bias)


def test_a_calibration_resumes_from_its_files(
    task: MemoryTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments: dict[str, Any] = {"silent": 300, "segments": 8, "batch": 8, "recall": 0.5}
    plain = calibrate_gates(model_for(task), task, **arguments)
    shares: list[float] = []

    def stop(share: float) -> None:
        shares.append(share)
        if share > 0.6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate_gates(model_for(task), task, cache=tmp_path, progress=stop, **arguments)
    (tmp_path / "0-8.npz").write_bytes(b"damaged")
    reads: list[range] = []

    def count_reads(*given: Any, samples: range, **named: Any) -> GateLogits:
        reads.append(samples)
        return read_gates(*given, samples=samples, **named)

    monkeypatch.setattr(gate_calibration, "read_gates", count_reads)
    resumed = model_for(task)
    assert calibrate_gates(resumed, task, cache=tmp_path, **arguments) == plain
    assert reads[0] == range(8)
    assert len(reads) < len(list(tmp_path.iterdir()))
    assert float(resumed.recurrent.update.bias.detach()[0]) == pytest.approx(1 - plain.shift, abs=1e-5)


def test_a_memory_without_gates_is_refused(task: MemoryTask) -> None:
    with pytest.raises(ConfigError, match=r"has no gates to calibrate; set model\.memory\.update = 'gated'"):
        calibrate_gates(model_for(task, update="paper"), task)
    with pytest.raises(ConfigError, match=r"silent = 50: must be at least 252, four samples of 64 segments"):
        calibrate_gates(model_for(task), task, silent=50)


def test_negatives_are_in_training_noise_unless_left_out(task: MemoryTask) -> None:
    plain, usual = (
        [list(task.sample("train", 16, [row], negatives=negatives)) for row in range(8)] for negatives in (False, None)
    )
    assert any(
        not np.array_equal(one.tokens, other.tokens)
        for parts in zip(plain, usual, strict=True)
        for one, other in zip(*parts, strict=True)
    )
