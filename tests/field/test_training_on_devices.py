"""The library's own trainers on a device that is no CPU: the same figures, saved and resumed."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.emulated_device import emulated
from tests.field.models import FIELDS

from longspan.models import build_model
from longspan.tasks import MemoryConfig, MemoryTask
from longspan.tasks.synthetic import CopyConfig, CopyTask, PasskeyConfig, PasskeyTask
from longspan.train import (
    Display,
    MemoryCurriculumConfig,
    PasskeyCurriculumConfig,
    Trainer,
    evaluate_memory,
    evaluate_passkey,
    read_log,
    run,
)
from longspan.train.copy_curriculum import CopyCurriculumConfig
from longspan.train.distributed import Group

LONG = pytest.mark.long
TEXT = "we the people of a more perfect union establish justice and so on and on. "


def recipe(source: Path, name: str, **fields: Any) -> dict[str, Any]:
    """Three steps that carry states, evaluate on the way and at the end, and save."""
    for index in range(4):
        (source / f"{index}.txt").write_text(TEXT[index:] * 3)
    train = {"steps": 3, "lanes": 2, "segment_length": 8, "accumulation": 2, "log_every": 1, "eval_every": 2}
    train |= {"eval_tokens": 40, "final_eval_tokens": 40, "checkpoint_every": 2, "threads": 1}
    return {
        "model": {"dim": 16, "num_layers": 1, "num_heads": 2, "mixers": [{"name": name, **FIELDS[name]}]},
        "task": {"name": "text", "source": str(source)},
        "train": train | fields,
    }


def figures(folder: Path) -> list[dict[str, Any]]:
    """The lines of a log without their times."""
    clocks = ("seconds", "memory", "tokens_per_second")
    return [{key: value for key, value in line.items() if key not in clocks} for line in read_log(folder / "log.jsonl")]


def close(actual: Any, expected: Any) -> None:
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys()
        for key in expected:
            if key not in ("seconds", "tokens_per_second", "bytes_per_second"):
                close(actual[key], expected[key])
    elif isinstance(expected, list):
        for mine, theirs in zip(actual, expected, strict=True):
            close(mine, theirs)
    elif isinstance(expected, float):
        assert actual == pytest.approx(expected, rel=1e-3, abs=1e-4)
    else:
        assert actual == expected


NAMES = ["window", "linear", *(pytest.param(name, marks=LONG) for name in ("performer", "lsh", "routing", "infini"))]


@pytest.mark.parametrize("name", NAMES)
def test_a_run_on_a_device_equals_that_on_the_cpu_and_resumes(name: str, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    fields = {"loss_chunk": 4} if name == "linear" else {}
    run(recipe(corpus, name, device="cpu", **fields), tmp_path / "cpu", progress="none")
    with emulated(float64=False) as device:
        there = recipe(corpus, name, device=device.device.type, **fields)
        run(there, tmp_path / "device", progress="none")
        close(figures(tmp_path / "device"), figures(tmp_path / "cpu"))
        there["train"]["steps"] = 4
        assert run(there, tmp_path / "device", resume=True, progress="none").step == 4


SIZES = {"dim": 16, "num_layers": 1, "num_heads": 2}
SMALL: dict[str, Any] = {"lr": 1e-3, "log_every": 1, "checkpoint_every": 1}


Make = Callable[[Path, torch.device], Trainer]


def trainer_of(model: Any, task: Any, config: Any, folder: Path, device: torch.device) -> Trainer:
    return Trainer(model.to(device), task, config, folder, group=Group(device=device), display=Display())


def copying(folder: Path, device: torch.device) -> Trainer:
    task = CopyTask(CopyConfig(word=7, symbols=7))
    model = build_model({**SIZES, "vocab_size": 8, "mixers": [{"name": "linear"}]})
    config = CopyCurriculumConfig(steps=2, rows=2, tokens=60, **SMALL)
    return trainer_of(model, task, config, folder, device)


def recall(folder: Path, device: torch.device) -> Trainer:
    task = MemoryTask(MemoryConfig(vocab_size=512, segment_length=96))
    memory = {"num_memory_tokens": 2, "segment_length": 96, "gate_noise": 0.0}
    model = build_model({**SIZES, "vocab_size": 512, "kind": "encoder", "classes": 6, "memory": memory})
    config = MemoryCurriculumConfig(steps=2, tokens=400, short_segments=(64,), **SMALL)
    task.prepare(folder)
    return trainer_of(model, task, config, folder, device)


def retrieval(folder: Path, device: torch.device) -> Trainer:
    task = PasskeyTask(PasskeyConfig(length=300))
    mixers = [{"name": "window", "window": 8}, {"name": "infini", "segment": 64}]
    model = build_model({**SIZES, "num_layers": 2, "vocab_size": 256, "mixers": mixers})
    config = PasskeyCurriculumConfig(steps=2, tokens=600, patience=1, mentions=0, first_length=300, repeats=9, **SMALL)
    task.prepare(folder)
    return trainer_of(model, task, config, folder, device)


@pytest.mark.parametrize("make", [copying, pytest.param(recall, marks=LONG), pytest.param(retrieval, marks=LONG)])
def test_a_curriculum_on_a_device_equals_that_on_the_cpu(make: Make, tmp_path: Path) -> None:
    for device_name in ("cpu", "device"):
        folder = tmp_path / device_name
        folder.mkdir()
        torch.manual_seed(0)
        with emulated(float64=False) if device_name == "device" else contextlib.nullcontext() as device:
            make(folder, torch.device("cpu") if device is None else device.device).fit()
    close(figures(tmp_path / "device"), figures(tmp_path / "cpu"))


@LONG
def test_answers_and_depths_are_read_on_the_device(tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    answers, depths = recall(tmp_path, cpu), retrieval(tmp_path, cpu)

    def read() -> tuple[list[bool], dict[int, list[bool]]]:
        right = evaluate_memory(answers.model, answers.task, segments=2, count=2, split="train")["detect"].right
        return right, evaluate_passkey(depths.model, depths.task, depths=(0, 100), count=1).contained

    expected = read()
    with emulated(float64=False) as device:
        answers.model.to(device.device)
        depths.model.to(device.device)
        assert read() == expected
