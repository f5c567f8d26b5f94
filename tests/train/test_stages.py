"""Runs in stages: they switch at the step, resume bit for bit, and a run of one stage is a run without stages."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.train.conftest import Losses
from tests.train.test_distributed import figures, torchrun

from longspan.config import from_dict
from longspan.errors import ConfigError
from longspan.train import Display, StageConfig, TrainConfig, load_run, read_log, run
from longspan.train.document_source import DocumentPart, DocumentSource

STAGES = [
    {"steps": 7, "segment_length": 16, "lanes": 8, "sampling": "pieces"},
    {"steps": 6, "segment_length": 24, "lanes": 4, "bptt_segments": 2},
    {"segment_length": 40, "lanes": 2},
]


class Stop(Exception):
    """Raised to stop a run without saving."""


class StopsAt(Display):
    """Stops the run at a step."""

    def __init__(self, step: int) -> None:
        self.at = step

    def step(self, line: dict[str, Any]) -> None:
        if line["step"] == self.at and "loss" in line:
            raise Stop


@pytest.fixture
def staged(recipe: dict[str, Any]) -> dict[str, Any]:
    """A run of 20 steps in three stages, with checkpoints in the stages and at the first boundary."""
    recipe["train"] |= {"stages": copy.deepcopy(STAGES), "checkpoint_every": 7, "eval_every": 7}
    return recipe


def test_each_stage_reads_with_its_own_fields(
    staged: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[tuple[int, tuple[int, ...], bool]] = []
    loss = DocumentSource.loss

    def recorded(source: DocumentSource, part: DocumentPart) -> Any:
        segments = part.segments
        read.append((len(segments), tuple(segments[0].tokens.shape), source.carried[0] is not None))
        return loss(source, part)

    monkeypatch.setattr(DocumentSource, "loss", recorded)
    run(staged, tmp_path, progress="none")
    pieces, lanes, longer = (1, (8, 16), False), (2, (4, 24), True), (1, (2, 40), True)
    # the first step of a stage has no carried state
    assert read == [pieces] * 7 + [(*lanes[:2], False)] + [lanes] * 5 + [(*longer[:2], False)] + [longer] * 6
    lines = read_log(tmp_path / "log.jsonl")
    assert [line["stage"] for line in lines if "loss" in line] == [1] * 7 + [2] * 6 + [3] * 7
    assert [(line["step"], line["stage"]) for line in lines if "validation" in line] == [(7, 1), (14, 3), (20, 3)]


def test_the_learning_rate_follows_the_whole_run(staged: dict[str, Any], tmp_path: Path) -> None:
    run(staged, tmp_path / "staged", progress="none")
    del staged["train"]["stages"]
    run(staged, tmp_path / "plain", progress="none")
    assert figures(tmp_path / "staged", "lr") == figures(tmp_path / "plain", "lr")


def test_a_log_line_never_has_steps_of_two_stages(staged: dict[str, Any], tmp_path: Path) -> None:
    staged["train"]["log_every"] = 5
    run(staged, tmp_path, progress="none")
    lines = [line for line in read_log(tmp_path / "log.jsonl") if "loss" in line]
    assert [(line["step"], line["stage"]) for line in lines] == [(5, 1), (7, 1), (10, 2), (13, 2), (15, 3), (20, 3)]


# 7 is a checkpoint at a boundary; 9 and 16 resume from it and from 14, in another stage
@pytest.mark.parametrize(("every", "at"), [(7, 9), (7, 16), (5, 6), (6, 8), (3, 11)])
def test_resumed_stages_are_the_same_bit_for_bit(
    staged: dict[str, Any], tmp_path: Path, losses: Losses, every: int, at: int
) -> None:
    staged["train"]["checkpoint_every"] = every
    run(staged, tmp_path / "whole", progress="none")
    with pytest.raises(Stop):
        run(staged, tmp_path / "parts", progress=StopsAt(at))
    checkpoints = sorted((tmp_path / "parts" / "checkpoints").iterdir())
    step = (at - 1) // every * every
    assert checkpoints[-1].name == f"step-{step:08d}"
    # the stage of the last step: the switch is made by the first step of the next one
    position = json.loads((checkpoints[-1] / "meta.json").read_text())["position"]
    assert position["stage"] == (step > 7) + (step > 13)
    run(None, tmp_path / "parts", resume=True, progress="none")
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    uninterrupted, resumed = (torch.nn.Module.state_dict(load_run(tmp_path / name)[0]) for name in ("whole", "parts"))
    assert all(torch.equal(uninterrupted[name], resumed[name]) for name in uninterrupted)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        pytest.param({"sampling": "pieces"}, marks=pytest.mark.long),
        pytest.param({"bptt_segments": 2, "accumulation": 2}, marks=pytest.mark.long),
    ],
)
def test_one_stage_is_a_run_without_stages(
    recipe: dict[str, Any], tmp_path: Path, losses: Losses, fields: dict[str, Any]
) -> None:
    recipe["train"] |= fields
    run(recipe, tmp_path / "plain", progress="none")
    names = ("segment_length", "lanes", "sampling", "bptt_segments")
    stage = {name: recipe["train"].pop(name) for name in names if name in recipe["train"]}
    recipe["train"]["stages"] = [stage]
    run(recipe, tmp_path / "staged", progress="none")
    assert losses(tmp_path / "staged") == losses(tmp_path / "plain")
    recipe["train"]["stages"] = [stage | {"steps": recipe["train"].pop("steps")}]
    run(recipe, tmp_path / "counted", progress="none")
    assert losses(tmp_path / "counted") == losses(tmp_path / "plain")


def test_lanes_of_two_stages_read_in_different_orders(recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe["train"] |= {"lr": 0.0, "steps": 8, "stages": [{"steps": 4}, {}]}
    run(recipe, tmp_path, progress="none")
    first, second = (figures(tmp_path, "loss")[part] for part in (slice(4), slice(4, 8)))
    assert first != second


@pytest.mark.long
def test_two_processes_read_the_stages_of_one(staged: dict[str, Any], tmp_path: Path) -> None:
    staged["train"] |= {"steps": 12, "dtype": "float64", "final_eval_tokens": 500}
    staged["train"]["stages"][0]["steps"] = 4
    torchrun(tmp_path, staged)
    run(staged, tmp_path / "alone", progress="none")
    for figure in ("loss", "grad_norm"):
        assert figures(tmp_path / "0", figure) == pytest.approx(figures(tmp_path / "alone", figure), rel=1e-11)
    for name in ("tokens", "stage"):
        assert figures(tmp_path / "0", name) == figures(tmp_path / "alone", name)


def test_stages_set_the_length_of_a_run() -> None:
    stages = (StageConfig(steps=3), StageConfig(steps=4))
    assert TrainConfig(stages=stages).step_limit == 7
    assert TrainConfig(stages=stages, steps=20).step_limit == 20
    assert TrainConfig(stages=stages, minutes=1).step_limit is None
    assert TrainConfig(stages=(stages[0], StageConfig())).step_limit == 1000
    assert [TrainConfig(stages=stages).stage_at(step) for step in (0, 2, 3, 6, 20)] == [0, 0, 1, 1, 1]
    assert TrainConfig().stage_at(20) == 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"stages": []}, r"train.stages = \[\]: must have at least one stage"),
        (
            {"stages": [{"segment_lenght": 3}]},
            r"train.stages\[0\]: unknown field 'segment_lenght'; did you mean 'segment_length'",
        ),
        ({"stages": [{"steps": 3}, {}, {}]}, r"train.stages\[1\].steps: missing; only the last stage may leave it out"),
        ({"stages": [{"steps": 3}, {"lanes": 0}]}, r"train.stages\[1\].lanes = 0: must be at least 1"),
        (
            {"stages": [{"sampling": "random"}]},
            r"train.stages\[0\].sampling = 'random' is not one of 'lanes', 'pieces'",
        ),
        (
            {"bptt_segments": 2, "stages": [{"sampling": "pieces"}]},
            r"train.stages\[0\].bptt_segments = 2: must be 1 with sampling = 'pieces'",
        ),
        ({"bptt_segments": 2, "sampling": "pieces"}, r"train.bptt_segments = 2: must be 1 with sampling = 'pieces'"),
        (
            {"stages": [{"steps": 4000}, {}]},
            r"train.stages: the last stage begins after 4000 steps, but the run ends after 1000; set train.steps",
        ),
    ],
)
def test_mistakes_in_stages_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_dict(TrainConfig, fields, "train")


def test_lanes_of_every_stage_are_checked_at_the_start(staged: dict[str, Any], tmp_path: Path) -> None:
    staged["train"]["accumulation"] = 4
    with pytest.raises(ConfigError, match=r"train.stages\[2\].lanes = 2: must be a multiple of 1 processes x"):
        run(staged, tmp_path, progress="none")


def test_a_stage_may_set_what_train_does_not_allow_for_pieces() -> None:
    fields = {"bptt_segments": 2, "sampling": "pieces", "stages": [{"sampling": "lanes"}, {"bptt_segments": 1}]}
    fields["stages"][0]["steps"] = 3  # type: ignore[index]
    config = from_dict(TrainConfig, fields, "train")
    assert [(stage.sampling, stage.bptt_segments, stage.carries) for stage in config.stage_configs] == [
        ("lanes", 2, True),
        ("pieces", 1, False),
    ]
