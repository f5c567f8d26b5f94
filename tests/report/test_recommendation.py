"""The recommendation with which a report begins: on the page, in Markdown and in JSON, for every kind of report."""

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from longspan.cli import lm_page, transfer_page
from longspan.cli.evaluate import EvaluateOptions
from longspan.cli.lm import Figures, Reading
from longspan.experiments import claims
from longspan.experiments.checks import Check, conclusion
from longspan.experiments.claims.base import Figure, Outcome
from longspan.report import Recommendation, Section, Text, page, write_report
from longspan.report.markdown import markdown
from longspan.report.tables import judged, signed
from longspan.train import Interval
from longspan.train.lm_evaluation import Bucket, TextCounts
from longspan.train.reading_cost import ReadingCost

WHOLE = Recommendation(answer="Take <a>.", reasons=["1 < 2."], limits=["One seed."], commands=["longspan runs", "ls"])


def headings(html: str) -> list[str]:
    """The titles of the sections of a page."""
    return re.findall(r"<h2[^>]*>([^<]+)", html)


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
    assert learned.answer == "The mean relative error of 2 converted layers fell from 0.8 to 0.3."
    assert "layer 1, 0.4" in learned.reasons[0]
    assert any("--distill" in limit for limit in learned.limits)
    worse = transfer_page.conclusion(transferred(0.9, divergence=(0.5, 0.25), softmax_layers=[1]), tmp_path)
    assert worse.answer == "The mean relative error of 1 converted layer did not fall: from 0.8 to 0.9."
    assert any("0.25 nats per token" in reason for reason in worse.reasons)
    assert "layer 0, 0.9" in worse.reasons[0], "layer 1 has the larger error, but computes softmax again"
    assert any("Layers 1 keep softmax" in reason for reason in worse.reasons)
    assert not any("--distill" in limit for limit in worse.limits)
    none = transfer_page.conclusion(transferred(0.2, softmax_layers=[0, 1]), tmp_path)
    assert none.answer == "All layers compute softmax again."
    path = transfer_page.write_page(transferred(0.2), tmp_path / "out")
    assert path == tmp_path / "out" / "report" / "report.html"
    assert headings(path.read_text())[0] == "What came out"


def test_a_claim_says_whether_it_holds(tmp_path: Path) -> None:
    claim = claims.find("rmt-flops")
    outcome = Outcome(verdict="holds in part", figures=[Figure("ratio", "29", "28.5")], size="sizes", note="Why not.")
    text = claims.write_page(tmp_path, claim, "full", outcome).read_text()
    assert f"<strong>Holds in part: {claim.text}</strong>" in text
    assert "ratio: 28.5; in the paper: 29." in text
    assert "Why not." in text
    assert "longspan reproduce rmt-flops --full" in text
    assert headings(text)[0] == "What came out"
    other = Outcome(verdict="does not hold", figures=[Figure("ratio", "29", "3")], size="sizes", note="")
    text = claims.write_page(tmp_path, claim, "full", other).read_text()
    assert f"<strong>Does not hold: {claim.text}</strong>" in text
    assert "ratio: 3; in the paper: 29." in text
    assert "28.5" not in text
    assert "Why not." not in text


@pytest.mark.parametrize(
    ("difference", "words"),
    [
        ((-0.2, -0.3, -0.1), "is better: −0.20 [−0.30, −0.10] bits"),
        ((0.2, 0.1, 0.3), "is worse: +0.20 [+0.10, +0.30] bits"),
        ((0.1, -0.1, 0.3), "may be equal: +0.10 [−0.10, +0.30] bits"),
        ((0.1, 0.0, 0.2), "may be equal: +0.10 [+0.00, +0.20] bits"),
        ((-0.2, math.nan, math.nan), "differs by −0.20 bits, without an interval"),
    ],
)
def test_a_difference_is_judged_by_its_interval(difference: tuple[float, float, float], words: str) -> None:
    assert judged(difference, 2) == words


def evaluated(gain: Interval, far: Interval, **fields: Any) -> Figures:
    """The figures of a converted model beside its original attention, which has one gain in all and one far on."""
    counts = np.array([100])
    readings = {name: Reading(None, {"bits_per_byte": Interval(2.0, 1.9, 2.1)}) for name in ("carried", "original")}
    ranges: list[tuple[int, int, Interval]] = [(0, 64, Interval(0.5, 0.4, 0.6)), (64, 128, far)]
    parts: dict[str, Any] = {
        "options": EvaluateOptions(run="out/endless"),
        "counts": TextCounts(("a",), counts, counts, counts, counts, (np.ones(100),), (np.zeros(100),), ((b"a",),)),
        "words": (10, "white space"),
        "readings": readings,
        "gain": {"original": gain},
        "by_place": [
            Bucket(first=first, last=last, amount=64, values={}, gains={"original": value})
            for first, last, value in ranges
        ],
        "by_frequency": [],
        "costs": {
            "carried": ReadingCost(tokens=1000, first_token=2.0, next_token=0.1, state_bytes={2048: 1024, 32768: 1024}),
            "original": ReadingCost(
                tokens=1000, first_token=4.0, next_token=0.1, state_bytes={2048: 2048, 32768: 32768}
            ),
        },
        "notes": [],
    }
    return Figures(**{**parts, **fields})


UNKNOWN = Interval(math.nan, math.nan, math.nan)


def test_an_evaluation_says_whether_the_conversion_is_as_good() -> None:
    worse = lm_page.conclusion(evaluated(Interval(0.2, 0.1, 0.3), UNKNOWN))
    assert worse.answer.endswith("Relative to original it is worse: +0.2000 [+0.1000, +0.3000] bits.")
    assert "carried reads 500 tokens per second and keeps 1.0 KiB after 32,768" in worse.reasons[-1]
    assert "original reads 250 tokens per second and keeps 32.0 KiB after 32,768" in worse.reasons[-1]
    assert worse.limits == []
    equal = lm_page.conclusion(evaluated(Interval(0.1, -0.1, 0.3), UNKNOWN, costs={}))
    assert "Relative to original it may be equal" in equal.answer
    assert equal.limits[0] == "Where losses may be equal, more documents would tell."
    assert "were not measured" in equal.limits[1]


def test_an_evaluation_compares_where_both_models_read() -> None:
    partly = lm_page.conclusion(evaluated(UNKNOWN, Interval(-0.2, -0.3, -0.1)))
    assert "it is better: −0.2000 [−0.3000, −0.1000] bits at positions 64 to 127" in partly.answer
    first = lm_page.conclusion(evaluated(UNKNOWN, UNKNOWN))
    assert "it is worse: +0.5000 [+0.4000, +0.6000] bits at positions 0 to 63" in first.answer
    nothing = lm_page.conclusion(evaluated(UNKNOWN, UNKNOWN, by_place=[]))
    assert "original reads too little of these documents" in nothing.answer
    assert not any("nan" in said.text for said in (partly, first, nothing))


def test_a_rounded_zero_has_no_minus() -> None:
    assert signed((-0.00001, -0.2, 0.00001), 1) == "+0.0 [−0.2, +0.0]"
