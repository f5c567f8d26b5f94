"""Output in any encoding: what it has no character for is written in another way, never an error."""

import io
import os
import subprocess
import sys

import pytest

from longspan.cli.app import run

ENCODINGS = ["ascii", "latin-1", "cp1252", "utf-8"]


@pytest.fixture
def printed(monkeypatch):
    """Call the command line with output in an encoding; the bytes of both outputs together."""

    def call(encoding: str, *arguments: object) -> bytes:
        raw = io.BytesIO()
        file = io.TextIOWrapper(raw, encoding=encoding, errors="strict", write_through=True)
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", file)
            patch.setattr(sys, "stderr", file)
            code = run([str(each) for each in arguments])
            file.flush()
        assert code in (0, 2), raw.getvalue()
        assert file.errors == "strict"
        return raw.getvalue()

    return call


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_figures_below_zero(printed, byte_run, encoding):
    text = printed(encoding, "eval", byte_run).decode(encoding)
    minus = "\u2212" if encoding == "utf-8" else "-"
    assert "with memory" in text
    assert "difference" in text
    # of an interval around zero some end is below it
    assert minus in text.split("difference")[1]
    assert ("\u2212" in text) == (encoding == "utf-8")


VERBS = {
    "help": ["--help"],
    "mixers": ["mixers"],
    "one mixer": ["mixers", "performer"],
    "mixer with equations": ["mixers", "compressive"],
    "lm": ["eval", "{run}", "--task", "lm", "--contexts", "64"],
    "stream": ["stream", "{run}", "{text}"],
    "reproduce": ["reproduce"],
    "error": ["eval", "no-r\u00fcn-\u2212"],
    "bytes": ["eval", "no-\udcff"],
}


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_prints(printed, byte_run, folder, encoding, verb):
    arguments = [each.format(run=byte_run, text=folder / "long.txt") for each in VERBS[verb]]
    assert printed(encoding, *arguments)


SETTINGS = [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}]


@pytest.mark.parametrize("setting", SETTINGS)
def test_in_a_process_of_its_own(byte_run, setting):
    command = [sys.executable, "-m", "longspan.cli", "eval", str(byte_run)]
    found = subprocess.run(command, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1", **setting})
    assert found.returncode == 0, found.stderr
    assert b"difference" in found.stdout
