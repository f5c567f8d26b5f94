"""The log that a run writes and the progress that it shows."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from longspan.process import resident_bytes
from longspan.train import Display, LiveDisplay, PlainDisplay
from longspan.train.log import Log, read_log
from longspan.train.progress import describe, make_display

LINE = {
    "step": 20,
    "loss": 1.0,
    "bits_per_byte": 1.4427,
    "tokens_per_second": 12345.6,
    "memory": 3 << 29,
    "fraction": 0.25,
    "eta": 3725.0,
    "unit": "byte",
}


def test_the_log_is_appended_to_and_cut_at_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    log = Log(path, step=0)
    for step in range(1, 6):
        log.write({"step": step, "loss": 1 / 3})
    log.sync()
    log.close()
    assert read_log(path)[-1] == {"step": 5, "loss": 1 / 3}
    with open(path, "a") as file:
        file.write('{"step": 6, "lo')
    log = Log(path, step=3)
    log.write({"step": 4, "loss": 2.0})
    log.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4]


def test_no_log_is_an_empty_log(tmp_path: Path) -> None:
    assert read_log(tmp_path / "log.jsonl") == []


def test_a_log_line_is_described_in_words() -> None:
    assert list(describe(LINE).values()) == [
        *("step 20", "1.4427 bits/byte", "", "12,346 tokens/s", "1.50 GiB", "1:02:05 left")
    ]
    figures = describe({"step": 3, "unit": "byte", "eta": 61.0, "validation": {"bits_per_byte": 2.0}})
    assert figures == {
        "step": "step 3",
        "loss": "",
        "validation": "held-out 2.0000",
        "speed": "",
        "memory": "",
        "eta": "1:01 left",
    }


def test_plain_lines_are_few_but_evaluations_are_all_shown(capsys: pytest.CaptureFixture[str]) -> None:
    display = PlainDisplay(interval=1000)
    display.start("title")
    for step in range(1, 5):
        display.step({**LINE, "step": step})
    display.step({**LINE, "step": 5, "validation": {"bits_per_byte": 2.0}})
    display.stop()
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == ["title", "step 1  1.4427 bits/byte  12,346 tokens/s  1.50 GiB  1:02:05 left"]
    assert lines[2].startswith("step 5")
    assert len(lines) == 3


def test_the_live_line_keeps_figures_that_a_line_does_not_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=120)
    monkeypatch.setattr("longspan.train.progress.Console", lambda stderr: console)
    display = LiveDisplay()
    display.start("title [not markup]")
    display.step(LINE)
    display.step({"step": 21, "unit": "byte", "fraction": 0.5, "validation": {"bits_per_byte": 2.0}})
    display.message("a message")
    display.stop()
    shown = out.getvalue()
    last = shown.splitlines()[-2]
    assert "title [not markup]" in shown
    assert "a message" in shown
    for part in ("step 21", "1.4427 bits/byte", "held-out 2.0000", "12,346 tokens/s", "1.50 GiB"):
        assert part in last


def test_displays_are_chosen_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    own = Display()
    assert make_display(own) is own
    assert type(make_display("none")) is Display
    assert isinstance(make_display("live"), LiveDisplay)
    monkeypatch.setattr("sys.stderr.isatty", lambda: False, raising=False)
    assert isinstance(make_display("auto"), PlainDisplay)


def test_resident_memory_is_that_of_this_process() -> None:
    resident = resident_bytes()
    assert resident is not None
    assert 10**7 < resident < 10**11


def test_resident_memory_is_measured_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(path: Path) -> str:
        raise FileNotFoundError

    monkeypatch.setattr("pathlib.Path.read_text", absent)
    resident = resident_bytes()
    assert resident is not None
    assert resident == pytest.approx(resident_bytes(), rel=0.1)
    assert resident > 10**7
