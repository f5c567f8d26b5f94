"""`longspan cost`: tables, JSON and a page for recipes, runs and pretrained models, and errors of one line."""

import json
from pathlib import Path
from typing import Any

import pytest
from tests.cli.command import Command

from longspan.cli.cost import size
from longspan.errors import ConfigError
from longspan.train import process_memory
from longspan.train.config import TrainConfig


def figures(longspan: Command, *arguments: object) -> Any:
    outcome = longspan("cost", *arguments, "--json")
    assert outcome.code == 0, outcome
    return json.loads(outcome.out)


@pytest.mark.parametrize(
    ("text", "value"), [("4096", 4096), ("32k", 32_000), ("1.5M", 1_500_000), ("128Ki", 131_072), (" 2Gi", 2 << 30)]
)
def test_sizes(text: str, value: int) -> None:
    assert size("--length", text) == value


@pytest.mark.parametrize("text", ["", "many", "3i", "-4", "0", "4KB"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match="--length"):
        size("--length", text)


def test_a_recipe_at_several_lengths(longspan: Command, tmp_path: Path) -> None:
    cost = figures(longspan, "lm/window", "--length", "1Ki,64Ki", "--memory", "8MB", "-o", tmp_path / "page")
    (model,) = cost["models"]
    assert model["parameters"] == 836_736
    first, last = model["at"]
    assert (first["length"], last["length"]) == (1024, 65_536)
    assert first["state_bytes"] == last["state_bytes"] == 1_044_520
    assert model["longest_streamed"] is None, "a window has a state of constant size, beside 3.3 MB of weights"
    assert "Cost of lm/window" in (tmp_path / "page/report.html").read_text()
    text = longspan("cost", "lm/window", "--length", "1Ki", "--memory", "100KB").out
    assert "836,736 parameters" in text
    assert "longest text to stream in 100KB" in text
    assert text.split()[-1] == "0"


def test_every_mechanism_in_one_model(longspan: Command, byte_run: Path) -> None:
    from longspan import mixers

    outcome = longspan("cost", byte_run, "--mixers", "all", "--length", "4096", "--json")
    names = [model["name"] for model in json.loads(outcome.out)["models"]]
    left_out = [line.split(":")[2].strip() for line in outcome.err.splitlines() if "left out" in line]
    assert sorted([*names, *left_out]) == sorted(mixers.names())
    assert {"full", "window", "linear"} <= set(names)


def test_speeds_are_measured_and_longer_texts_follow_their_flops(longspan: Command, byte_run: Path) -> None:
    options = ("--mixers", "full,window,performer", "--length", "2048,65536", "--time")
    models = {model["name"]: model for model in figures(longspan, byte_run, *options)["models"]}
    for model in models.values():
        rates = model["tokens_per_second"]
        assert min(rates.values()) > 0
        short, long = model["at"]
        # the shorter text is the one that was timed
        assert model["seconds_to_read"]["2048"] == pytest.approx(2048 / rates["read"])
        growth = long["forward_flops"] / short["forward_flops"]
        assert model["seconds_to_read"]["65536"] == pytest.approx(growth * model["seconds_to_read"]["2048"])
    per_text = {
        name: model["seconds_to_read"]["65536"] / model["seconds_to_read"]["2048"] for name, model in models.items()
    }
    assert per_text["full"] > 5 * per_text["window"]
    table = longspan("cost", byte_run, "--length", "2048", "--time").out
    assert "trains tokens/s" in table
    assert "reads 2,048" in table


def test_the_vocabulary_is_that_of_the_task(longspan: Command) -> None:
    from longspan import tasks
    from longspan.config import read_toml
    from longspan.models import build_model
    from longspan.train.recipes import find_recipe

    recipe = read_toml(find_recipe("reformer-copy"))
    model = build_model(recipe["model"] | {"vocab_size": tasks.build(recipe["task"]).vocab_size})
    (counted,) = figures(longspan, "reformer-copy", "--length", "4096")["models"]
    assert counted["parameters"] == model.num_parameters()


def test_a_recurrent_memory(longspan: Command) -> None:
    (model,) = figures(longspan, "rmt", "--length", "512,2043904")["models"]
    first, last = model["at"]
    assert first["state_bytes"] == last["state_bytes"]
    assert last["forward_flops"] == pytest.approx(first["forward_flops"] * 2043904 / 512, rel=0.05)


def test_a_pretrained_model(longspan: Command, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from tests.hf.conftest import save_llama

    source = save_llama(tmp_path / "source")
    for file in source.glob("*.safetensors"):
        file.unlink()
    options = ("--length", "2048", "--dtype", "bfloat16", "--batch", 2)
    (original,) = figures(longspan, source, *options)["models"]
    # 2 layers of 2 kv heads of 4 in bfloat16, and counts
    assert original["at"][0]["kv_bytes"] == 2 * 2 * 2 * 2 * 4 * 2 * 2048
    assert original["at"][0]["state_bytes"] == original["at"][0]["kv_bytes"] + 2 * 24
    window, infini = figures(longspan, source, "--mixers", "window,infini", *options)["models"]
    assert window["at"][0]["state_bytes"] < original["at"][0]["state_bytes"]
    assert infini["parameters"] == original["parameters"] + 8
    assert "is not a converted model as it is trained" in longspan("cost", source, "--training").error
    assert "leave --mixers out" in longspan("cost", source, "--mixers", "window", "--time").error


def test_memory_of_training_a_converted_model(
    longspan: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("peft")
    from tests.hf.conftest import save_llama

    source, folder = save_llama(tmp_path / "source"), tmp_path / "converted"
    assert longspan("convert", source, "--to", "infini", "--segment", 64, "-o", folder).code == 0

    def in_a_process(table: dict[str, Any], config: TrainConfig) -> dict[str, int]:
        """Stands for processes, which take seconds."""
        assert (table["source"], config.lanes) == (str(folder), 1)
        return {"resident": 400_000_000, "taken": 1_000_000 + 500 * config.segment_length}

    monkeypatch.setattr(process_memory, "in_a_process", in_a_process)
    (converted,) = figures(longspan, folder, "--training", "--memory", "1GB")["models"]
    training, process = converted["training"], converted["process"]
    assert (process["fixed"], process["per_token"], process["weights"]) == (1_000_000, 500, 400_000_000)
    assert converted["longest_trained"] == (1_000_000_000 - 401_000_000) // 500
    # adapters alone have gradients and states of the optimizer, so most of it grows with the length
    assert 0 < training["fixed"] < training["per_token"] * 2048
    refused = longspan("cost", folder, "--training", "--mixers", "window")
    assert "give that folder without --mixers" in refused.error


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("lm/windw",), "no such file, and no bundled recipe"),
        (("lm/window", "--mixers", "windw"), "did you mean 'window'?"),
        (("lm/window", "--length", "much"), "--length 'much': expected a number such as"),
        (("lm/window", "--dtype", "int8"), "--dtype 'int8': must be one of"),
        (("pretrained",), "trains a pretrained model; give its folder"),
    ],
)
def test_mistakes_are_one_line(longspan: Command, arguments: tuple[str, ...], expected: str) -> None:
    outcome = longspan("cost", *arguments)
    assert outcome.code == 2
    assert expected in outcome.err.splitlines()[-1]
