"""Mining of hard negatives: what a search returns, where batches repeat it, and runs that resume across a search."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from longspan import tasks
from longspan.errors import ConfigError
from longspan.models import Trace, build_model
from longspan.tasks import MemoryTask
from longspan.train import Display, MemoryCurriculumConfig, load_run, read_log, resolve, run
from longspan.train.curriculum import Plan
from longspan.train.distributed import Group
from longspan.train.gate_calibration import read_gates
from longspan.train.hard_negatives import SEGMENTS, mine, tokens_of
from longspan.train.memory_curriculum import (
    MemorySource,
    Samples,
    draw_samples,
    gate_losses,
    mined_gate_loss,
    replace_silent,
)

pytestmark = pytest.mark.usefixtures("brief_texts")
MINING = {"mine_every": 3, "mine_segments": 100, "mine_hardest": 20, "mine_share": 0.5}
RECIPE: dict[str, Any] = {
    "model": {
        "kind": "encoder",
        "dim": 16,
        "num_layers": 1,
        "num_heads": 2,
        "classes": 6,
        "memory": {"num_memory_tokens": 2, "segment_length": 64, "gate_noise": 0.5},
    },
    "task": {"name": "memory", "vocab_size": 512, "segment_length": 64},
    "train": {
        "steps": 8,
        "tokens": 1600,
        "short_segments": [],
        "first_segments": 3,
        "max_segments": 3,
        "log_every": 1,
        "checkpoint_every": 4,
        "warmup": 2,
        **MINING,
    },
}
SEED = (0, 5, 3)


@pytest.fixture(scope="module")
def task(brief_texts: None, tmp_path_factory: pytest.TempPathFactory) -> MemoryTask:
    task = tasks.build(resolve(RECIPE)["task"])
    task.prepare(Path(tmp_path_factory.mktemp("memory")))
    assert isinstance(task, MemoryTask)
    return task


@pytest.fixture
def model(task: MemoryTask) -> Any:
    torch.manual_seed(0)
    return build_model({**resolve(RECIPE)["model"], "vocab_size": task.vocab_size})


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("mining") / "run"
    run(RECIPE, folder, progress="none")
    return folder


def logged(folder: Path, *names: str) -> list[list[Any]]:
    return [[line.get(name) for name in names] for line in read_log(folder / "log.jsonl")]


def test_a_search_returns_the_segments_with_the_largest_logits(task: MemoryTask, model: Any) -> None:
    model.train()
    generator = torch.get_rng_state()
    search = mine(model, task, seed=SEED, silent=100, hardest=20, group=Group())
    assert model.training
    assert torch.equal(torch.get_rng_state(), generator)
    logits: dict[tuple[int, int], float] = {}

    def record(sample: int, segment: int, logit: float) -> None:
        logits[sample, segment] = logit

    plain = read_gates(model, task, samples=range(2), segments=SEGMENTS, seed=SEED, on_segment=record)
    largest = sorted(logits, key=lambda segment: -logits[segment])[:20]
    assert search.hardest == [list(segment) for segment in sorted(largest)]
    assert (search.silent, search.false_writes) == (len(plain.silent), plain.false_writes)
    assert search.silent >= 100


def test_processes_share_the_reading_of_a_search(task: MemoryTask, model: Any) -> None:
    gathered: list[torch.Tensor] = []

    class Recording(Group):
        def gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
            gathered.append(tensor)
            return [tensor]

    # 18 samples in two batches
    for group in (Recording(), Recording(0, 2), Recording(1, 2)):
        mine(model, task, seed=SEED, silent=1100, hardest=20, group=group)
    alone, first, second = gathered
    assert torch.equal(torch.maximum(first, second), alone), "bit for bit"
    assert not (first.isfinite() & second.isfinite()).any(), "no segment is read twice"
    assert second.isfinite().any()


def test_mined_tokens_are_those_that_were_read(task: MemoryTask) -> None:
    segments = [[1, 7], [0, 3], [1, 0]]
    tokens = tokens_of(task, SEED, segments)
    for row, (sample, segment) in zip(tokens, segments, strict=True):
        parts = list(task.sample("train", SEGMENTS, [*SEED, sample], negatives=False))
        np.testing.assert_array_equal(row.numpy(), parts[segment].tokens)


def test_a_share_of_the_silent_segments_is_replaced_and_all_else_stays(task: MemoryTask) -> None:
    mined = tokens_of(task, SEED, [[0, index] for index in range(5)])
    before = draw_samples(task, 4, 300, 64, (0, 9))
    after = replace_silent(before, mined, share=0.25, seed=(0, 9))
    trained = before.none.clone()
    trained[:, -1] = False
    assert not (after.mined & ~trained).any()
    assert float(after.mined[trained].float().mean()) == pytest.approx(0.25, abs=0.05)
    segments, earlier = (batch.tokens.unflatten(1, (4, 64)) for batch in (after, before))
    assert torch.equal(segments[~after.mined], earlier[~after.mined])
    matches = (segments[after.mined][:, None] == mined).all(-1)
    assert matches.any(1).all()
    assert matches.any(0).all(), "every mined segment is repeated"
    for name in ("answers", "none", "whole"):
        assert torch.equal(getattr(after, name), getattr(before, name))
    rest = draw_samples(task, 4, 100, 64, (0, 9), first=200)
    rest = replace_silent(rest, mined, share=0.25, seed=(0, 9), first=200)
    assert torch.equal(rest.tokens, after.tokens[200:]), "rows do not depend on how a batch is split"


def test_mined_segments_have_a_mean_of_their_own() -> None:
    logits = torch.tensor([[[1.0, -2.0], [-9.0, -9.0], [5.0, 5.0]]], requires_grad=True)
    mined = torch.tensor([[True, False, False]])
    batch = Samples(
        tokens=torch.zeros(1, 6, dtype=torch.int64),
        answers=torch.zeros(1, dtype=torch.int64),
        none=torch.tensor([[True, True, False]]),
        whole=torch.zeros(1, 3, dtype=torch.bool),
        mined=mined,
    )
    rows = torch.ones(1, dtype=torch.bool)
    traces = [Trace(logits, logits, logits[:, index], rows, rows) for index in range(3)]
    config = MemoryCurriculumConfig()
    closed, opened = gate_losses(traces, batch, config)
    assert closed.item() == pytest.approx(np.log1p(np.exp(-6)), rel=1e-5)
    assert opened.item() == 0
    loss = mined_gate_loss(traces, batch, config)
    assert loss.item() == pytest.approx(np.log1p(np.exp(4)), rel=1e-5)
    loss.backward()
    assert logits.grad is not None
    assert logits.grad.nonzero().tolist() == [[0, 0, 0]], "the largest logit of the mined segment, and no other"
    assert mined_gate_loss(traces, batch._replace(mined=torch.zeros_like(mined)), config).item() == 0


def test_batches_are_drawn_as_before_without_a_search(task: MemoryTask, model: Any) -> None:
    config = MemoryCurriculumConfig(**{**RECIPE["train"], "short_segments": (), "mine_every": 0})
    source = MemorySource(model, task, config, Group())
    batch = source.draw(0).parts[0].samples
    assert not batch.mined.any()
    plan = source.plan(0)
    expected = draw_samples(task, plan.drawn, plan.rows, 64, (0, 0))
    assert all(torch.equal(*pair) for pair in zip(batch, expected, strict=True))
    assert "false_write_share" not in source.stages.columns()


def test_searches_begin_with_several_segments_of_full_length(task: MemoryTask, model: Any) -> None:
    train = {**RECIPE["train"], "short_segments": (48,), "first_segments": 1, "mine_segments": 10}
    source = MemorySource(model, task, MemoryCurriculumConfig(**train), Group())
    due = []
    for _ in range(3):
        due.append((source.stages.length, source.stages.segments, source.stages.search_is_due(6)))
        source.stages.further()
    assert due == [(48, 1, False), (64, 1, False), (64, 2, True)]
    source.draw(7)
    assert not source.stages.mined, "step 7 has no search"
    source.draw(9)
    assert (source.stages.search_step, len(source.stages.mined)) == (9, 20)
    assert source.samples(Plan(step=9, rows=8, tokens=192, answers=1, drawn=3), range(8)).mined.any()


@pytest.mark.long
def test_a_killed_run_resumes_bit_for_bit_across_searches(finished: Path, tmp_path: Path) -> None:
    class Dies(Display):
        def step(self, line: dict[str, Any]) -> None:
            if line["step"] == 5:
                raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        run(RECIPE, tmp_path, progress=Dies())
    run(None, tmp_path, resume=True, progress="none")
    names = ("step", "loss", "grad_norm", "false_write_share")
    assert logged(tmp_path, *names) == logged(finished, *names)
    weights, expected = (load_run(folder)[0].state_dict() for folder in (tmp_path, finished))
    assert all(torch.equal(weights[name], weight) for name, weight in expected.items())


def test_a_step_in_parts_is_that_of_the_whole_batch(task: MemoryTask, model: Any) -> None:
    losses, gradients = [], []
    model.recurrent.update.noise = 0.0
    for accumulation in (1, 3):
        train = {**RECIPE["train"], "short_segments": (), "accumulation": accumulation}
        source = MemorySource(model, task, MemoryCurriculumConfig(**train), Group())
        source.stages.penalty = 1.0
        model.zero_grad()
        batch = source.draw(next(step for step in range(0, 100, 3) if source.plan(step).drawn == 3))
        assert len(batch.parts) == accumulation
        model.train()
        totals = [source.loss(part).total for part in batch.parts]
        torch.stack(totals).sum().backward()
        losses.append(torch.stack(totals).sum().item())
        gradients.append(model.recurrent.update.gate.grad.clone())
        assert batch.parts[0].totals["mined"] > 0
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)


def test_settings_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    memory = {**RECIPE["model"]["memory"], "update": "paper"}
    with pytest.raises(ConfigError, match=r"train.mine_every = 3: the memory of this model has no gates"):
        run({**RECIPE, "model": {**RECIPE["model"], "memory": memory}}, tmp_path, progress="none")
    for name, value in (("mine_every", -1), ("mine_hardest", 0), ("mine_share", 1.5)):
        with pytest.raises(ConfigError, match=rf"train.{name} = {value}: must be"):
            resolve({**RECIPE, "train": {**RECIPE["train"], name: value}})
