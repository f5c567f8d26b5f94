"""Help that teaches, and a start that loads nothing heavy."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import longspan as library
from longspan.version import __version__

VERBS = ["train", "eval", "stream", "generate", "mixers", "quickstart"]


def test_help_shows_the_path(longspan):
    found = longspan("--help")
    assert found.code == 0
    places = [found.out.index(f"longspan {verb} ") for verb in ("train", "eval", "stream", "generate")]
    assert places == sorted(places)
    assert "longspan quickstart" in found.out


def test_without_a_verb_the_help_is_shown(longspan):
    assert longspan().out.strip() == longspan("--help").out.strip()


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_an_example(longspan, verb):
    found = longspan(verb, "--help")
    assert found.code == 0
    assert "Examples:" in found.out
    assert f"  longspan {verb}" in found.out


def test_version(longspan):
    assert longspan("--version").out == f"longspan {__version__}\n"


def test_help_imports_neither_torch_nor_matplotlib():
    # the package itself is put in place of a stub, as importing it loads torch by design
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
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.splitlines()[-1] == "loaded: []"


@pytest.mark.long
def test_python_dash_m():
    found = subprocess.run([sys.executable, "-m", "longspan.cli", "mixers", "wndow"], capture_output=True, text=True)
    assert found.returncode == 2
    assert found.stderr == "longspan: error: mixer: unknown mixer 'wndow'; did you mean 'window'?\n"


def test_mixers_are_listed_with_their_fields(longspan):
    found = longspan("mixers")
    for name in library.mixers.names():
        assert f"\n {name} " in found.out
    assert "window=512" in found.out
    assert "constant" in found.out
    assert "grows" in found.out


@pytest.mark.parametrize("name", library.mixers.names())
def test_a_mixer_is_explained(longspan, name):
    found = longspan("mixers", name)
    assert found.code == 0
    assert found.out.startswith(name)
    assert "State of a layer" in found.out


def test_a_mixers_fields_are_explained(longspan):
    found = longspan("mixers", "transformer_xl").out
    assert "same_length" in found
    assert "how far memory reaches" in found
    assert "Dai et al. 2019" in found


def test_the_package_runs_as_a_module(monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", ["longspan", "--version"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("longspan", run_name="__main__")
    assert not ended.value.code
    assert capfd.readouterr().out == f"longspan {__version__}\n"
