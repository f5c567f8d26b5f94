import pytest

from longspan.cost import OPT, recurrent_ratio


@pytest.mark.parametrize(
    ("name", "ratio"), [("125M", 294.8), ("1.3B", 154.1), ("6.7B", 82.5), ("30B", 48.9), ("175B", 29.3)]
)
def test_the_recurrent_memory_reports_ratios(name: str, ratio: float) -> None:
    assert round(recurrent_ratio(OPT[name]), 1) == ratio
