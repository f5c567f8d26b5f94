"""The recommendation with which a report begins: on the page, in Markdown and in JSON, for every kind of report."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from longspan.cli import transfer_page
from longspan.experiments import claims
from longspan.experiments.checks import Check, conclusion
from longspan.experiments.claims.base import Figure, Outcome
from longspan.report import Recommendation, Section, Text, page, write_report
from longspan.report.markdown import markdown

WHOLE = Recommendation(answer="Take <a>.", reasons=["1 < 2."], limits=["One seed."], commands=["longspan runs", "ls"])


def test_a_page_has_the_answer_its_lists_and_commands() -> None:
    html = page("Title", [Section("What to take", [WHOLE])])
    assert "<strong>Take &lt;a&gt;.</strong>" in html
    assert re.findall(r"<li>([^<]*)</li>", html) == ["1 &lt; 2.", "One seed."]
    assert "What limits this answer:" in html
    assert "longspan runs\nls</pre>" in html


def test_empty_parts_leave_no_heading() -> None:
    short = Recommendation(answer="Take a.")
    html = page("Title", [Section("What to take", [short])])
    for missing in ("<li>", "What limits this answer", "Next:", "<ul>"):
        assert missing not in html
    assert markdown("Title", [Section("What to take", [short])]) == "# Title\n\n## What to take\n\n**Take a.**\n"


def test_markdown_and_json_have_the_same(tmp_path: Path) -> None:
    write_report(tmp_path, "Title", [Section("What to take", [WHOLE]), Section("More", [Text("a")])], {"more": 1})
    text = (tmp_path / "report.md").read_text()
    assert (
        "**Take <a>.**\n\n- 1 < 2.\n\nWhat limits this answer:\n\n- One seed.\n\nNext:\n\n```\nlongspan runs\nls\n```"
        in text
    )
    assert json.loads((tmp_path / "report.json").read_text())["recommendation"] == {
        "answer": "Take <a>.",
        "reasons": ["1 < 2."],
        "limits": ["One seed."],
        "commands": ["longspan runs", "ls"],
    }
    write_report(tmp_path, "Title", [Section("More", [Text("a")])], {})
    assert "recommendation" not in json.loads((tmp_path / "report.json").read_text())


def check(name: str, **fields: Any) -> Check:
    return Check(**{"name": name, "value": "1", "bar": "2", "passed": True, **fields})


@pytest.mark.parametrize(
    ("checks", "answer", "limits"),
    [
        ([check("a"), check("b")], "2 of 2 checks pass.", 0),
        ([check("a"), check("b", passed=False)], "1 of 2 checks pass; failed: b.", 0),
        ([check("a"), check("slow", passed=False, fatal=False)], "1 of 2 checks pass, none fails.", 1),
        ([check("a"), check("few", passed=False, undecided=True)], "1 of 2 checks pass, none fails.", 1),
    ],
)
def test_a_quickstart_says_what_passed(checks: list[Check], answer: str, limits: int) -> None:
    said = conclusion(checks, [], [])
    assert said.answer == answer
    assert len(said.limits) == limits


def transferred(after: float, **fields: Any) -> dict[str, Any]:
    """The report of a transfer of two layers."""
    layers = [{"layer": index, "error_before": 0.8, "error_after": after * (index + 1)} for index in range(2)]
    return {"layers": layers, "config": {"loss": "heads"}, "softmax_layers": [], "divergence": None, **fields}


def test_a_transfer_says_what_its_layers_reached(tmp_path: Path) -> None:
    learned = transfer_page.conclusion(transferred(0.2), tmp_path)
    assert learned.answer == "The mean relative error of 2 layers fell from 0.8 to 0.3."
    assert "layer 1, 0.4" in learned.reasons[0]
    assert any("--distill" in limit for limit in learned.limits)
    worse = transfer_page.conclusion(transferred(0.9, divergence=(0.5, 0.25), softmax_layers=[1]), tmp_path)
    assert worse.answer == "The mean relative error of 2 layers did not fall: from 0.8 to 1.35."
    assert any("0.25 nats per token" in reason for reason in worse.reasons)
    assert any("Layers 1 keep softmax" in reason for reason in worse.reasons)
    assert not any("--distill" in limit for limit in worse.limits)
    path = transfer_page.write_page(transferred(0.2), tmp_path / "out")
    assert path == tmp_path / "out" / "report" / "report.html"
    assert re.findall(r"<h2[^>]*>([^<]+)", path.read_text())[0] == "What came out"


def test_a_claim_says_whether_it_holds(tmp_path: Path) -> None:
    claim = claims.find("rmt-flops")
    outcome = Outcome(verdict="holds in part", figures=[Figure("ratio", "29", "28.5")], size="sizes", note="Why not.")
    text = claims.write_page(tmp_path, claim, "full", outcome).read_text()
    assert f"<strong>Holds in part: {claim.text}</strong>" in text
    assert "ratio: 28.5." in text
    assert "Why not." in text
    assert "longspan reproduce rmt-flops --full" in text
