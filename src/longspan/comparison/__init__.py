"""Comparisons of text models: train several from a common start, read the same held-out text with all of them, and say
which one to take.

Every run is measured on the same bytes (`measure`), the numbers become statistics (`results`), and these a report
(`advice`, `report`). Runs come from `training`, or exist already.
"""

from longspan.comparison.measure import HeldOut, measure_run
from longspan.comparison.results import Compared

__all__ = ["Compared", "HeldOut", "measure_run"]
