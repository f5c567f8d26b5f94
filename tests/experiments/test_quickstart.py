"""A quickstart of a few seconds with the code of the real one, `eval` of its run, and `reproduce`."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.cli.command import Outcome
from tests.cli.pages import without_pixels

from longspan.config import read_toml
from longspan.experiments import claims
from longspan.experiments.quickstart import measure
from longspan.experiments.quickstart.page import mark_all
from longspan.experiments.tour import Clock
from longspan.files import read_json
from longspan.report.tables import interval
from longspan.train import MemoryEvaluation, find_recipe, resolve, wilson

SMALL = [
    *("model.dim=16", "model.num_heads=2", "task.vocab_size=512", "task.segment_length=96"),
    *("model.memory.segment_length=96", "train.minutes=1", "train.steps=4", "train.tokens=800", "train.log_every=1"),
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """The folder of a quickstart, and its exit code."""
    from longspan.cli.app import run

    out = tmp_path_factory.mktemp("quickstart")
    sets = [part for assignment in SMALL for part in ("--set", assignment)]
    return out, run(["quickstart", "-o", str(out), "--longest", "64", "--count", "2", *sets])


def test_the_quickstart_checks_its_claims(finished: tuple[Path, int]) -> None:
    out, code = finished
    report = json.loads((out / "report.json").read_text())
    names = [check["name"] for check in report["checks"]]
    assert code == int(any(check["verdict"] == "FAIL" for check in report["checks"]))
    assert [name.split(":")[0] for name in names[:2]] == ["memorize", "detect"]
    assert any(name.startswith("Resident memory at 64") for name in names)
    assert [answer["segments"] for answer in report["answers"]] == [1, 1, 4, 4, 16, 16, 64, 64]
    assert all(answer["n"] == 2 for answer in report["answers"][:8])


def test_the_quickstart_draws_its_page(finished: tuple[Path, int]) -> None:
    out, _ = finished
    names = {path.name for path in (out / "figures").iterdir()}
    assert names == {"accuracy.png", "resident-memory.png", "speed.png", "flops.png", "training.png"}
    html = (out / "report.html").read_text()
    assert re.findall(r"<h2[^>]*>([^<]+)", html)[0] == "What came out"
    report = json.loads((out / "report.json").read_text())
    last = [answer for answer in report["answers"] if answer["segments"] == 64]
    right, count = sum(answer["k"] for answer in last), sum(answer["n"] for answer in last)
    share = interval(wilson(right, count), 2)
    assert f"answered {right} of {count} questions, a share of {share}." in report["recommendation"]["reasons"][0]
    passed = sum(check["passed"] for check in report["checks"])
    assert report["recommendation"]["answer"].startswith(f"{passed} of {len(report['checks'])} checks pass")
    assert html.count("data:image/png;base64,") == 4 * len(names), "light and dark, for a laptop and for a phone"
    assert "http" not in without_pixels(html).replace("http-equiv", "")


def test_eval_answers_questions_of_a_memory_task(finished: tuple[Path, int], longspan: Callable[..., Outcome]) -> None:
    run = finished[0] / "run"
    records = json.loads(longspan("eval", run, "--segments", "1,3", "--count", "4", "--json").out)
    assert [(record["segments"], record["n"]) for record in records] == [(1, 4), (3, 4)]
    shown = longspan("eval", run, "--segments", "2", "--count", "2").out
    assert "of 2" in shown
    assert "whole numbers" in longspan("eval", run, "--segments", "a").error
    assert "generates its own questions" in longspan("eval", run, "kjv").error


def test_the_quickstart_rejects_other_recipes(longspan: Callable[..., Outcome], tmp_path: Path) -> None:
    recipe = find_recipe("tiny.toml")
    assert "memory task" in longspan("quickstart", "--recipe", recipe, "-o", tmp_path).error
    assert "no trained model" in longspan("quickstart", "--reuse", "-o", tmp_path).error


def answers(
    kind: str, segments: int, right: int, wrong: int, resident: int = 100, seconds: float = 1.0
) -> measure.Reading:
    measured = MemoryEvaluation(
        kind, segments, segments * 499, [True] * right + [False] * wrong, [False] * (right + wrong)
    )
    measured.seconds, measured.resident = seconds * segments, resident
    return measure.Reading(segments, {kind: measured})


def verdicts_of(*readings: measure.Reading) -> dict[str, str]:
    checks = measure.check(list(readings), Clock())
    return {name: next((c.verdict for c in checks if c.name.endswith(name)), "") for name in ("the bar", "the goal")}


def test_checks_compare_intervals_with_their_bars() -> None:
    short, far = answers("detect", 16, 128, 0), answers("detect", 4096, 4, 0)
    # 159 of 160: from 0.966; 4 of 4 may come from 0.51
    assert verdicts_of(short, answers("detect", 256, 31, 1), far) == {"the bar": "pass", "the goal": "n too small"}
    assert verdicts_of(answers("detect", 16, 94, 6), far)["the bar"] == "n too small"
    assert verdicts_of(answers("detect", 16, 80, 20), far)["the bar"] == "FAIL"
    # one length below the bar fails, however good the others are
    assert verdicts_of(answers("detect", 16, 1000, 0), answers("detect", 256, 24, 8))["the bar"] == "FAIL"
    assert verdicts_of(short, answers("detect", 4096, 1, 3))["the goal"] == "missed"
    assert verdicts_of(answers("detect", 16, 1, 0))["the bar"] == "n too small"


def test_undecided_checks_and_goals_do_not_fail_the_quickstart() -> None:
    readings = [
        answers("detect", 16, 4, 0),
        answers("detect", 256, 2, 0, resident=100),
        answers("detect", 1024, 0, 4, resident=106),
    ]
    failed = [check.name for check in measure.check(readings, Clock()) if check.failed]
    assert len(failed) == 1
    assert failed[0].startswith("Resident memory at 1,024")
    assert measure.plan(4096, 64) == [(1, 64), (4, 64), (16, 64), (64, 64), (256, 32), (1024, 4), (4096, 4)]


def test_marked_passages_keep_the_text() -> None:
    pieces = mark_all("a John went home. b Where is John? c", ["John went home.", "Where is John?", "absent"])
    assert [text for text, marked in pieces if marked] == ["John went home.", "Where is John?"]
    assert "".join(text for text, _ in pieces) == "a John went home. b Where is John? c"


def test_the_recipes_resolve() -> None:
    for name in ("rmt.toml", "rmt-reasoning.toml"):
        assert resolve(read_toml(find_recipe(name)))["train"]["max_segments"] <= 7


def test_reproduce_lists_and_runs_claims_and_writes_docs(longspan: Callable[..., Outcome], tmp_path: Path) -> None:
    assert "rmt-flops" in longspan("reproduce").out
    assert "did you mean 'rmt-flops'" in longspan("reproduce", "rmt-flop").error
    reproduced = longspan("reproduce", "rmt-flops", "--docs", tmp_path, "-o", tmp_path / "out")
    assert "294.8" in reproduced.out
    assert "29.3" in reproduced.out
    assert read_json(tmp_path / "claims" / "rmt-flops.json")["verdict"] == "holds"
    page = (tmp_path / "claims.md").read_text()
    assert "## rmt-flops" in page
    assert "(claims/rmt-flops.png)" in page
    assert (tmp_path / "claims" / "rmt-flops.png").read_bytes()[:4] == b"\x89PNG"
    assert "no results yet" in longspan("reproduce", "--docs", tmp_path / "none").error


def test_the_page_of_claims_is_generated_from_the_results() -> None:
    from pathlib import Path

    docs = Path(__file__).parents[2] / "docs"
    assert (docs / "claims.md").read_text() == claims.markdown(claims.read_results(docs / "claims", claims.names()))
