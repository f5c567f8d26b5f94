"""Training on segments of long documents: lanes, truncated backpropagation through time, checkpoints, evaluation."""

from longspan.train.answers import Answers, evaluate_answers, wilson
from longspan.train.config import TrainConfig
from longspan.train.depths import Depths, evaluate_depths
from longspan.train.evaluate import Evaluation, evaluate_text, first_places
from longspan.train.lanes import Batch, Lanes
from longspan.train.log import read_log
from longspan.train.loop import Result
from longspan.train.loss import chunked_next_token_loss, next_token_loss, token_nats
from longspan.train.opening import load_run, open_run
from longspan.train.progress import Live, Plain, Silent
from longspan.train.recall import Curriculum, CurriculumConfig
from longspan.train.recipes import find_recipe, locate_recipe, recipe_names
from longspan.train.retrieval import RetrievalConfig
from longspan.train.run import resolve, run
from longspan.train.statistics import Interval, bootstrap, paired_bootstrap, share_bootstrap
from longspan.train.step import DivergedError
from longspan.train.trainer import Trainer

__all__ = [
    "Answers",
    "Batch",
    "Curriculum",
    "CurriculumConfig",
    "Depths",
    "DivergedError",
    "Evaluation",
    "Interval",
    "Lanes",
    "Live",
    "Plain",
    "Result",
    "RetrievalConfig",
    "Silent",
    "TrainConfig",
    "Trainer",
    "bootstrap",
    "chunked_next_token_loss",
    "evaluate_answers",
    "evaluate_depths",
    "evaluate_text",
    "find_recipe",
    "first_places",
    "load_run",
    "locate_recipe",
    "next_token_loss",
    "open_run",
    "paired_bootstrap",
    "read_log",
    "recipe_names",
    "resolve",
    "run",
    "share_bootstrap",
    "token_nats",
    "wilson",
]
