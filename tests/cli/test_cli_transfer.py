"""`longspan transfer`: a table of errors, a folder for the other commands, and errors of one line."""

from pathlib import Path

import pytest
from tests.cli.command import Command

pytest.importorskip("transformers")

from tests.hf.conftest import save_llama

from longspan.cli.options import layer_ranges
from longspan.errors import ConfigError

SMALL = ("--length", 48, "--batch", 2, "--held-out", 4, "--device", "cpu")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small pretrained model."""
    return save_llama(tmp_path_factory.mktemp("source"))


def test_a_model_is_converted_and_taught(longspan: Command, source: Path, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments: list[object] = ["transfer", source, "--to", "linear", "--loss", "outputs", "-o", out, *SMALL]
    arguments += ["--text", folder / "documents", "--set", "feature=dpfp"]
    arguments += ["--steps", 6, "--distill", 2, "--keep-softmax", 1]
    outcome = longspan(*arguments)
    assert outcome.code == 0, outcome.err
    assert "Relative error on held-out text, outputs of layers" in outcome.out
    rows = [line.split() for line in outcome.out.splitlines() if line.strip().startswith(("0 ", "1 "))]
    assert [row[0] for row in rows] == ["0", "1"]
    assert sum(row[-2:] == ["softmax", "kept"] for row in rows) == 1
    assert "divergence of predictions: " in outcome.out
    *_, next_commands, training = outcome.out.splitlines()
    assert next_commands.startswith(f"next: longspan eval {out} FILE | longspan stream {out} FILE")
    assert training == f"train further: longspan train pretrained --set model.source={out}"
    again = longspan(*arguments)
    assert again.out == outcome.out
    assert longspan("eval", out, folder / "long.txt", "--tokens", 200).code == 0


def test_layers_are_ranked_and_shown(longspan: Command, source: Path, folder: Path, tmp_path: Path) -> None:
    to = ("--to", "infini", "--segment", 16, "--layers", "auto:1", "-o", tmp_path / "out")
    refused = longspan("convert", source, *to)
    assert refused.code == 2
    assert refused.err.splitlines()[-1].endswith("--layers auto:1: ranks the layers on a text; add --check FILE")
    assert not (tmp_path / "out").exists()
    outcome = longspan("convert", source, *to, "--check", folder / "long.txt", "--check-tokens", 60)
    assert outcome.code == 0, outcome.err
    rows = [line.split() for line in outcome.out.splitlines() if line.strip().startswith(("0 ", "1 "))]
    assert [row[-2:] == ["softmax", "kept"] for row in rows[:2]] == [True, False]
    assert float(rows[0][1]) >= float(rows[1][1])
    assert "1 layers: infini(" in outcome.out
    assert longspan("eval", tmp_path / "out", folder / "long.txt", "--tokens", 200).code == 0


def test_mistakes_are_one_line(longspan: Command, source: Path, folder: Path, tmp_path: Path) -> None:
    base = ("transfer", source, "--text", folder / "documents", "-o", tmp_path / "out", *SMALL, "--to")
    for arguments, expected in {
        ("window",): "no parameters to learn; use loss 'outputs'",
        ("wndow",): "did you mean 'window'?",
        ("infini", "--set", "segmnt=4"): "did you mean 'segment'?",
        ("infini", "--loss", "weights"): "--loss 'weights': must be heads or outputs",
        ("infini", "--layers", "0-x"): "expected whole numbers and ranges",
        ("infini", "--layers", "5"): "must be among the 2 layers",
        ("", "--set", "segment=4"): "--set: the fields of a converted model are fixed",
        ("",): "is not converted; choose a mechanism with --to",
    }.items():
        outcome = longspan(*base, *arguments)
        assert outcome.code == 2
        assert expected in outcome.err.splitlines()[-1]
        assert not (tmp_path / "out").exists()


def test_ranges_of_layers() -> None:
    assert layer_ranges("all") is None
    assert layer_ranges("0-2,5,-1") == (0, 1, 2, 5, -1)
    assert layer_ranges("auto:2") == "auto:2"
    for wrong in ("", "a", "1-", "1--2x", "1,,2", "auto:0", "auto:", "auto:1,2"):
        with pytest.raises(ConfigError, match="expected whole numbers and ranges"):
            layer_ranges(wrong)
