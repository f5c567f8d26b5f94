"""The page: self-contained, and what a model wrote is text and never markup."""

import errno
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import pytest

from longspan.errors import CheckpointError
from longspan.experiments.checks import Check, check_table
from longspan.report import (
    Code,
    Picture,
    Quote,
    Section,
    Table,
    Text,
    number,
    page,
    si_bytes,
    write_report,
)

PICTURE = Picture(name="bits", light=b"light png", dark=b"dark png", alt="falling", caption="said below")
CHECKS = [
    Check(name="good", value="1", bar="2", passed=True),
    Check(name="bad", value="3", bar="2", passed=False),
    Check(name="slow", value="3", bar="2", passed=False, fatal=False),
]


def sections() -> list[Section]:
    return [
        Section("Checks", [check_table(CHECKS, "What was measured")]),
        Section("Figures", [PICTURE, Text("A paragraph.")]),
        Section("Words", [Quote("given ", "<script>alert(1)</script>"), Code("longspan --help")]),
        Section("Facts", [Table(columns=("", ""), rows=[("model", "small & quick")])]),
    ]


def test_the_page_is_self_contained() -> None:
    html = page("A title", sections(), lead="What is here.", footer="torch")
    assert "http://" not in html
    assert "https://" not in html
    assert "<script" not in html
    assert "<link" not in html
    assert html.count("data:image/png;base64,") == 2
    assert "prefers-color-scheme: dark" in html
    assert 'name="viewport"' in html


def test_text_is_escaped() -> None:
    html = page("A & B", sections())
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert "<title>A &amp; B</title>" in html
    assert "small &amp; quick" in html


def test_tables_mark_their_rows() -> None:
    html = page("t", sections())
    assert '<td class="pass">pass</td>' in html
    assert '<td class="fail">FAIL</td>' in html
    assert '<td class="note">missed</td>' in html
    assert "<caption><span>What was measured</span></caption>" in html
    # a table without headings has no empty heading row
    assert html.count("<thead>") == 1


def test_a_report_has_a_page_numbers_and_pictures(tmp_path: Path) -> None:
    path = write_report(tmp_path / "out", "Title", sections(), {"found": [1.5, None]})
    assert path == tmp_path / "out" / "report.html"
    assert json.loads((tmp_path / "out" / "report.json").read_text())["found"] == [1.5, None]
    assert (tmp_path / "out" / "figures" / "bits.png").read_bytes() == b"light png"
    assert re.search(r"<h1>Title</h1>", path.read_text())


def test_a_full_disk_leaves_the_last_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_report(tmp_path, "First", sections(), {})

    def full(*_: Any, **__: Any) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(CheckpointError, match=r"could not be saved.*No space left.*earlier file is unchanged"):
        write_report(tmp_path, "Second", sections(), {})
    assert "<h1>First</h1>" in path.read_text()


def test_numbers_are_formatted_for_readers() -> None:
    assert number(-1234.5678, 1) == "−1,234.6"
    assert [si_bytes(count) for count in (0, 1023, 1536, 5 << 20, 3 << 40)] == [
        "0 B",
        "1,023 B",
        "1.5 KiB",
        "5.0 MiB",
        "3,072.0 GiB",
    ]


def test_tables_and_pages_need_no_matplotlib() -> None:
    code = "import sys, longspan.report; print(sorted({'matplotlib', 'jinja2'} & set(sys.modules)))"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert process.stdout.strip() == "[]"
