"""Warm starts: which weights a new run takes from a run or a saved model, and what it says about them."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from longspan.errors import CheckpointError, ConfigError
from longspan.models import build_model, save_model
from longspan.tasks import TextTask
from longspan.train import Display, load_run, read_log, run
from longspan.train.checkpoint import list_checkpoints, read
from longspan.train.distributed import Group
from longspan.train.init import start_from, take_weights

TABLE = {"vocab_size": 256, "dim": 16, "num_layers": 2, "num_heads": 2}
CORE = "blocks.{}.mixer.core."


class Messages(Display):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def message(self, text: str) -> None:
        self.texts.append(text)


@pytest.fixture
def start(recipe: dict[str, Any], tmp_path: Path) -> Path:
    """A finished run of `full`."""
    recipe = copy.deepcopy(recipe)
    recipe["model"]["mixers"] = [{"name": "full"}]
    recipe["train"] |= {"lr": 1e-2, "seed": 5}
    run(recipe, tmp_path / "start", progress="none")
    return tmp_path / "start"


@pytest.fixture
def short(recipe: dict[str, Any], start: Path) -> dict[str, Any]:
    """A recipe of four steps that begins from `start`."""
    recipe["train"] |= {"steps": 4, "checkpoint_every": 2, "eval_every": 0, "init": str(start)}
    recipe["model"]["mixers"] = [{"name": "full"}]
    return recipe


def model_of(*mixers: dict[str, Any], seed: int = 0, **fields: Any) -> nn.Module:
    torch.manual_seed(seed)
    model: nn.Module = build_model({**TABLE, "mixers": list(mixers), **fields})
    return model


def named(*patterns: str) -> set[str]:
    """Names of both layers."""
    return {pattern.format(layer) for pattern in patterns for layer in range(2)}


def count(model: nn.Module, names: set[str]) -> int:
    return sum(parameter.numel() for name, parameter in model.named_parameters() if name in names)


RELATIVE = tuple(CORE + name for name in ("content_bias", "position_bias", "r_proj.weight"))
KEYS = "blocks.{}.mixer.projections.k_proj.weight"


@pytest.mark.parametrize(
    ("start_mixer", "mixer", "new", "left_over"),
    [
        ({"name": "full"}, {"name": "window", "window": 12}, (), ()),
        ({"name": "full"}, {"name": "infini", "segment": 8}, (CORE + "gate",), ()),
        ({"name": "full"}, {"name": "transformer_xl", "segment": 8, "mem_len": 8}, RELATIVE, ()),
        ({"name": "full"}, {"name": "adaptive_span"}, (CORE + "span",), ()),
        ({"name": "full"}, {"name": "lsh"}, (), (KEYS,)),
        ({"name": "lsh"}, {"name": "full"}, (KEYS,), ()),
        ({"name": "adaptive_span"}, {"name": "adaptive_span", "initial": 0.5}, (), ()),
        # one name and one shape, but not one meaning
        ({"name": "infini"}, {"name": "memorizing"}, (CORE + "gate", CORE + "log_scale"), (CORE + "gate",)),
        ({"name": "transformer_xl"}, {"name": "compressive"}, (CORE + "compressor.conv",), ()),
        (
            {"name": "infini"},
            {"name": "mixed_heads", "mixers": [{"name": "infini", "num_heads": 1}, {"name": "full", "num_heads": 1}]},
            (CORE + "parts.0.gate",),
            (CORE + "gate",),
        ),
    ],
)
def test_weights_of_one_name_shape_and_meaning_are_copied(
    start_mixer: dict[str, Any], mixer: dict[str, Any], new: tuple[str, ...], left_over: tuple[str, ...]
) -> None:
    start, model = model_of(start_mixer, seed=1), model_of(mixer)
    before = copy.deepcopy(model.state_dict())
    outcome = take_weights(model, start, "runs/start")
    assert (set(outcome.new), set(outcome.left_over)) == (named(*new), named(*left_over))
    assert set(outcome.taken) | set(outcome.new) == {name for name, _ in model.named_parameters()}
    assert outcome.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert outcome.taken_parameters == outcome.parameters - count(model, named(*new))
    after, given = model.state_dict(), start.state_dict()
    for name, value in after.items():
        # buffers are not taken
        assert torch.equal(value, given[name] if name in outcome.taken else before[name]), name


def test_the_summary_names_what_is_new_and_left_over() -> None:
    outcome = take_weights(model_of({"name": "infini"}), model_of({"name": "lsh"}), "runs/start")
    total = outcome.parameters
    assert outcome.message() == (
        f"started from runs/start: {total - 2 * (2 + 16 * 16):,} of {total:,} parameters taken (new: "
        "blocks.0-1.mixer.core.gate, blocks.0-1.mixer.projections.k_proj.weight)"
    )
    deeper = take_weights(model_of({"name": "full"}, num_layers=3), model_of({"name": "lsh"}), "runs/start")
    assert "(new: blocks.0-2.mixer.projections.k_proj.weight, blocks.2.mixer.projections.q_proj.weight, blocks.2." in (
        deeper.message()
    )
    assert deeper.message().endswith(" more, see init.json)")


@pytest.mark.parametrize(
    "mixer",
    [
        {"name": "full"},
        {"name": "window", "window": 64},
        {"name": "adaptive_span", "max_span": 64, "initial": 1.0},
        {"name": "sparse", "pattern": "fixed", "stride": 64},
    ],
)
def test_a_mechanism_that_sees_everything_starts_at_the_loss_of_its_start(
    short: dict[str, Any], start: Path, tmp_path: Path, mixer: dict[str, Any]
) -> None:
    short["train"]["steps"] = 1
    run(short, tmp_path / "same", progress="none")
    short["model"]["mixers"] = [mixer]
    run(short, tmp_path / "other", progress="none")
    short["train"]["init"] = ""
    run(short, tmp_path / "cold", progress="none")
    same, other, cold = (read_log(tmp_path / name / "log.jsonl")[0]["loss"] for name in ("same", "other", "cold"))
    assert other == pytest.approx(same, abs=1e-4)
    assert cold > same + 0.1


def test_a_run_takes_the_weights_and_writes_a_summary(short: dict[str, Any], start: Path, tmp_path: Path) -> None:
    short["model"]["mixers"] = [{"name": "infini", "segment": 8}]
    short["train"] |= {"steps": 0, "final_eval_tokens": 50}
    display = Messages()
    run(short, tmp_path / "run", progress=display)
    summary = json.loads((tmp_path / "run" / "init.json").read_text())
    model, given = load_run(tmp_path / "run")[0], load_run(start)[0].state_dict()
    assert all(torch.equal(model.state_dict()[name], given[name]) for name in summary["taken"])
    assert (summary["start"], set(summary["new"]), summary["left_over"]) == (str(start), named(CORE + "gate"), [])
    assert summary["parameters"] - summary["taken_parameters"] == 2 * 2
    assert [text for text in display.texts if text.startswith(f"started from {start}: ")] == [
        f"started from {start}: {summary['taken_parameters']:,} of {summary['parameters']:,} parameters taken "
        "(new: blocks.0-1.mixer.core.gate)"
    ]
    assert json.loads((tmp_path / "run" / "recipe.json").read_text())["train"]["init"] == str(start)


def test_a_saved_model_is_a_start_and_the_dtype_is_that_of_the_run(short: dict[str, Any], tmp_path: Path) -> None:
    saved = model_of({"name": "full"}, seed=3).double()
    with torch.no_grad():
        for parameter in saved.parameters():
            parameter.add_(1e-10)  # below the precision of float32
    save_model(saved, tmp_path / "saved")
    short["train"] |= {"init": str(tmp_path / "saved"), "dtype": "float64", "steps": 0}
    display = Messages()
    run(short, tmp_path / "run", progress=display)
    model = load_run(tmp_path / "run")[0]
    assert all(torch.equal(value, saved.state_dict()[name]) for name, value in model.state_dict().items())
    (line,) = (text for text in display.texts if text.startswith("started from"))
    assert line.endswith(" taken; a saved model has no tokenizer to compare, so check that token ids mean the same")


def test_the_start_changes_neither_the_data_nor_the_new_weights(
    short: dict[str, Any], start: Path, tmp_path: Path
) -> None:
    short["model"]["mixers"] = [{"name": "adaptive_span", "dynamic": True}]
    short["train"]["steps"] = 0
    run(short, tmp_path / "warm", progress="none")
    short["train"]["init"] = ""
    run(short, tmp_path / "cold", progress="none")
    warm, cold = (load_run(tmp_path / name)[0].state_dict() for name in ("warm", "cold"))
    new = json.loads((tmp_path / "warm" / "init.json").read_text())["new"]
    assert len(new) == 4
    assert all(torch.equal(warm[name], cold[name]) for name in new)
    assert not (tmp_path / "cold" / "init.json").exists()


def test_a_run_resumes_without_its_start(short: dict[str, Any], start: Path, tmp_path: Path) -> None:
    run(short, tmp_path / "whole", progress="none")
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    shutil.rmtree(tmp_path / "parts" / "model")
    last = list_checkpoints(tmp_path / "parts" / "checkpoints")[0]
    assert read(last).position.step == 4
    shutil.rmtree(last)
    shutil.rmtree(start)
    summary = (tmp_path / "parts" / "init.json").read_text()
    with pytest.raises(ConfigError, match=r"train.init = 'elsewhere', but the run in .* began with"):
        run({"train": {"init": "elsewhere"}}, tmp_path / "parts", resume=True, progress="none")
    display = Messages()
    run(short, tmp_path / "parts", resume=True, progress=display)
    assert not any("started from" in text for text in display.texts)
    assert (tmp_path / "parts" / "init.json").read_text() == summary
    whole, parts = (load_run(tmp_path / name)[0].state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_a_run_of_an_earlier_version_began_without_a_start(recipe: dict[str, Any], start: Path, tmp_path: Path) -> None:
    stored = json.loads((start / "recipe.json").read_text())
    del stored["train"]["init"]
    (start / "digests.json").unlink()
    (start / "recipe.json").write_text(json.dumps(stored))
    with pytest.raises(ConfigError, match=r"train.init = 'x', but the run in .* began with ''"):
        run({"train": {"init": "x"}}, start, resume=True, progress="none")


def test_a_recurrent_memory_starts_from_a_plain_model_and_the_reverse(
    short: dict[str, Any], start: Path, tmp_path: Path
) -> None:
    plain = copy.deepcopy(short)
    short["model"]["memory"] = {"num_memory_tokens": 2, "segment_length": 16}
    short["train"]["steps"] = 0
    run(short, tmp_path / "memory", progress="none")
    model, given = load_run(tmp_path / "memory")[0], load_run(start)[0].state_dict()
    backbone = model.backbone.state_dict()
    assert set(backbone) == set(given)
    assert all(torch.equal(backbone[name], given[name]) for name in given)
    summary = json.loads((tmp_path / "memory" / "init.json").read_text())
    assert summary["left_over"] == []
    assert {name.split(".")[0] for name in summary["new"]} == {"cell"}
    plain["train"] |= {"init": str(tmp_path / "memory"), "steps": 0}
    run(plain, tmp_path / "plain", progress="none")
    state = load_run(tmp_path / "plain")[0].state_dict()
    assert all(torch.equal(state[name], given[name]) for name in given)


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("masked_lm", {}),
        ("encoder", {}),
        ("encoder", {"memory": {"num_memory_tokens": 2, "segment_length": 8}, "classes": 3}),
    ],
)
def test_bidirectional_models_start_from_each_other(kind: str, fields: dict[str, Any]) -> None:
    start = model_of({"name": "full"}, seed=1, kind="encoder")
    outcome = take_weights(model_of({"name": "window", "window": 8}, kind=kind, **fields), start, "x")
    assert outcome.left_over == ()
    assert outcome.taken_parameters == sum(parameter.numel() for parameter in start.parameters())
    assert not any("blocks" in name or "embedding" in name for name in outcome.new)


@pytest.mark.parametrize(
    ("error", "fields", "message"),
    [
        (CheckpointError, {"init": "missing"}, "'missing': there is no such folder; give the folder of a run or of a"),
        (CheckpointError, {"init": "empty"}, "'empty': has neither a run nor a saved model; give"),
        (
            ConfigError,
            {"dim": 8},
            "none of its weights has the name and shape of a weight of this model; set model.dim",
        ),
        (ConfigError, {"vocab_size": 300}, "has 256 token ids, but this model 300; give a run or model with the same"),
        (
            ConfigError,
            {"tokenizer": "subword"},
            "its tokenizer differs from that of this run, so its embeddings belong",
        ),
        (ConfigError, {"init": "converted"}, "'converted': is a pretrained model, whose weights have other names; to"),
        (ConfigError, {"init": "tuned"}, "'tuned': is a pretrained model, whose weights have other names; to train it"),
    ],
)
def test_errors_say_what_to_do_and_leave_no_run(
    short: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: type[Exception],
    fields: dict[str, Any],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("converted").mkdir()
    Path("tuned").mkdir()
    Path("tuned/recipe.json").write_text('{"model": {"kind": "pretrained"}, "task": {}, "train": {}}')
    Path("converted/config.json").write_text('{"model_type": "llama", "longspan": {"family": "llama"}}')
    short["train"]["init"] = fields.get("init", short["train"]["init"])
    short["model"] |= {name: value for name, value in fields.items() if name in ("dim", "vocab_size")}
    if "tokenizer" in fields:
        short["task"] |= {"tokenizer": "subword", "vocab_size": 257}
    with pytest.raises(error, match=message) as raised:
        run(short, "run", progress="none")
    assert str(raised.value).startswith("train.init = ")
    assert "\n" not in str(raised.value)
    assert not Path("run").exists()


def test_an_error_in_the_main_process_is_raised_in_all() -> None:
    class Second(Group):
        def any(self, flag: bool) -> bool:
            return True

    with pytest.raises(CheckpointError, match=r"train.init = 'x': the main process cannot use it; see its message"):
        start_from(model_of({"name": "full"}), "x", TextTask(), Second(rank=1, world_size=2))


def test_a_pretrained_model_has_its_own_start(recipe: dict[str, Any]) -> None:
    pytest.importorskip("transformers")
    from longspan.train import resolve

    table = {"kind": "pretrained", "source": "somewhere"}
    with pytest.raises(ConfigError, match=r"train.init: a model of kind = 'pretrained' starts from model.source"):
        resolve({"model": table, "train": {"init": "x"}})
