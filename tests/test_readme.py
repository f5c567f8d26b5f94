"""The code in the README and in the documents that continue it runs unchanged."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
LONGEST = 150
"""lines of the README"""
TEXTS = [path.read_text(encoding="utf-8") for path in (README, *sorted((ROOT / "docs").glob("*.md")))]
CODES = [code for text in TEXTS for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL)]


@pytest.mark.parametrize("code", CODES)
def test_code_runs(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(code, str(README), "exec"), {})


def test_the_chinese_readme_has_the_same_code_rows_and_sections() -> None:
    english, chinese = (path.read_text(encoding="utf-8") for path in (README, ROOT / "README.zh.md"))
    for pattern in (r"```.*?```", r"(?m)^\| `\w+`", r"(?m)^## |^- ", r"\]\(((?!README)[^)]+)\)"):
        assert re.findall(pattern, english, re.DOTALL) == re.findall(pattern, chinese, re.DOTALL)


@pytest.mark.parametrize("path", [README, ROOT / "README.zh.md"], ids=lambda path: path.name)
def test_the_readme_is_short_and_its_links_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= LONGEST
    links = re.findall(r"\]\((?!http)([^)#]+)\)", text)
    assert len(links) > 8
    assert [link for link in links if not (ROOT / link).is_file()] == []


def test_import_loads_nothing_heavy() -> None:
    import subprocess
    import sys

    heavy = "matplotlib", "rich", "typer", "tokenizers", "jinja2", "transformers", "scipy"
    code = f"import sys, longspan; print([m for m in {heavy} if m in sys.modules])"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert process.stdout.strip() == "[]"
