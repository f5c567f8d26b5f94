"""A quickstart of a few seconds with the code of the real one, and its checks on synthetic numbers."""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.cli.command import Outcome
from tests.cli.pages import without_pixels

from longspan.config import read_toml
from longspan.experiments.checks import Check
from longspan.experiments.quickstart_lm import checks
from longspan.experiments.quickstart_lm.plan import make_plan
from longspan.experiments.quickstart_lm.steps import Streamed
from longspan.experiments.tour import Clock
from longspan.report.tables import judged
from longspan.tasks import resolve as resolve_task
from longspan.train import Evaluation, find_recipe, resolve

Verdicts = Callable[..., dict[str, Check]]


@pytest.fixture(scope="module")
def finished(folder: Path, tmp_path_factory: pytest.TempPathFactory, byte_run: Path) -> tuple[Path, int]:
    """The folder of a quickstart, and its exit code."""
    from longspan.cli.app import run

    out = tmp_path_factory.mktemp("quickstart")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        recipe, text = folder / "bytes.toml", folder / "long.txt"
        code = run(["quickstart-lm", "--recipe", str(recipe), "--text", str(text), "-o", str(out)])
    return out, code


def test_the_quickstart_checks_its_claims(finished: tuple[Path, int]) -> None:
    out, code = finished
    report = json.loads((out / "report.json").read_text())
    checks_by_name = {check["name"]: check for check in report["checks"]}
    assert code == int(any(check["fatal"] and not check["passed"] for check in checks_by_name.values()))
    for name, check in checks_by_name.items():
        # after twelve steps memory need not help, and times vary
        if check["fatal"] and not name.startswith("A memory of"):
            assert check["passed"], check
    assert len(checks_by_name) == 8


def test_the_quickstart_draws_its_page(finished: tuple[Path, int]) -> None:
    out, _ = finished
    names = {path.name for path in (out / "figures").iterdir()}
    assert names == {"bits-per-byte.png", "resident-memory.png", "speed.png", "memory-length.png", "training.png"}
    html = (out / "report.html").read_text()
    assert re.findall(r"<h2[^>]*>([^<]+)", html)[0] == "What came out"
    report = json.loads((out / "report.json").read_text())
    longest = max(report["memory"], key=int)
    gain = judged(report["memory"][longest]["minus_none"])
    assert (
        f"the loss with a memory of {int(longest):,} bytes {gain} per byte." in report["recommendation"]["reasons"][0]
    )
    passed = sum(check["passed"] for check in report["checks"])
    assert report["recommendation"]["answer"].startswith(f"{passed} of {len(report['checks'])} checks pass")
    assert html.count("data:image/png;base64,") == 4 * len(names), "light and dark, for a laptop and for a phone"
    assert "http" not in without_pixels(html).replace("http-equiv", "")
    assert f"longspan eval {out / 'run'}" in html


def test_the_quickstart_keeps_its_numbers(finished: tuple[Path, int]) -> None:
    report = json.loads((finished[0] / "report.json").read_text())
    assert report["stream"]["equal"] == report["stream"]["compared"] == 2048
    assert [record["bytes"] for record in report["stream"]["records"]][-1] == 9000
    seconds = [record["seconds"] for record in report["stream"]["records"]]
    assert seconds == sorted(seconds)
    assert list(report["memory"]) == ["0", "4", "8", "16", "32", "64"]
    assert report["training"][-1]["step"] == 12
    assert report["written"]["prompt"]


def test_the_quickstart_reuses_a_model_and_keeps_other_files(
    longspan: Callable[..., Outcome], finished: tuple[Path, int], folder: Path, byte_run: Path, tmp_path: Path
) -> None:
    arguments = ["quickstart-lm", "--recipe", folder / "bytes.toml", "--text", folder / "long.txt", "-o", tmp_path]
    assert "no trained model to reuse" in longspan(*arguments, "--reuse").error.splitlines()[-1]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine").write_text("precious")
    assert "not a training run" in longspan(*arguments).error
    assert (tmp_path / "run" / "mine").read_text() == "precious"


