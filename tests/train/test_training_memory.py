"""The memory of a training step: a line through two lengths foretells longer ones, and what the process takes."""

import os
import subprocess
import sys
from typing import Any

import pytest

from longspan.models import build_model
from longspan.train.config import TrainConfig
from longspan.train.training_memory import LENGTHS, step_bytes, training_memory

TABLE: dict[str, Any] = {"vocab_size": 256, "dim": 32, "num_layers": 1, "num_heads": 2}


@pytest.mark.parametrize("mixer", ["full", "infini"])
def test_longer_rows_take_what_shorter_ones_foretell(mixer: str) -> None:
    table = TABLE | {"mixers": [{"name": mixer}]}
    config = TrainConfig(lanes=1)
    memory = training_memory(build_model(table), config)
    assert memory.per_token > 0
    longer = TrainConfig(lanes=1, segment_length=sum(LENGTHS))
    assert step_bytes(build_model(table), longer) == pytest.approx(memory.at(sum(LENGTHS)), rel=0.1)
    budget = memory.weights + memory.at(3000)
    assert 2999 <= memory.longest(budget) <= 3000
    assert memory.longest(memory.weights) == 0


# resident bytes at the peak of the second step of a training, above those before the first
MEASURE = """
import sys, tomllib
from longspan.models import build_model
from longspan.process import peak_bytes, resident_bytes
from longspan.train.config import TrainConfig
import longspan.train.training_memory as training_memory
from contextlib import nullcontext
class Untracked(nullcontext):
    def track_external(self, *_): pass
    def get_tracker_snapshot(self, _): return {"cpu": {"Total": 0}}
training_memory.MemTracker = Untracked
config = TrainConfig(lanes=4, segment_length=int(sys.argv[2]), threads=1)
model = build_model({"vocab_size": 256, "dim": 128, "num_layers": 4, "num_heads": 4, "mixers": [{"name": sys.argv[1]}]})
before = resident_bytes()
training_memory.step_bytes(model, config)
print(peak_bytes() - before)
"""


@pytest.mark.long
@pytest.mark.parametrize("mixer", ["full", "window", "linear", "infini", "sparse", "lsh"])
def test_a_process_takes_what_is_foretold(mixer: str) -> None:
    table = {"vocab_size": 256, "dim": 128, "num_layers": 4, "num_heads": 4, "mixers": [{"name": mixer}]}
    foretold = training_memory(build_model(table), TrainConfig(lanes=4)).at(4096)
    command = [sys.executable, "-c", MEASURE, mixer, "4096"]
    # glibc keeps much of what is freed in a heap, which would be up to as much again; so it shall not use one
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    taken = int(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout)
    assert taken == pytest.approx(foretold, rel=0.15)
