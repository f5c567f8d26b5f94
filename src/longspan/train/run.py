"""Runs: a recipe and a folder in, a trained model out.

    FOLDER/recipe.json      the recipe with every default filled in
    FOLDER/log.jsonl        one line per logged step and per evaluation
    FOLDER/tokenizer.json   what text was cut into
    FOLDER/checkpoints/     see `longspan.train.checkpoint`
    FOLDER/model/           the trained model, when the run is over
"""

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from longspan import __version__, tasks
from longspan.config import from_dict, nearest, to_dict
from longspan.errors import CheckpointError, ConfigError, LongspanError
from longspan.files import read_json, write_json
from longspan.models import Decoder, DecoderConfig, load_model, save_model
from longspan.tasks import Task
from longspan.train import checkpoint as checkpoints
from longspan.train import folders
from longspan.train.config import TrainConfig
from longspan.train.distributed import Group, process_group
from longspan.train.progress import Silent, make
from longspan.train.trainer import Result, Trainer
