"""Help with examples, and a start that imports no heavy package."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from tests.cli.command import Command

import longspan as library
from longspan.version import __version__

VERBS = ["train", "eval", "stream", "generate", "mixers", "quickstart"]


def test_help_shows_the_path(longspan: Command) -> None:
    outcome = longspan("--help")
    assert outcome.code == 0
    offsets = [outcome.out.index(f"longspan {verb} ") for verb in ("train", "eval", "stream", "generate")]
    assert offsets == sorted(offsets)
    assert "longspan quickstart" in outcome.out


def test_without_a_verb_the_help_is_shown(longspan: Command) -> None:
    assert longspan().out.strip() == longspan("--help").out.strip()


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_an_example(longspan: Command, verb: str) -> None:
    outcome = longspan(verb, "--help")
    assert outcome.code == 0
    assert "Examples:" in outcome.out
    assert f"  longspan {verb}" in outcome.out


def test_version(longspan: Command) -> None:
    assert longspan("--version").out == f"longspan {__version__}\n"


def test_help_imports_neither_torch_nor_matplotlib() -> None:
    # a stub stands in for the package itself, as importing it loads torch by design
    code = f"""
import sys, types
stub = types.ModuleType("longspan")
stub.__path__ = [{str(Path(library.__file__).parent)!r}]
sys.modules["longspan"] = stub
from longspan.cli.app import run
assert run(["stream", "--help"]) == 0
assert run(["--help"]) == 0
print("loaded:", sorted({{"torch", "numpy", "matplotlib", "jinja2", "safetensors"}} & set(sys.modules)))
"""
    completed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert completed.stdout.splitlines()[-1] == "loaded: []"


@pytest.mark.long
def test_python_dash_m() -> None:
    completed = subprocess.run(
        [sys.executable, "-m", "longspan.cli", "mixers", "wndow"], capture_output=True, text=True
    )
    assert completed.returncode == 2
    assert completed.stderr == "longspan: error: mixer: unknown mixer 'wndow'; did you mean 'window'?\n"


def test_mixers_are_listed_with_their_fields(longspan: Command) -> None:
    outcome = longspan("mixers")
    for name in library.mixers.names():
        assert f"\n {name} " in outcome.out
    assert "window=512" in outcome.out
    assert "constant" in outcome.out
    assert "grows" in outcome.out


@pytest.mark.parametrize("name", library.mixers.names())
def test_a_mixer_is_explained(longspan: Command, name: str) -> None:
    outcome = longspan("mixers", name)
    assert outcome.code == 0
    assert outcome.out.startswith(name)
    assert "State of a layer" in outcome.out


def test_a_mixers_fields_are_explained(longspan: Command) -> None:
    text = longspan("mixers", "transformer_xl").out
    assert "same_length" in text
    assert "length of the memory" in text
    assert "Dai et al. 2019" in text


def test_the_package_runs_as_a_module(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["longspan", "--version"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("longspan", run_name="__main__")
    assert not ended.value.code
    assert capfd.readouterr().out == f"longspan {__version__}\n"
