"""`longspan plan`: a recommendation with its command, tables, JSON and a page, and errors of one line."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.cli.command import Command

from longspan.cli.plan import seconds
from longspan.errors import ConfigError
from longspan.train import planning
from longspan.train.config import TrainConfig
from longspan.train.planning import Calibration
from longspan.train.training_memory import TrainingMemory


@pytest.fixture(autouse=True)
def calibrated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine that needs a microsecond per token and layer; only windows do not read back to the start."""

    def calibrate(tables: Sequence[Mapping[str, Any]], config: TrainConfig) -> Calibration:
        memory = TrainingMemory(fixed=1e6, per_token=0, rows=1, weights=0)
        sees_start = tables[0]["mixers"][0]["name"] != "window"
        return Calibration(seconds=(1e-6, 2e-6), memory=(memory, memory), sees_start=sees_start)

    monkeypatch.setattr(planning, "calibrate", calibrate)
    monkeypatch.setenv("LONGSPAN_CACHE", str(tmp_path / "cache"))


NEEDS = ("--length", "100k", "--memory", "2GB", "--time", "1min")


def test_the_recommendation_comes_first_with_its_command(longspan: Command, tmp_path: Path) -> None:
    text = tmp_path / "book.txt"
    text.write_bytes(b"a" * 10**7)
    outcome = longspan("plan", *NEEDS, "--mixers", "window,infini,full", "--text", text, "-o", tmp_path / "page")
    assert outcome.code == 0, outcome
    lines = " ".join(outcome.out.split())
    assert "For texts of 100,000 bytes in 2GB after 1min of training, 2 of 3 recipes fit." in lines
    take, other = lines.index("Take lm/infini"), lines.index("Or lm/window")
    assert take < other < lines.index("What does not fit.")
    assert "longspan train lm/infini --set model.dim=" in lines
    assert "--set task.source=" in lines
    assert f"longspan compare --data {text} --mixers infini,window --budget 5min" in lines
    page = (tmp_path / "page/report.html").read_text()
    assert page.index("Take lm/infini") < page.index("longspan train lm/infini") < page.index("What fits")


def test_figures_as_json(longspan: Command) -> None:
    outcome = longspan("plan", *NEEDS, "--mixers", "infini,full", "--json")
    best, last = json.loads(outcome.out)["candidates"]
    assert (best["recipe"], best["problem"]) == ("lm/infini", "")
    assert best["training_seconds"] <= 60
    assert best["command"].endswith("-o runs/infini")
    assert "take" in last["problem"]


def test_nothing_fits(longspan: Command) -> None:
    outcome = longspan("plan", "--length", "100k", "--memory", "2GB", "--time", "0.1s", "--mixers", "infini,window")
    assert outcome.code == 0
    assert "Nothing fits texts of 100,000 bytes" in " ".join(outcome.out.split())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--time", "2"), "--time '2': expected a time such as 90s, 45min, 2h or 1d"),
        (("--memory", "much"), "--memory 'much': expected a number"),
        (("--mixers", "windows"), "--mixers: no recipe lm/windows; did you mean"),
        (("--text", "missing.txt"), "--text missing.txt: no such file"),
    ],
)
def test_errors_are_one_line(longspan: Command, options: tuple[str, ...], message: str) -> None:
    outcome = longspan("plan", *NEEDS, *options)
    assert (outcome.code, message in outcome.error) == (2, True), outcome


@pytest.mark.parametrize(
    ("text", "value"), [("90s", 90), ("45min", 2700), ("2h", 7200), ("1.5d", 129_600), ("5m", 300)]
)
def test_times(text: str, value: float) -> None:
    assert seconds("--time", text) == value


@pytest.mark.parametrize("text", ["", "0h", "h", "2 weeks", "-1h"])
def test_times_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match="--time"):
        seconds("--time", text)
