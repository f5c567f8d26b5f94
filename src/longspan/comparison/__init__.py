"""Comparisons of language models: train several from a common start, read the same held-out text with all of them, or
let them answer the same samples of a task, and say which one to take.

    measure, answers    measures a run on a text, or on samples of a task; `reading` chooses between them
    maps                what a run reads: weights by distance, gates and the like
    results             statistics: intervals, differences, which models are as good as the best
    training            trains the runs, which may exist already
    advice, report      the recommendation and the page; `answers_report` has what is special to tasks
"""

from longspan.comparison.answers import ComparedAnswers, Samples, measure_answers
from longspan.comparison.measure import HeldOut, measure_run
from longspan.comparison.results import Compared

__all__ = ["Compared", "ComparedAnswers", "HeldOut", "Samples", "measure_answers", "measure_run"]
