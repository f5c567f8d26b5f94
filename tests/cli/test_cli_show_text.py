"""`longspan show text`: numbers of single tokens that other commands confirm, on a page and as JSON."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.cli.command import Command
from tests.cli.pages import without_pixels

from longspan.cli.app import run


def report(folder: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return data


@pytest.mark.parametrize("kind", ["byte_run", "subword_run"])
def test_losses_are_those_of_stream_and_eval(
    longspan: Command, folder: Path, tmp_path: Path, kind: str, request: pytest.FixtureRequest
) -> None:
    trained = request.getfixturevalue(kind)
    text = tmp_path / "text.txt"
    text.write_text((folder / "long.txt").read_text()[:700] + "é\n")
    assert longspan("stream", trained, text, "--losses", tmp_path / "nats").code == 0
    expected = np.fromfile(tmp_path / "nats", "<f4") / math.log(2)
    assert longspan("show", "text", trained, text, "-o", tmp_path / "whole").code == 0
    whole = report(tmp_path / "whole")
    assert whole["bits"][0] is None
    np.testing.assert_allclose(whole["bits"][1:], expected, atol=1e-4)
    outcome = longspan("show", "text", trained, text, "--from", 50, "--length", 40, "-o", tmp_path / "part", "--json")
    part = json.loads(outcome.out)
    assert part == {key: value for key, value in report(tmp_path / "part").items() if key not in ("title", "version")}
    np.testing.assert_allclose(part["bits"], expected[50:90], atol=1e-4)
    assert part["tokens"] == whole["tokens"][51:91]
    assert "".join(whole["tokens"]) == text.read_text()
    evaluated = json.loads(longspan("eval", trained, text, "--json").out)
    for name, bits in (("with_memory", whole["bits"]), ("without_memory", whole["bits_without_memory"])):
        # the first segment has no memory
        filled = [one if other is None else other for one, other in zip(whole["bits"], bits, strict=True)]
        total = sum(value for value in filled if value is not None)
        assert total / len(text.read_bytes()) == pytest.approx(evaluated[name]["bits_per_byte"], abs=1e-4)


def test_the_page_shows_what_layers_read(longspan: Command, folder: Path, byte_run: Path, tmp_path: Path) -> None:
    arguments = ("show", "text", byte_run, folder / "long.txt", "--length", 100, "-o", tmp_path)
    outcome = longspan(*arguments)
    assert outcome.code == 0, outcome
    assert "after the first segment" in outcome.out
    data = report(tmp_path)
    mean, first, second = data["layers"]
    assert (first["label"], second["label"]) == ("Layer 1 (TransformerXL)", "Layer 2 (TransformerXL)")
    for token, index in enumerate(first["positions"]):
        assert all(at <= token for at in index)
    np.testing.assert_allclose(first["sum"], 1, atol=1e-5)
    html = without_pixels((tmp_path / "report.html").read_text())
    assert "http" not in html
    assert html.count('<span id="t') == 101
    assert "saved by the memory" in html
    assert longspan(*arguments, "--layer", 2).code == 0
    assert [layer["label"] for layer in report(tmp_path)["layers"]] == [second["label"]]
    assert mean["label"].startswith("Mean")


def test_standard_input_and_parts_of_characters(longspan: Command, byte_run: Path, tmp_path: Path) -> None:
    assert longspan("show", "text", byte_run, "-", "-o", tmp_path, stdin="aé\n".encode()).code == 0
    data = report(tmp_path)
    assert data["tokens"] == ["", "a", "", "é", "\n"]
    assert data["names"] == ["start of the document", "", "part of a character, c3", "", "line break"]
    # the text is shorter than a segment
    assert data["bits_without_memory"] == [None] * 5
    assert "there is no memory yet" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--from", "9000"], "has 9,000 tokens, so none is left after --from 9000"),
        (["--layer", "3"], "--layer 3: the model has 2 layers; give a number from 1 to 2"),
        (["--length", "3000"], "--length"),
    ],
)
def test_what_is_not_there_is_an_error(
    longspan: Command, folder: Path, byte_run: Path, tmp_path: Path, arguments: list[str], expected: str
) -> None:
    error = longspan("show", "text", byte_run, folder / "long.txt", *arguments, "-o", tmp_path / "out").error
    assert expected in error
    assert not (tmp_path / "out").exists()
    assert "no such file" in longspan("show", "text", byte_run, tmp_path / "none", "-o", tmp_path / "out").error.lower()


@pytest.mark.parametrize(
    ("mixers", "tells"),
    [
        (
            '[{name = "memorizing", window = 8, max_memories = 24, k = 4}]',
            {"share of the retrieval", "retrieved pairs"},
        ),
        ('[{name = "lsh", bucket_size = 4, selection = "sorted"}]', {"bucket of round 1", "bucket of round 2"}),
        ('[{name = "gated_delta"}]', {"decay", "write strength"}),
    ],
)
def test_other_mechanisms(longspan: Command, folder: Path, tmp_path: Path, mixers: str, tells: set[str]) -> None:
    carry = "true" if "sorted" not in mixers else "false"
    settings = (f"model.mixers={mixers}", "train.steps=2", f"train.carry={carry}")
    options = [part for setting in settings for part in ("--set", setting)]
    assert run(["train", str(folder / "bytes.toml"), *options, "-o", str(tmp_path / "run")]) == 0
    out = tmp_path / "out"
    outcome = longspan("show", "text", tmp_path / "run", folder / "long.txt", "--from", 40, "--length", 30, "-o", out)
    assert outcome.code == 0, outcome
    data = report(out)
    layer = data["layers"][-1]
    assert {item["name"] for item in (*layer["diagnostics"], *layer["retrievals"])} == tells
    assert (layer["positions"] is None) == ("gated_delta" in mixers)
    assert data["carries_state"] == ("sorted" not in mixers)
    for retrieval in layer["retrievals"]:
        # the store has segments before the span, whose text is on the page
        position, (before, own, after) = next(iter(retrieval["snippets"].items()))
        text = (folder / "long.txt").read_text()
        assert text[int(position) - 1] == own
        assert before + own + after in text


def test_a_converted_model(longspan: Command, folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from tests.hf.conftest import save_llama

    source, converted = save_llama(tmp_path / "source"), tmp_path / "converted"
    assert longspan("convert", source, "--to", "infini", "--set", "segment=16", "-o", converted).code == 0
    outcome = longspan("show", "text", converted, folder / "long.txt", "--length", 60, "-o", tmp_path / "out")
    assert outcome.code == 0, outcome
    layers = report(tmp_path / "out")["layers"]
    assert {layer["mechanism"] for layer in layers} == {"", "Infini"}
    np.testing.assert_allclose(layers[0]["sum"], 1, atol=1e-4)
    (gates,) = layers[1]["diagnostics"]
    assert gates["name"] == "share of the memory"
