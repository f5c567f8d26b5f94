"""Facts about runs and transfers, read without their weights."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from longspan.errors import CheckpointError
from longspan.train import read_log, run
from longspan.train.checkpoint import list_checkpoints
from longspan.train.lock import is_locked, reserved
from longspan.train.run_summary import RunSummary, read_summaries, summarize_runs


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """A finished run of 6 steps with checkpoints and evaluations."""
    recipe = {
        "model": {"dim": 16, "num_layers": 2, "num_heads": 2, "mixers": [{"name": "window", "window": 12}]},
        "task": {"name": "text", "source": str(corpus)},
        "train": {"steps": 6, "lanes": 2, "segment_length": 8, "log_every": 2, "eval_every": 2, "eval_tokens": 50}
        | {"checkpoint_every": 2, "threads": 1},
    }
    return run(recipe, tmp_path_factory.mktemp("runs") / "trained", progress="none").folder


@pytest.fixture
def copied(trained: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(trained, tmp_path / "copied"))


def summary(folder: Path) -> RunSummary:
    (only,) = read_summaries(folder)
    return only


def write(path: Path, data: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = data if isinstance(data, list) else [data]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_finished_run(trained: Path, corpus: Path) -> None:
    facts = summary(trained)
    lines = read_log(trained / "log.jsonl")
    losses = [line["validation"]["bits_per_byte"] for line in lines if "validation" in line]
    assert (facts.state, facts.problem) == ("finished", "")
    assert (facts.task, facts.corpus) == ("text", str(corpus))
    assert (facts.mechanism, facts.num_layers, facts.dim) == ("window", 2, 16)
    assert (facts.step, facts.planned_steps, facts.planned_minutes) == (6, 6, None)
    assert facts.tokens == lines[-1]["tokens"] > 0
    assert (facts.best_loss, facts.last_loss, facts.loss_unit) == (min(losses), losses[-1], "bits per byte")
    assert len(losses) == 3
    assert facts.seconds == lines[-1]["seconds"]
    assert json.loads(json.dumps(facts.plain()))["changed"] == facts.changed.isoformat(timespec="seconds")


def test_weights_are_not_read(copied: Path) -> None:
    before = summary(copied)
    for path in copied.rglob("*.safetensors"):
        path.write_bytes(b"")
    assert summary(copied) == before


def test_a_run_is_interrupted_until_its_final_evaluation(copied: Path) -> None:
    log = copied / "log.jsonl"
    log.write_text("\n".join(log.read_text().splitlines()[:-1]) + "\n")
    assert summary(copied).state == "interrupted"
    shutil.rmtree(copied / "model")
    log.unlink()
    facts = summary(copied)
    # the newest checkpoint is further than the log
    assert (facts.state, facts.step, facts.last_loss, facts.loss_unit) == ("interrupted", 6, None, "")
    assert facts.tokens
    assert facts.tokens > 0


def test_a_locked_run_is_running(copied: Path) -> None:
    with reserved(copied, resume=True) as start:
        start.begun = True
        assert is_locked(copied)
        assert summary(copied).state == "running"
        with pytest.raises(CheckpointError, match="another process is training"), reserved(copied, resume=True):
            pass
    assert not is_locked(copied)
    # a killed process leaves its file, which locks nothing
    (copied / ".lock").touch()
    assert summary(copied).state == "finished"


def test_a_training_starts_while_its_folder_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fcntl = pytest.importorskip("fcntl")
    (tmp_path / ".lock").touch()
    looking = open(tmp_path / ".lock")  # noqa: SIM115 - closed as soon as the training waits
    fcntl.flock(looking, fcntl.LOCK_SH)
    monkeypatch.setattr("time.sleep", lambda seconds: looking.close())
    with reserved(tmp_path, resume=True):
        assert is_locked(tmp_path)


def damage_recipe(folder: Path) -> None:
    (folder / "recipe.json").write_text("{")


def change_recipe(folder: Path) -> None:
    path = folder / "recipe.json"
    path.write_text(path.read_text().replace('"dim": 16', '"dim": 32'))


def remove_recipe(folder: Path) -> None:
    (folder / "recipe.json").unlink()
    (folder / "digests.json").unlink()


def remove_weights(folder: Path) -> None:
    (folder / "model/model.safetensors").unlink()


def damage_checkpoints(folder: Path) -> None:
    shutil.rmtree(folder / "model")
    newest, older = list_checkpoints(folder / "checkpoints")
    (newest / "meta.json").write_text((newest / "meta.json").read_text().replace('"step": 6', '"step": 7'))
    (older / "training.safetensors").unlink()


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (damage_recipe, "recipe.json: damaged"),
        (change_recipe, "recipe.json: damaged (its digest does not match)"),
        (remove_recipe, "recipe.json is missing"),
        (remove_weights, "model/model.safetensors: missing"),
        (damage_checkpoints, "step-00000006/meta.json: damaged (its digest does not match)"),
    ],
)
def test_a_damaged_run_says_why(copied: Path, damage: Any, problem: str) -> None:
    damage(copied)
    facts = summary(copied)
    assert facts.state == "damaged"
    assert problem in facts.problem


def test_an_older_checkpoint_is_enough_to_resume(copied: Path) -> None:
    damage_checkpoints(copied)
    (list_checkpoints(copied / "checkpoints")[1] / "training.safetensors").touch()
    assert summary(copied).state == "interrupted"


MODEL = {"kind": "decoder", "dim": 8, "num_layers": 3, "mixers": [{"name": "window"}, {"name": "heads"}]}


@pytest.mark.parametrize(
    ("model", "mechanism"),
    [
        (MODEL, "window + mixed_heads"),
        ({**MODEL, "memory": {"per_layer": False}}, "recurrent memory over window + mixed_heads"),
        ({**MODEL, "memory": {"per_layer": True}}, "memory per layer over window + mixed_heads"),
        ({"kind": "pretrained", "source": "gone"}, "unknown, pretrained"),
    ],
)
def test_mechanisms(tmp_path: Path, model: Mapping[str, Any], mechanism: str) -> None:
    write(tmp_path / "recipe.json", {"model": model, "task": {"name": "memory", "kind": "detect"}, "train": {}})
    facts = summary(tmp_path)
    assert (facts.mechanism, facts.corpus) == (mechanism, "detect")


def test_a_curriculum_has_no_held_out_loss(tmp_path: Path) -> None:
    train = {"steps": None, "minutes": 5.5, "max_segments": 5}
    write(tmp_path / "recipe.json", {"model": MODEL, "task": {"name": "memory"}, "train": train})
    write(tmp_path / "log.jsonl", [{"step": 3, "loss": 1.0, "tokens": 70, "seconds": 330.0}])
    (tmp_path / "model").mkdir()
    facts = summary(tmp_path)
    assert (facts.state, facts.step, facts.planned_steps, facts.planned_minutes) == ("finished", 3, None, 5.5)
    assert (facts.tokens, facts.seconds, facts.best_loss) == (70, 330.0, None)


def test_the_steps_of_stages_are_planned(tmp_path: Path) -> None:
    train = {"steps": None, "minutes": None, "stages": [{"steps": 30}, {"steps": 12}]}
    write(tmp_path / "recipe.json", {"model": MODEL, "task": {"name": "text"}, "train": train})
    assert summary(tmp_path).planned_steps == 42


@pytest.mark.parametrize("odd", [7, "text", [1], {"a": {}}, None])
def test_files_of_other_content_are_no_bugs(trained: Path, tmp_path: Path, odd: Any) -> None:
    for number, name in enumerate(("recipe.json", "digests.json", "log.jsonl", "model/digests.json")):
        folder = shutil.copytree(trained, tmp_path / str(number))
        write(folder / name, odd)
    write(tmp_path / "tables/recipe.json", {"model": {"mixers": odd}, "task": {"source": odd}, "train": {"steps": odd}})
    part = tmp_path / "out/transfer/layers-all"
    write(part / "settings.json", {"model": odd, "text": odd, "steps": odd, "batch": odd})
    write(part / "report.json", odd)
    write(part / "checkpoints/step-00000001/meta.json", {"position": odd, "files": odd})
    (tmp_path / "unreadable").mkdir(mode=0o000)
    assert len(summarize_runs(tmp_path)) == 6


def test_a_transfer(tmp_path: Path) -> None:
    part = tmp_path / "out/transfer/layers-0-1"
    config = {"n_layer": 4, "n_embd": 32, "longspan": [{"mixer": "gated_delta", "layers": [0, 1]}]}
    settings = {"model": str(tmp_path / "original"), "text": ["sotu", "books"], "to": "gated_delta", "steps": 6}
    write(part / "settings.json", {**settings, "distill": 2, "batch": 2, "length": 10})
    errors = [{"0": 0.4, "1": 0.2}, {"0": 0.1, "1": 0.2}, {"0": 0.1, "1": 0.4}]
    write(part / "log.jsonl", [{"step": 2 * n, "errors": error, "seconds": 9} for n, error in enumerate(errors, 1)])
    facts = summary(tmp_path / "out")
    assert (facts.state, facts.step, facts.planned_steps, facts.tokens) == ("interrupted", 6, 8, 120)
    assert (facts.task, facts.corpus) == ("transfer", "sotu, books")
    assert (facts.mechanism, facts.num_layers) == ("gated_delta in layers 0-1", None)
    assert (facts.best_loss, facts.last_loss) == pytest.approx((0.15, 0.25))
    assert facts.loss_unit == "relative error"
    write(tmp_path / "out/config.json", config)
    write(part / "report.json", {"seconds": 9})
    facts = summary(tmp_path / "out")
    assert (facts.state, facts.num_layers, facts.dim) == ("finished", 4, 32)
    with reserved(part, resume=True) as start:
        start.begun = True
        assert summary(tmp_path / "out").state == "running"
    (part / "report.json").write_text("{")
    assert summary(tmp_path / "out").state == "damaged"


def test_runs_below_a_folder_are_listed_once(trained: Path, tmp_path: Path) -> None:
    for name in ("b/deep/run", "a", ".hidden/run"):
        shutil.copytree(trained, tmp_path / name)
    # a run inside a run is not searched
    shutil.copytree(trained, tmp_path / "a/checkpoints/inner")
    (tmp_path / "again").symlink_to(tmp_path / "b", target_is_directory=True)
    (tmp_path / "b/around").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "outside").symlink_to(trained, target_is_directory=True)
    write(tmp_path / "cooking/recipe.json", {"flour": 500})
    paths = [str(facts.folder.relative_to(tmp_path)) for facts in summarize_runs(tmp_path)]
    assert paths == ["a", "again/deep/run", "outside"]
    assert summarize_runs(tmp_path / "cooking") == summarize_runs(tmp_path / "missing") == []
