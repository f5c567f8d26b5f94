"""The curriculum of the task copy: batches, stages, and resumed runs."""

from pathlib import Path
from typing import Any

import pytest
import torch

from longspan.config import override
from longspan.errors import ConfigError
from longspan.tasks.synthetic import CopyConfig, CopyTask
from longspan.train import load_run, read_log, run
from longspan.train.copy_curriculum import CopyCurriculumConfig, Copying, draw_words

RECIPE: dict[str, Any] = {
    "model": {
        "dim": 32,
        "num_layers": 1,
        "num_heads": 2,
        "positions": "learned",
        "max_positions": 32,
        "mixers": [{"name": "lsh", "selection": "sorted", "bucket_size": 16, "num_buckets": 2, "num_hashes": 1}],
        "tie_embeddings": False,
    },
    "task": {"name": "copy", "word": 15, "symbols": 7},
    "train": {"curriculum": "copy", "first_word": 3, "growth": 2, "steps": 6, "log_every": 1, "warmup": 5},
}


def test_stages_are_longer_words() -> None:
    copying = Copying(CopyCurriculumConfig(window=2), 511)
    words = [copying.word]
    for right in (1.0, 0.5, 1.0, 1.0, 0.95, 0.9, 1.0, 1.0):
        copying.count(right, copying.config.accuracy)
        words.append(copying.word)
    assert words == [31, 31, 31, 31, 127, 127, 511, 511, 511]
    again = Copying(copying.config, 511)
    again.load_state_dict(copying.state_dict())
    assert again == copying
    assert Copying(CopyCurriculumConfig(), 7).word == 7


def test_a_step_reads_words_written_twice() -> None:
    task = CopyTask(CopyConfig(word=15, symbols=7))
    tokens = draw_words(task, 4, 5, (0, 1))
    assert tokens.shape == (4, 12)
    assert torch.equal(tokens[:, :6], tokens[:, 6:])
    assert not tokens[:, 0].any()
    assert bool((tokens[:, 1:6] > 0).all())
    assert not torch.equal(tokens, draw_words(task, 4, 5, (0, 2)))
    assert torch.equal(tokens, draw_words(task, 4, 5, (0, 1)))


@pytest.mark.long
def test_a_run_learns_and_resumes_where_it_stopped(tmp_path: Path) -> None:
    whole = override(RECIPE, "train.steps=150")
    run(whole, tmp_path / "whole", progress="none")
    lines = read_log(tmp_path / "whole" / "log.jsonl")
    assert lines[-1]["word"] == 15
    assert lines[-1]["accuracy"] > 0.9
    for steps in (3, 6):
        run(override(RECIPE, f"train.steps={steps}"), tmp_path / "parts", resume=steps == 6, progress="none")
    assert [line["step"] for line in read_log(tmp_path / "parts" / "log.jsonl")] == [1, 2, 3, 4, 5, 6]
    model, task = load_run(tmp_path / "parts")
    assert isinstance(task, CopyTask)
    assert task.config.word == 15
    assert model.traits.value_causal


def test_auxiliary_losses_are_learned_from(tmp_path: Path) -> None:
    spans = []
    for penalty in (0.0, 100.0):
        mixer = {"name": "adaptive_span", "max_span": 16, "ramp": 4, "penalty": penalty}
        recipe = override(RECIPE, "train.steps=3")
        recipe = {**recipe, "model": {**recipe["model"], "mixers": [mixer]}}
        run(recipe, tmp_path / str(penalty), progress="none")
        model, _ = load_run(tmp_path / str(penalty))
        spans.append(torch.cat([p.flatten() for n, p in model.named_parameters() if "core" in n]))
    assert not torch.equal(*spans)


def test_too_few_learned_positions_are_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"30 learned positions.*texts of 31"):
        run(override(RECIPE, "model.max_positions=30"), tmp_path, progress="none")


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="must be 'copy' for the task copy"):
        run(override(RECIPE, "train.curriculum=copying"), tmp_path)
    with pytest.raises(ConfigError, match="known: 'passkey' for passkey and needle, 'copy' for copy"):
        run(override(RECIPE, "train.curriculum=passkey"), tmp_path)
    with pytest.raises(ConfigError, match=r"needs model\.kind = 'decoder'"):
        run(override(RECIPE, "model.kind=encoder"), tmp_path)
    with pytest.raises(ConfigError, match=r"task\.name = 'associate'"):
        run({**RECIPE, "task": {"name": "associate"}}, tmp_path)
