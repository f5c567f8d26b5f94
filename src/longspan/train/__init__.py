"""Training on segments of long documents: lanes (contiguous batch rows), truncated BPTT, checkpoints, evaluation."""

from typing import TYPE_CHECKING

from longspan.renames import old_names
from longspan.train.config import StageConfig, TrainConfig
from longspan.train.evaluate import Evaluation, evaluate_text, first_places
from longspan.train.lanes import Batch, Lanes
from longspan.train.log import read_log
from longspan.train.loss import chunked_next_token_loss, next_token_loss, token_nats
from longspan.train.memory_curriculum import MemoryCurriculum, MemoryCurriculumConfig
from longspan.train.memory_evaluation import MemoryEvaluation, evaluate_memory, wilson
from longspan.train.opening import load_run, open_run
from longspan.train.passkey_curriculum import PasskeyCurriculumConfig
from longspan.train.passkey_evaluation import PasskeyEvaluation, evaluate_passkey
from longspan.train.pieces import Pieces
from longspan.train.progress import Display, LiveDisplay, PlainDisplay
from longspan.train.recipes import find_recipe, locate_recipe, recipe_names
from longspan.train.run import resolve, run
from longspan.train.statistics import Interval, bootstrap, paired_bootstrap, share_bootstrap
from longspan.train.step import DivergedError
from longspan.train.trainer import Result, Trainer

__all__ = [
    "Batch",
    "Display",
    "DivergedError",
    "Evaluation",
    "Interval",
    "Lanes",
    "LiveDisplay",
    "MemoryCurriculum",
    "MemoryCurriculumConfig",
    "MemoryEvaluation",
    "PasskeyCurriculumConfig",
    "PasskeyEvaluation",
    "Pieces",
    "PlainDisplay",
    "Result",
    "StageConfig",
    "TrainConfig",
    "Trainer",
    "bootstrap",
    "chunked_next_token_loss",
    "evaluate_memory",
    "evaluate_passkey",
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

if not TYPE_CHECKING:
    __getattr__ = old_names(__name__, globals())