def test_the_quickstart_rejects_unfit_texts_and_recipes(
    longspan: Callable[..., Outcome], folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "short.txt").write_text("short")
    options = ["--recipe", folder / "bytes.toml", "-o", tmp_path / "out"]
    assert "too few" in longspan("quickstart-lm", *options, "--text", tmp_path / "short.txt").error
    assert "no such file" in longspan("quickstart-lm", *options, "--text", tmp_path / "none.txt").error
    options = ["--text", folder / "long.txt", "--set", "model.mixers.0.name=window"]
    assert "transformer_xl" in longspan("quickstart-lm", "--recipe", folder / "bytes.toml", *options).error


def test_the_recipe_resolves() -> None:
    recipe = read_toml(find_recipe("quickstart-lm.toml"))
    resolved = resolve(recipe)
    assert resolved["model"]["mixers"][0]["name"] == "transformer_xl"
    assert resolved["task"] == resolve_task({"source": "sotu"})
    assert resolved["train"]["minutes"] == 3


def evaluation(bits_per_byte: Sequence[float]) -> Evaluation:
    bits = np.array(bits_per_byte)
    ones = np.full(len(bits), 1000)
    names = tuple(str(index) for index in range(len(bits)))
    return Evaluation(names, bits * 1000 * np.log(2), ones, ones, ones)


def records(count: int, *, resident: int = 1000, speed: float = 100.0, grows: int = 0) -> list[dict[str, Any]]:
    return [
        {
            "bytes": 100 * (index + 1),
            "seconds": 100 * (index + 1) / speed,
            "resident": resident + grows * index,
            "peak": resident + grows * index,
            "bits_per_byte": 2.0,
            "state_bytes": 2136,
        }
        for index in range(count)
    ]


@pytest.fixture
def verdicts(folder: Path, byte_run: Path, tmp_path: Path) -> Verdicts:
    """The verdicts on a stream, by the first words of the checks."""

    def call(
        *,
        first: list[dict[str, Any]] | None = None,
        second: list[dict[str, Any]] | None = None,
        equal: int = 2048,
        memory: dict[int, Evaluation] | None = None,
    ) -> dict[str, Check]:
        recipe = read_toml(folder / "bytes.toml")
        plan = make_plan(recipe, tmp_path, str(folder / "long.txt"))
        (tmp_path / "run").symlink_to(byte_run)
        streamed = Streamed(first or records(45), second or records(45), equal, 2048)
        memory = memory or {0: evaluation([2.2, 2.4, 2.0]), 16: evaluation([2.1, 2.3, 1.9])}
        performed = checks.check(plan, memory, streamed, Clock())
        return {check.name.split()[0] + " " + check.name.split()[1]: check for check in performed}

    return call


def test_sound_numbers_pass(verdicts: Verdicts) -> None:
    by_words = verdicts()
    state = by_words.pop("The state")
    assert all(check.passed for check in by_words.values()), by_words
    assert state.bar == "one size"


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("A memory", {"memory": {0: evaluation([2.2, 2.4, 2.0]), 16: evaluation([2.1, 2.5, 2.0])}}),
        ("A stream", {"equal": 2047}),
        ("The whole", {"second": records(44)}),
        ("Peak resident", {"second": records(45, grows=1)}),
    ],
)
def test_a_failure_is_detected(verdicts: Verdicts, name: str, changed: dict[str, Any]) -> None:
    check = verdicts(**changed)[name]
    assert not check.passed
    assert check.fatal
    assert check.verdict == "FAIL"


def test_a_slow_clock_is_reported_only(verdicts: Verdicts) -> None:
    late = records(45)
    for record in late[-9:]:
        record["seconds"] += 100
    check = verdicts(second=late)["The last"]
    assert not check.passed
    assert not check.fatal
    assert check.verdict == "missed"
