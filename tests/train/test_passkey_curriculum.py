"""Training to find a pass key: the curriculum, resumption, heavier memories, and answers by depth."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from longspan import state as states
from longspan.errors import CheckpointError, ConfigError
from longspan.models import Decoder, DecoderConfig
from longspan.tasks.synthetic import HEAD, NeedleTask, PasskeyConfig, PasskeyTask
from longspan.train import PasskeyCurriculumConfig, evaluate_passkey, load_run, read_log, run
from longspan.train.passkey_curriculum import PasskeyCurriculum, PasskeySource, draw_texts, repeated
from longspan.train.passkey_evaluation import read

RECIPE: dict[str, Any] = {
    "model": {
        "dim": 16,
        "num_layers": 2,
        "num_heads": 2,
        "mixers": [{"name": "window", "window": 8}, {"name": "infini", "segment": 64}],
    },
    "task": {"name": "passkey", "length": 600},
    "train": {
        "curriculum": "passkey",
        "steps": 8,
        "tokens": 800,
        "patience": 1,
        "repeats": 20,
        "log_every": 1,
        "checkpoint_every": 3,
    },
}


def model_of(*mixers: dict[str, Any]) -> Decoder:
    torch.manual_seed(0)
    return Decoder(DecoderConfig(dim=16, num_layers=len(mixers), num_heads=2, mixers=mixers)).double()


def test_a_run_goes_through_its_stages_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    run(RECIPE, tmp_path / "whole", progress="none")
    lines = read_log(tmp_path / "whole" / "log.jsonl")
    stages = [(line["mentions"], line["length"], line["repeats"]) for line in lines]
    assert stages == [
        (2, 268, 1.0),
        (1, 268, 1.0),
        (0, 268, 1.0),
        (0, 402, 1.0),
        (0, 600, 1.0),
        (0, 600, 3.0),
        (0, 600, 9.0),
        (0, 600, 20.0),
    ], "patience = 1 ends a stage after every step"
    with pytest.raises(CheckpointError, match="resume it"):
        run(RECIPE, tmp_path / "whole", progress="none")

    plain, count = PasskeySource.loss, 0

    def dies(self: PasskeySource, part: Any) -> Any:
        nonlocal count
        count += 1
        if count == 8:
            raise KeyboardInterrupt
        return plain(self, part)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PasskeySource, "loss", dies)
        with pytest.raises(KeyboardInterrupt):
            run(RECIPE, tmp_path / "killed", progress="none")
    run(None, tmp_path / "killed", resume=True, progress="none")
    whole, killed = (load_run(tmp_path / name)[0].state_dict() for name in ("whole", "killed"))
    assert all(torch.equal(whole[name], killed[name]) for name in whole)


def test_a_stage_ends_when_it_is_learnt() -> None:
    stages = PasskeyCurriculum(PasskeyCurriculumConfig(window=3, mentions=1, repeats=5), 600)
    assert not any([stages.add(0.99), stages.add(0.5), stages.add(0.99), stages.add(0.99)])
    assert stages.add(0.99)
    assert stages.mentions == 0
    again = PasskeyCurriculum(PasskeyCurriculumConfig(window=3, mentions=1, repeats=5), 600)
    again.load_state_dict(stages.state_dict())
    assert again.state_dict() == stages.state_dict()
    for _ in range(9):
        stages.add(1.0)
    assert (stages.length, stages.repeats) == (600, 3.0)
    drawn = [stages.draw(step) for step in range(200)]
    assert {mentions for mentions, _, _ in drawn} == {0}
    assert all(268 <= length <= 600 and 1 <= repeats <= 3 for _, length, repeats in drawn)
    assert drawn == [stages.draw(step) for step in range(200)]


def test_a_heavier_memory_is_that_of_a_text_read_again() -> None:
    model = model_of({"name": "infini", "segment": 30}).eval()
    text = torch.randint(0, 256, (1, 60), generator=torch.Generator().manual_seed(0))
    _, once = model(text)
    _, thrice = model(text.repeat(1, 3))
    heavier = repeated(model, once, 3.0)
    torch.testing.assert_close(heavier.layers[0].values, thrice.layers[0].values, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(heavier.layers[0].keys, thrice.layers[0].keys, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "mixer", [{"name": "infini", "update": "delta"}, {"name": "infini", "normalizer": "gamma"}, {"name": "linear"}]
)
def test_memories_that_are_not_sums_cannot_be_made_heavier(mixer: dict[str, Any]) -> None:
    model = model_of(mixer)
    with pytest.raises(ConfigError, match=r"train\.repeats"):
        repeated(model, model.init_state(1), 2.0)


def test_texts_are_functions_of_the_seed_and_grade_every_mention() -> None:
    task = PasskeyTask(PasskeyConfig(length=2000))
    tokens, graded = draw_texts(task, 4, 600, 2, (0, 5))
    again, _ = draw_texts(task, 4, 600, 2, (0, 5))
    assert torch.equal(tokens, again)
    assert tokens.shape == (4, 601)
    for row in range(4):
        whole = bytes(tokens[row, 1:].tolist())
        assert whole.startswith(HEAD)
        number = whole[-5:]
        # twice in the text, twice in mentions, and in the answer; the first time it cannot be predicted
        assert whole.count(number) == 5
        assert int(graded[row].sum()) == 4 * 5
        assert bytes(tokens[row, 1:][graded[row]].tolist()) == number * 4
        assert not bool(graded[row, : whole.find(number) + 5].any())
    assert not draw_texts(task, 2, 300, 0, (0, 1))[0][:, 1:].eq(HEAD[5]).all()


@pytest.mark.parametrize("kind", [PasskeyTask, NeedleTask])
def test_answers_at_depths_equal_those_of_texts_read_whole(kind: type[PasskeyTask]) -> None:
    model = model_of({"name": "window", "window": 8}, {"name": "infini", "segment": 30}).eval()
    task = kind(PasskeyConfig(length=700, digits=3))
    said: list[Any] = []

    import longspan.train.passkey_evaluation as depths

    def record(number: list[int], answer: list[int]) -> tuple[float, bool]:
        said.append((number, answer))
        return 0.0, False

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(depths, "score", record)
        evaluation = evaluate_passkey(model, task, depths=(0, 40, 100), count=2, seed=4)
    assert {depth: len(answers) for depth, answers in evaluation.contained.items()} == {0: 2, 40: 2, 100: 2}
    expected = []
    samples = [task.parts(np.random.default_rng([4, index, 3]), "validation") for index in range(2)]
    for part in samples:
        for depth in (0, 40, 100):
            offset = part.place(depth)
            text = b"".join([part.head, part.filler[:offset], part.told, part.filler[offset:], part.asked])
            tokens = torch.tensor([[task.tokenizer.begin, *text]])
            assert tokens.shape[1] == 700 + 1 - 3
            for _ in range(3):
                tokens = torch.cat([tokens, model(tokens)[0][:, -1:].argmax(-1)], 1)
            expected.append((list(part.number), tokens[0, -3:].tolist()))
    assert sorted(map(str, said)) == sorted(map(str, expected))
    assert evaluation.state_bytes == model.state_nbytes(1, 700, torch.float64)


def test_reading_in_chunks_equals_reading_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of({"name": "infini", "segment": 32}).eval()
    monkeypatch.setattr("longspan.train.passkey_evaluation.CHUNK", 64)
    text = torch.randint(0, 256, (1, 300))
    cut = read(model, text[:, 50:], read(model, text[:, :50], model.init_state(1)))
    _, whole = model(text)
    for name, value in states.tensors(cut).items():
        torch.testing.assert_close(value, states.tensors(whole)[name], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": {**RECIPE["train"], "mentions": -1}}, "mentions"),
        ({"train": {**RECIPE["train"], "growth": 1.0}}, "more than 1"),
        ({"train": {**RECIPE["train"], "curriculum": "other"}}, "must be 'passkey' for this task"),
        ({"task": {"name": "copy"}}, "'passkey' for passkey and needle"),
        ({"model": {**RECIPE["model"], "kind": "encoder"}}, "decoder"),
    ],
)
def test_recipes_that_do_not_fit_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        run({**RECIPE, **change}, tmp_path, progress="none")
