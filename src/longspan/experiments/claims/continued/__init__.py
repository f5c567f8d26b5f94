"""Comparisons of models that continue from a common trained start (`train.init`).

A claim is a list of models (`ModelSpec`), the pairs on which its verdict hangs, and a function that judges the results;
everything else is shared: training in worker processes, curves, shares of the way from window attention to dense
attention, losses by position and by distance, tables and figures.
"""

from longspan.comparison.results import EQUAL
from longspan.experiments.claims.continued.comparison import Comparison, Judgment, measure_with
from longspan.experiments.claims.continued.criteria import (
    Criterion,
    ahead,
    as_good,
    criteria_text,
    grade,
    if_flat,
)
from longspan.experiments.claims.continued.plan import CEILING, FLOOR, ModelSpec, Plan, from_recipe
from longspan.experiments.claims.continued.remedies import Look, Remedy, another_rate, changed_model
from longspan.experiments.claims.continued.report import bit_figures
from longspan.experiments.claims.continued.results import Pair, Results
from longspan.experiments.claims.continued.sizes import plans
from longspan.experiments.claims.continued.trained import TrainedRuns

__all__ = [
    "CEILING",
    "EQUAL",
    "FLOOR",
    "Comparison",
    "Criterion",
    "Judgment",
    "Look",
    "ModelSpec",
    "Pair",
    "Plan",
    "Remedy",
    "Results",
    "TrainedRuns",
    "ahead",
    "another_rate",
    "as_good",
    "bit_figures",
    "changed_model",
    "criteria_text",
    "from_recipe",
    "grade",
    "if_flat",
    "measure_with",
    "plans",
]
