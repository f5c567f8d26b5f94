"""Runs from recipe to model: the files that they leave, how they stop and resume, and their errors."""

import copy
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.train.conftest import Losses
from torch import Tensor

from longspan import train
from longspan.config import read_toml
from longspan.errors import CheckpointError, ConfigError, DataError
from longspan.models import Decoder
from longspan.train import Display, DivergedError, Result, load_run, read_log, run
from longspan.train.document_source import DocumentSource


class Recorder(Display):
    """Records what it is shown, and may call `action` at a step."""

    def __init__(self, at: int | None = None, action: Callable[[], None] | None = None) -> None:
        self.steps: list[dict[str, Any]] = []
        self.messages: list[str] = []
        self.at, self.action = at, action

    def step(self, line: dict[str, Any]) -> None:
        self.steps.append(line)
        if self.action is not None and line["step"] == self.at and "loss" in line:
            self.action()

    def message(self, text: str) -> None:
        self.messages.append(text)


class Stop(Exception):
    pass


def stop() -> None:
    raise Stop


@pytest.fixture
def whole(recipe: dict[str, Any], tmp_path: Path) -> Path:
    """A run that was never stopped."""
    run(recipe, tmp_path / "whole", progress="none")
    return tmp_path / "whole"


def changed(recipe: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """A copy of the recipe with other settings, as in `model__dim=8`."""
    altered = copy.deepcopy(recipe)
    for path, value in fields.items():
        table, name = path.split("__")
        altered[table][name] = value
    return altered


def test_a_run_leaves_everything_behind(recipe: dict[str, Any], tmp_path: Path) -> None:
    display = Recorder()
    finished = run(recipe, tmp_path, progress=display)
    assert (finished.step, finished.tokens, finished.interrupted) == (20, 20 * 4 * 16, False)
    assert {path.name for path in tmp_path.iterdir()} == {
        *("recipe.json", "log.jsonl", "tokenizer.json", "digests.json", "checkpoints", "model")
    }
    assert [path.name for path in sorted((tmp_path / "checkpoints").iterdir())] == ["step-00000015", "step-00000020"]
    assert {path.suffix for path in tmp_path.rglob("*") if path.is_file()} == {".json", ".jsonl", ".safetensors"}
    lines = read_log(tmp_path / "log.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 21))
    assert [line["step"] for line in lines if "validation" in line] == [8, 16, 20]
    assert lines[-1]["validation"] == finished.evaluation
    assert display.steps[-1]["fraction"] == 1
    assert "grows" not in " ".join(display.messages)
    first, last = lines[0], lines[-2]
    assert first["bits_per_byte"] == pytest.approx(8, abs=0.2)
    assert last["bits_per_byte"] < first["bits_per_byte"] - 0.2
    model, task = load_run(tmp_path)
    assert not model.training
    evaluation = train.evaluate_text(model, task.documents("validation"), chunk=16, batch=4)
    assert evaluation.summary() == finished.evaluation


def test_the_stored_recipe_makes_the_same_run(recipe: dict[str, Any], tmp_path: Path, losses: Losses) -> None:
    run(recipe, tmp_path / "first", progress="none")
    stored = json.loads((tmp_path / "first" / "recipe.json").read_text())
    run(stored, tmp_path / "second", progress="none")
    assert losses(tmp_path / "first") == losses(tmp_path / "second")


def test_a_run_leaves_the_random_state_and_threads_of_the_caller(recipe: dict[str, Any], tmp_path: Path) -> None:
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    run(changed(recipe, train__steps=2), tmp_path, progress="none")
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(
    ("fields", "at"),
    [
        ({}, 13),
        ({"model__dropout": 0.2, "train__log_every": 3}, 12),
        ({"train__bptt_segments": 2, "train__accumulation": 2}, 5),
        pytest.param({"model__mixers": [{"name": "full"}], "train__lanes": 3}, 9, marks=pytest.mark.long),
        ({"task__tokenizer": "subword", "task__vocab_size": 300, "train__carry": False}, 7),
        ({"train__dtype": "bfloat16"}, 17),
        pytest.param(
            {"model__mixers": [{"name": "transformer_xl", "segment": 12, "mem_len": 12}], "model__positions": "none"},
            11,
            marks=pytest.mark.long,
        ),
        (
            {
                "model__mixers": [
                    {"name": "compressive", "segment": 12, "mem_len": 7, "compressed_len": 5, "ratio": 3}
                ],
                "model__positions": "none",
                "train__segment_length": 10,
            },
            11,
        ),
        ({"model__mixers": [{"name": "routing", "num_clusters": 4, "window": 8, "decay": 0.9}]}, 8),
    ],
)
def test_resumed_runs_are_the_same_bit_for_bit(
    recipe: dict[str, Any], tmp_path: Path, losses: Losses, fields: dict[str, Any], at: int
) -> None:
    recipe = changed(recipe, **fields)
    run(recipe, tmp_path / "whole", progress="none")
    while not (tmp_path / "parts" / "recipe.json").exists() or not (tmp_path / "parts" / "model").exists():
        resume = (tmp_path / "parts" / "recipe.json").exists()
        try:
            run(recipe, tmp_path / "parts", resume=resume, progress=Recorder(None if resume else at, stop))
        except Stop:
            assert not resume
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    uninterrupted, resumed = (torch.nn.Module.state_dict(load_run(tmp_path / name)[0]) for name in ("whole", "parts"))
    assert all(torch.equal(uninterrupted[name], resumed[name]) for name in uninterrupted)


def test_ctrl_c_saves_and_resumes(recipe: dict[str, Any], tmp_path: Path, losses: Losses, whole: Path) -> None:
    display = Recorder(7, lambda: os.kill(os.getpid(), signal.SIGINT))
    before = signal.getsignal(signal.SIGINT)
    stopped = run(recipe, tmp_path / "parts", progress=display)
    assert signal.getsignal(signal.SIGINT) is before
    assert (stopped.interrupted, stopped.step, stopped.evaluation) == (True, 7, None)
    assert display.messages[0] == "stopping after this step; interrupt again to stop at once without saving"
    assert display.messages[1].startswith("stopped at step 7, saved in ")
    assert not (tmp_path / "parts" / "model").exists()
    assert load_run(tmp_path / "parts")[0].config.dim == 16
    assert not run(None, tmp_path / "parts", resume=True, progress="none").interrupted
    assert losses(tmp_path / "parts") == losses(whole)


def test_a_second_ctrl_c_stops_at_once(recipe: dict[str, Any], tmp_path: Path) -> None:
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.05)  # two signals at once may arrive as one
        os.kill(os.getpid(), signal.SIGINT)

    # shells start background jobs with this signal ignored
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            run(recipe, tmp_path, progress=Recorder(7, twice))
    finally:
        signal.signal(signal.SIGINT, before)
    assert not (tmp_path / "checkpoints" / "step-00000007").exists()


def test_half_written_files_of_a_killed_run_are_cleared(recipe: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / ".step-00000003.tmp").mkdir(parents=True)
    (tmp_path / ".log.jsonl.77.tmp").touch()
    run(changed(recipe, train__steps=1), tmp_path, progress="none")
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_finished_run_stays_finished_and_can_be_lengthened(recipe: dict[str, Any], whole: Path) -> None:
    before = read_log(whole / "log.jsonl")
    finished = run(recipe, whole, resume=True, progress="none")
    assert (finished.step, finished.evaluation) == (20, before[-1]["validation"])
    assert read_log(whole / "log.jsonl") == before
    finished = run({"train": {"steps": 24}}, whole, resume=True, progress="none")
    assert finished.step == 24
    assert read_log(whole / "log.jsonl")[: len(before)] == before
    assert json.loads((whole / "recipe.json").read_text())["train"]["steps"] == 24


def test_a_time_limited_run_ends_in_time_and_can_be_lengthened(recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe = changed(recipe, train__steps=None, train__minutes=0.01)
    shorter = run(recipe, tmp_path, progress="none")
    assert 0.6 <= shorter.seconds < 5
    lines = [line for line in read_log(tmp_path / "log.jsonl") if "loss" in line]
    assert lines[-1]["lr"] < 0.2e-3 < lines[4]["lr"]
    longer = run({"train": {"minutes": 0.015}}, tmp_path, resume=True, progress="none")
    assert longer.step > shorter.step
    assert longer.seconds >= 0.9


def test_a_damaged_checkpoint_is_named_and_the_earlier_one_taken(
    recipe: dict[str, Any], whole: Path, losses: Losses
) -> None:
    expected = losses(whole)
    newest = whole / "checkpoints" / "step-00000020"
    data = bytearray((newest / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (newest / "model.safetensors").write_bytes(data)
    display = Recorder()
    run(None, whole, resume=True, progress=display)
    (message,) = display.messages
    damaged = "step-00000020/model.safetensors: damaged"
    assert damaged in message
    assert "continuing from" in message
    assert message.endswith("step-00000015")
    assert losses(whole) == expected
    assert load_run(whole)


@pytest.mark.parametrize("damage", ["meta.json", "training.safetensors", "state-0000.safetensors", "config.json"])
def test_a_run_without_a_sound_checkpoint_is_refused(whole: Path, damage: str) -> None:
    for path in (whole / "checkpoints").iterdir():
        (path / damage).write_bytes(b"")
    shutil.rmtree(whole / "model")
    with pytest.raises(CheckpointError, match=rf"{damage}: damaged.*; no checkpoint of this run can be loaded$"):
        run(None, whole, resume=True, progress="none")
    with pytest.raises(CheckpointError, match=damage):
        load_run(whole)


def test_a_token_cache_changes_nothing(recipe: dict[str, Any], tmp_path: Path, losses: Losses, whole: Path) -> None:
    cached = changed(recipe, task__cache=str(tmp_path / "cache"))
    run(cached, tmp_path / "part", progress=Recorder(7, lambda: signal.raise_signal(signal.SIGINT)))
    assert len(list((tmp_path / "cache").iterdir())) == 2
    run(None, tmp_path / "part", resume=True, progress="none")
    assert losses(tmp_path / "part") == losses(whole)
    # a run resumes with the cache or without it
    run(changed(recipe, task__cache=""), tmp_path / "part", resume=True, progress="none")


def test_a_kill_before_the_first_checkpoint_loses_nothing_that_was_saved(
    recipe: dict[str, Any], tmp_path: Path, whole: Path, losses: Losses
) -> None:
    for resume in (True, False):
        with pytest.raises(Stop):
            run(recipe, tmp_path / "parts", progress=Recorder(2, stop))
        with pytest.raises(CheckpointError, match="this run has no checkpoint yet"):
            load_run(tmp_path / "parts")
        run(recipe, tmp_path / "parts", resume=resume, progress="none")
        assert losses(tmp_path / "parts") == losses(whole)
        shutil.rmtree(tmp_path / "parts")


def test_a_run_is_neither_overwritten_nor_invented(recipe: dict[str, Any], whole: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="whole: contains a run already; resume it, or choose another folder"):
        run(recipe, whole, progress="none")
    for call in (lambda: run(recipe, tmp_path / "typo", resume=True), lambda: load_run(tmp_path / "typo")):
        with pytest.raises(CheckpointError, match=r"typo: not a run \(recipe.json is missing\)"):
            call()


def test_a_resumed_run_keeps_its_settings(recipe: dict[str, Any], whole: Path) -> None:
    for altered, message in (
        (changed(recipe, train__lr=0.5), r"train.lr = 0.5, but the run in .* began with 0.001; resume with that value"),
        (changed(recipe, model__dim=8), r"model.dim = 8, but the run in .* began with 16"),
        (changed(recipe, task__pattern="*"), r"task.pattern = '\*', but"),
    ):
        with pytest.raises(ConfigError, match=message):
            run(altered, whole, resume=True, progress="none")
    stored = json.loads((whole / "recipe.json").read_text())
    del stored["train"]["eps"]
    (whole / "digests.json").unlink()  # older versions wrote none
    (whole / "recipe.json").write_text(json.dumps(stored))
    run(changed(recipe, train__log_every=5, train__keep=1, train__accumulation=1), whole, resume=True, progress="none")
    with pytest.raises(
        CheckpointError, match=r"saved with 1 groups of lanes .*, but this run has 2; resume with the same product"
    ):
        run({"train": {"accumulation": 2}}, whole, resume=True, progress="none")


def test_other_data_is_refused(recipe: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    for name in "ab":
        (tmp_path / "text" / f"{name}.txt").write_text(name * 900)
    recipe = changed(recipe, task__source=str(tmp_path / "text"), train__steps=2)
    run(recipe, tmp_path / "run", progress="none")
    (tmp_path / "text" / "b.txt").write_text("c" * 900)
    with pytest.raises(CheckpointError, match="the training data differs from that of the checkpoint"):
        run({"train": {"steps": 4}}, tmp_path / "run", resume=True, progress="none")
    assert (tmp_path / "run" / "model").exists()


def test_a_diverging_run_stops_and_says_what_to_try(recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe = changed(recipe, train__lr=1e30, train__warmup=0, train__clip=0.0)
    with pytest.raises(DivergedError, match=r"of step \d .*; there is no earlier checkpoint; try a lower train.lr"):
        run(recipe, tmp_path, progress="none")


def test_a_nan_leaves_the_last_good_checkpoint(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Path, losses: Losses
) -> None:
    calls: list[int] = []

    def broken(logits: Tensor, targets: Tensor, graded: Tensor | None) -> Tensor:
        calls.append(1)
        loss = train.next_token_loss(logits, targets, graded)
        return loss * float("nan") if len(calls) == 8 else loss

    with monkeypatch.context() as patch:
        patch.setattr("longspan.train.document_source.next_token_loss", broken)
        with pytest.raises(
            DivergedError,
            match=r"the loss of step 8 is nan, not a finite number; the last good checkpoint is .*00000005;",
        ):
            run(recipe, tmp_path / "parts", progress="none")
    run(recipe, tmp_path / "parts", resume=True, progress="none")
    assert losses(tmp_path / "parts") == losses(whole)


def test_parameters_that_are_not_finite_are_not_saved(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(self: Any, step: int, generator: torch.Generator | None = None) -> None:
        if step == 10:
            self.norm.weight.data.fill_(float("inf"))

    monkeypatch.setattr("longspan.models.Decoder.after_step", spoil)
    with pytest.raises(DivergedError, match=r"the parameters after step 10 are not finite; the last good .*00000005;"):
        run(recipe, tmp_path, progress="none")
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000005"]


def test_states_are_dropped_where_projections_were_redrawn(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []
    monkeypatch.setattr(Decoder, "redraw_count", property(lambda self: self.__dict__.get("drawn", 0)))
    monkeypatch.setattr(
        "longspan.models.Decoder.after_step",
        lambda self, step, generator: self.__dict__.update(drawn=step // 3),
    )
    loss = DocumentSource.loss

    def watch(self: DocumentSource, part: Any) -> Any:
        seen.append(self.carried[0] is None)
        return loss(self, part)

    monkeypatch.setattr(DocumentSource, "loss", watch)
    run(changed(recipe, train__steps=8), tmp_path, progress="none")
    assert seen == [True, False, False, True, False, False, True, False]


def test_accumulation_changes_memory_but_no_loss(recipe: dict[str, Any], tmp_path: Path) -> None:
    losses_by_parts = []
    for parts in (1, 2, 4):
        folder = tmp_path / str(parts)
        run(changed(recipe, train__accumulation=parts, train__dtype="float64"), folder, progress="none")
        losses_by_parts.append([line["loss"] for line in read_log(folder / "log.jsonl") if "loss" in line])
    assert losses_by_parts[0] == pytest.approx(losses_by_parts[1], rel=1e-10)
    assert losses_by_parts[0] == pytest.approx(losses_by_parts[2], rel=1e-10)


def test_two_short_segments_in_one_graph_are_one_long_one(recipe: dict[str, Any], tmp_path: Path) -> None:
    losses_by_length = []
    for segments, length in ((1, 32), (2, 16), (4, 8)):
        folder = tmp_path / str(length)
        settings = {"train__bptt_segments": segments, "train__segment_length": length, "train__dtype": "float64"}
        run(changed(recipe, **settings), folder, progress="none")
        losses_by_length.append([line["loss"] for line in read_log(folder / "log.jsonl") if "loss" in line])
    assert losses_by_length[0] == pytest.approx(losses_by_length[1], rel=1e-9)
    assert losses_by_length[0] == pytest.approx(losses_by_length[2], rel=1e-9)


def test_penalties_are_added_to_the_loss(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = Decoder.forward

    def with_penalty(self: Any, *args: Any, aux_losses: list[Tensor] | None = None, **kwargs: Any) -> Any:
        if aux_losses is not None:
            aux_losses.append(1e3 * self.embedding.weight.square().mean())
        return forward(self, *args, aux_losses=aux_losses, **kwargs)

    monkeypatch.setattr("longspan.models.Decoder.forward", with_penalty)
    norms = []
    for segments, length in ((1, 32), (2, 16)):
        settings = {"train__bptt_segments": segments, "train__segment_length": length, "train__dtype": "float64"}
        run(changed(recipe, **settings), tmp_path / str(length), progress="none")
        norms.append([line["grad_norm"] for line in read_log(tmp_path / str(length) / "log.jsonl") if "loss" in line])
    assert norms[0] == pytest.approx(norms[1], rel=1e-9)
    assert load_run(tmp_path / "32")[0].embedding.weight.square().mean() < 0.02**2


def test_a_growing_state_is_announced(recipe: dict[str, Any], tmp_path: Path) -> None:
    display = Recorder()
    run(changed(recipe, model__mixers=[{"name": "full"}], train__steps=1), tmp_path, progress=display)
    assert display.messages == [
        "the state of this model grows with the length of documents; set train.carry = false to start each segment "
        "from an empty state"
    ]


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        (
            {"model__vocab_size": 100},
            ConfigError,
            "model.vocab_size = 100: the task has 256 token ids; leave it out",
        ),
        ({"task__source": "nowhere.txt"}, DataError, "nowhere.txt: no such file or folder"),
        ({"train__device": "tpu"}, ConfigError, "train.device = 'tpu'"),
        ({"model__layers": 3}, ConfigError, "model: unknown field 'layers'"),
        ({"model__mixers": [{"name": "windw"}]}, ConfigError, "did you mean 'window'"),
        ({"train__lanes": 0}, ConfigError, "train.lanes = 0: must be at least 1"),
        (
            {"train__accumulation": 3},
            ConfigError,
            "lanes = 4: must be a multiple of 1 processes x train.accumulation = 3",
        ),
    ],
)
def test_mistakes_in_a_recipe_are_named(
    recipe: dict[str, Any], tmp_path: Path, fields: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        run(changed(recipe, **fields), tmp_path / "run", progress="none")
    run(changed(recipe, train__steps=1), tmp_path / "run", progress="none")


def test_a_run_outside_the_main_thread_has_no_signals_to_catch(recipe: dict[str, Any], tmp_path: Path) -> None:
    runs: list[Result] = []
    thread = threading.Thread(
        target=lambda: runs.append(run(changed(recipe, train__steps=2), tmp_path, progress="none"))
    )
    thread.start()
    thread.join()
    assert runs[0].step == 2


def test_unknown_tables_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="recipe: unknown table 'tain'; did you mean 'train'"):
        run({"tain": {}}, tmp_path)
    with pytest.raises(ConfigError, match=r"recipe.train: expected a table of fields, got 3"):
        run({"train": 3}, tmp_path)
    with pytest.raises(ConfigError, match="progress = 'loud': must be one of"):
        run({}, tmp_path, progress="loud")


def test_the_recipes_of_the_repository_are_sound(request: pytest.FixtureRequest) -> None:
    for path in sorted((request.config.rootpath / "recipes").glob("*.toml")):
        recipe = read_toml(path)
        if "transfer" in recipe:
            pytest.importorskip("transformers")
            from longspan.train.transfer_recipe import resolve_transfer

            assert resolve_transfer(recipe).settings.to, path
        else:
            assert train.resolve(recipe)["about"], path
