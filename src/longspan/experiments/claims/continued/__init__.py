"""Comparisons of models that continue from a common trained start (`train.init`).

A claim is a list of models (`ModelSpec`), the pairs on which its verdict hangs, and a function that judges the results;
everything else is shared: training in worker processes, curves, shares of the way from window attention to dense
attention, losses by position and by distance, tables and figures.
"""

from longspan.experiments.claims.continued.comparison import Comparison, Judgment
from longspan.experiments.claims.continued.plan import CEILING, FLOOR, ModelSpec, Plan, from_recipe
from longspan.experiments.claims.continued.results import Lead, Pair, Results, leads, verdict_of

__all__ = [
    "CEILING",
    "FLOOR",
    "Comparison",
    "Judgment",
    "Lead",
    "ModelSpec",
    "Pair",
    "Plan",
    "Results",
    "from_recipe",
    "leads",
    "verdict_of",
]
