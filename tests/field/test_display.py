"""What verbs show while they work, in terminals of 50, 80 and 120 columns, in pipes and in shells."""

import fcntl
import importlib.metadata
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import tomllib
from pathlib import Path

import pytest
from rich.console import Console
from tests.cli.command import Command
from tests.field.test_work_is_kept import recipe_of

import longspan as ls
from longspan.cli.console import StatusLine, column_widths, print_table, reading_progress
from longspan.experiments.training_table import TrainingTable
from longspan.report import Table
from longspan.train import Display, progress, run

WIDTHS = [50, 80, 120]


class Terminal:
    """A terminal of some columns, to write to."""

    def __init__(self, columns: int) -> None:
        self.columns = columns
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
        self.file = os.fdopen(slave, "w", encoding="utf-8")

    def text(self) -> str:
        """Everything written so far; closes the terminal."""
        self.file.close()
        data = b""
        while True:
            try:
                data += os.read(self.master, 1 << 16)
            except OSError:
                # everything is read, and no writer is left
                break
        os.close(self.master)
        return data.decode()


@pytest.mark.parametrize("columns", WIDTHS)
def test_the_line_of_a_stream_never_scrolls(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    from longspan.cli.streaming import Block

    block = Block(
        bytes=2_043_904_123,
        tokens=2_043_904_123,
        position=1,
        bits_per_byte=2.123456,
        mean_bits_per_byte=2.123456,
        bytes_per_second=1_234_567.0,
        seconds=1.0,
        resident=317 << 20,
        peak=None,
        state_bytes=0,
        read=1,
        held_back=0,
    )
    terminal = Terminal(columns)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", terminal.file)
        line = StatusLine()
        line.show(*block.lines())
        line.show("x" * 300)
    first, second = (line.removesuffix("\x1b[K") for line in terminal.text().split("\r")[1:])
    assert len(first) < terminal.columns
    assert len(second) < terminal.columns
    assert "2.1235 bits/byte" in first
    assert ("bytes/s" in first) == (terminal.columns >= 80)


def words_of(text: str) -> list[str]:
    return re.sub(r"[─\s]+", " ", text).split()


@pytest.mark.parametrize("columns", WIDTHS)
def test_no_word_of_a_table_is_cut(columns: int) -> None:
    registry = ls.mixers
    rows = []
    for name in registry.names():
        config = registry.build(name, dim=512, num_heads=8).core.config
        fields = ", ".join(f"{key}={getattr(config, key)!r}" for key in type(config).__dataclass_fields__) or "-"
        rows.append((name, "causal and both sides", "constant", "732.0 KiB", "244.6 MiB", fields))
    heads = ("name", "sees", "state", "after 1,000", "after 1,000,000", "fields and defaults")
    file = io.StringIO()
    print_table(Table(columns=heads, rows=rows, right=(3, 4)), Console(file=file, width=columns, highlight=False))
    text = file.getvalue()
    assert max(len(line.rstrip()) for line in text.splitlines()) <= columns
    words = set(words_of(text))
    for row in rows:
        assert all(word in words for cell in row for word in cell.split())


def test_columns_share_the_room_there_is() -> None:
    columns = [["name", "a"], ["text", "one two three four"]]
    assert column_widths(columns, 40) == [4, 18]
    assert column_widths(columns, 12) == [4, 8]
    assert column_widths(columns, 8) is None


@pytest.mark.parametrize("columns", WIDTHS)
def test_the_line_of_a_training_fits_the_terminal(columns: int) -> None:
    line = progress.Line()
    line.fraction = 0.4
    line.fields = progress.describe(
        {
            "step": 12_345,
            "bits_per_byte": 2.1234,
            "validation": {"bits_per_byte": 2.2345},
            "tokens_per_second": 12_345.0,
            "memory": 3 << 30,
            "eta": 4_000.0,
            "unit": "byte",
        }
    )
    file = io.StringIO()
    Console(file=file, width=columns, force_terminal=True, color_system=None).print(line)
    (text,) = file.getvalue().splitlines()
    assert len(text) <= columns
    assert "step 12345" in text
    assert "2.1234 bits/byte" in text
    assert "1:06:40 left" in text
    assert ("12,345 tokens/s" in text) == (columns >= 80)


@pytest.mark.parametrize("columns", WIDTHS)
def test_the_table_of_a_tour_fits_the_terminal(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    terminal = Terminal(columns)
    table = TrainingTable()
    speed = {"tokens_per_second": 9e5, "memory": 1 << 30, "eta": 9.0}
    table.step({"step": 1, "bits_per_byte": 2.0, "fraction": 0.5, **speed})
    table.evaluating(1, 2)
    file = io.StringIO()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", terminal.file)
        Console(file=file, width=columns, force_terminal=True, color_system=None).print(table.draw())
    terminal.text()
    assert all(len(line.rstrip()) < terminal.columns for line in file.getvalue().splitlines())
    assert "reading held-out documents: 50%" in file.getvalue()


class Counting(Display):
    def __init__(self) -> None:
        self.read: list[tuple[int, int]] = []

    def evaluating(self, read: int, total: int) -> None:
        self.read.append((read, total))


def test_the_final_evaluation_says_how_far_it_is(folder: Path, tmp_path: Path) -> None:
    display = Counting()
    run(recipe_of(folder), tmp_path, progress=display)
    done = [read for read, _ in display.read]
    assert done == sorted(done)
    assert len(set(done)) > 3
    assert display.read[-1] == (3000, 3000)


def test_plain_lines_tell_of_a_long_evaluation(capsys: pytest.CaptureFixture[str]) -> None:
    plain = progress.PlainDisplay(interval=0.0)
    plain.evaluating(50, 200)
    assert capsys.readouterr().err == "evaluating  25% of 200 held-out tokens\n"


@pytest.mark.parametrize("arguments", [["eval", "{run}"], ["eval", "{run}", "--task", "lm", "--contexts", "64"]])
def test_an_evaluation_shows_progress(
    longspan: Command, byte_run: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    terminal = Terminal(80)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", terminal.file)
        assert longspan(*(argument.format(run=byte_run) for argument in arguments)).code == 0
    shown = terminal.text()
    assert "reading" in shown
    assert re.search(r"\d+%", shown)
    # and clears its line
    assert shown.endswith("\r\x1b[K")


def test_reading_a_prompt_shows_progress(
    longspan: Command, byte_run: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal(80)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", terminal.file)
        assert longspan("generate", byte_run, "--prompt-file", folder / "long.txt", "-n", 1).code == 0
    assert re.search(r"reading the prompt:.*%", terminal.text())


def test_quick_work_prints_no_progress_into_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    with reading_progress("reading") as show:
        show(1, 2)
    with reading_progress("reading", every=0.0) as show:
        show(1, 2)
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert err.startswith("reading:  50%")


def test_commands_are_not_broken_in_a_pipe(longspan: Command, folder: Path, tmp_path: Path) -> None:
    deep = tmp_path / ("a-long-name-of-a-folder-" * 5) / ("of-a-run-" * 8)
    outcome = longspan("train", folder / "bytes.toml", "--set", "train.steps=1", "-o", deep)
    (line,) = [line for line in outcome.out.splitlines() if line.startswith("next: ")]
    assert line == f"next: longspan eval {deep} | longspan stream {deep} FILE | longspan generate {deep}"


LONG = pytest.mark.long


@pytest.mark.parametrize("shell", ["bash", *(pytest.param(shell, marks=LONG) for shell in ("zsh", "fish"))])
def test_shells_complete_verbs(shell: str) -> None:
    environment = {
        **os.environ,
        "_LONGSPAN_COMPLETE": f"complete_{shell}",
        "COMP_WORDS": "longspan s",
        "COMP_CWORD": "1",
        "_TYPER_COMPLETE_ARGS": "longspan s",
        "_TYPER_COMPLETE_FISH_ACTION": "get-args",
    }
    command = [sys.executable, "-m", "longspan.cli"]
    completed = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert "stream" in completed.stdout
    assert "show" in completed.stdout


def test_completion_can_be_installed(longspan: Command) -> None:
    help_text = longspan("--help").out
    assert "--install-completion" in help_text
    assert "--show-completion" in help_text


def test_the_harness_finds_the_model_by_its_entry_point() -> None:
    lm_eval = pytest.importorskip("lm_eval.api.registry")
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    (value,) = project["entry-points"]["lm_eval.models"].values()
    point = importlib.metadata.EntryPoint("longspan", value, "lm_eval.models")
    assert point.load() is lm_eval.get_model("longspan")
    assert callable(importlib.metadata.EntryPoint("x", project["scripts"]["longspan-lm-eval"], "y").load())


@pytest.mark.long
def test_a_harness_that_knows_the_entry_point_can_load_it() -> None:
    pytest.importorskip("lm_eval")
    code = """
import importlib.metadata, lm_eval.models
from lm_eval.api.registry import get_model, model_registry
point = importlib.metadata.EntryPoint("longspan", "longspan.harness:LongspanLM", "lm_eval.models")
model_registry.register("longspan", target=point)
print(get_model("longspan").__name__)
"""
    completed = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert completed.stdout == "LongspanLM\n", completed.stderr


@pytest.mark.parametrize("verb", ["spans", "support"])
def test_showing_heads_shows_progress(
    longspan: Command, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    mixer = {"name": "entmax", "window": 8} if verb == "support" else {"name": "adaptive_span", "dynamic": True}
    recipe = recipe_of(folder, steps=1)
    run({**recipe, "model": {**recipe["model"], "mixers": [mixer]}}, tmp_path / "run", progress="none")
    terminal = Terminal(80)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", terminal.file)
        assert longspan("show", verb, tmp_path / "run", "-o", tmp_path / "page").code == 0
    assert re.search(r"(counting keys|measuring spans): +\d+%", terminal.text())
