"""Recurrent memory as a language model in the ordinary trainer, by a table `memory` in the model of the recipe."""

from pathlib import Path
from typing import Any

import pytest
import torch

import longspan as ls
from longspan.errors import ConfigError
from longspan.train import load_run, read_log, resolve, run


def recipe(tmp_path: Path, **memory: Any) -> dict[str, Any]:
    text = tmp_path / "text.txt"
    text.write_bytes(b"the people of this union, and their many states. " * 200)
    model = {"dim": 16, "num_layers": 2, "num_heads": 2, "mixers": [{"name": "full"}]}
    train = {"steps": 6, "lanes": 2, "segment_length": 32, "bptt_segments": 2, "log_every": 1, "checkpoint_every": 3}
    return {
        "model": {**model, "memory": {"num_memory_tokens": 2, "segment_length": 16, **memory}},
        "task": {"source": str(text)},
        "train": {**train, "eval_tokens": 500, "final_eval_tokens": 500},
    }


@pytest.mark.parametrize("memory", [{}, {"accumulate": True}, {"per_layer": True, "memory_dim": 4}, {"replay": True}])
def test_a_stopped_run_resumes_bit_for_bit(tmp_path: Path, memory: dict[str, Any]) -> None:
    whole = recipe(tmp_path, **memory)
    run(whole, tmp_path / "whole", progress="none")
    part = {**whole, "train": {**whole["train"], "warmup": 100, "steps": 3}}
    run({**whole, "train": {**whole["train"], "warmup": 100}}, tmp_path / "long", progress="none")
    run(part, tmp_path / "part", progress="none")
    run({"train": {"steps": 6}}, tmp_path / "part", resume=True, progress="none")
    # in the warm-up the learning rate does not depend on the number of steps
    models = [load_run(tmp_path / name)[0] for name in ("long", "part")]
    for (name, uninterrupted), resumed in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert torch.equal(uninterrupted, resumed), name
    losses = [line["loss"] for line in read_log(tmp_path / "whole" / "log.jsonl") if "loss" in line]
    assert len(losses) == 6
    assert losses[-1] < losses[0]


def test_a_trained_run_streams(tmp_path: Path) -> None:
    run(recipe(tmp_path), tmp_path / "run", progress="none")
    model, task = load_run(tmp_path / "run")
    assert isinstance(model, ls.RecurrentMemory)
    session = ls.StreamSession(model)
    session.feed(list(b"the people of this union"))
    assert len(session.generate(5)) == 5
    assert session.nbytes == model.state_nbytes(1, session.position)
    assert task.vocab_size == 256


def test_mistakes_in_a_model_table_are_named() -> None:
    with pytest.raises(ConfigError, match="did you mean 'encoder'"):
        resolve({"model": {"kind": "encodr"}})
    with pytest.raises(ConfigError, match="did you mean 'segment_length'"):
        resolve({"model": {"memory": {"segment_lenght": 3}}})
    with pytest.raises(ConfigError, match="needs a table"):
        resolve({"model": {"classes": 6}})
