"""Resident memory that a process takes for a training step, measured at two lengths in processes of their own.

The allocator keeps much of what tensors gave back, by a share that depends on the mechanism: a process of its own for
each length gives what a training really takes. It grows with the tokens of a row nearly as the bytes of tensors do:
blocks of 32 MiB and more are given back at once, so long rows may take less or more than a line.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from longspan.config import from_dict, to_dict
from longspan.errors import LongspanError, UnsupportedError
from longspan.models import build_model
from longspan.process import forget_peak, peak_bytes, resident_bytes
from longspan.train import pretrained
from longspan.train.config import TrainConfig
from longspan.train.training_memory import (
    TrainingMemory,
    check_measurable,
    line_through,
    measured_lengths,
    training_on_random_text,
)

STEPS = 2
"""the first one creates the state of the optimizer"""


def process_memory(table: Mapping[str, Any], config: TrainConfig) -> TrainingMemory:
    """Measure how the resident memory of a process that trains grows with the length of a row.

    Args:
        table: `[model]` of a causal language model.
        config: of the training; its `segment_length` is replaced.

    Returns:
        The memory; its `weights` are all that is resident after imports and construction.

    Raises:
        UnsupportedError: the system does not report the memory of a process, the model does not read a text, or a
            process failed.
    """
    model = build_model(table)
    check_measurable(model)
    lengths = measured_lengths(model)
    del model
    first, last = (in_a_process(table, replace(config, segment_length=length)) for length in lengths)
    return line_through(
        lengths,
        (first["taken"], last["taken"]),
        rows=config.lanes,
        weights=max(first["resident"], last["resident"]),
    )


def measure(table: Mapping[str, Any], config: TrainConfig) -> dict[str, int]:
    """Return the resident bytes of this process after construction, and the further ones at the peak of two steps.

    Raises:
        UnsupportedError: the system does not report the memory of a process.
    """
    if pretrained.is_pretrained({"model": table}):
        pretrained.register_kind()
    model = build_model(table)
    resident, can_measure = resident_bytes(), forget_peak()
    optimization, text = training_on_random_text(model, config, STEPS)
    for step in range(STEPS):
        optimization.step(text, step, 1e-6)
    peak = peak_bytes()
    if resident is None or peak is None or not can_measure:
        raise UnsupportedError("this system does not report the memory of a process; Linux does")
    return {"resident": resident, "taken": max(peak - resident, 0)}


def in_a_process(table: Mapping[str, Any], config: TrainConfig) -> dict[str, int]:
    """Return what `measure` returns in a fresh process; raises UnsupportedError where that fails."""
    task = {"model": dict(table), "train": to_dict(config), "threads": torch.get_num_threads()}
    paths = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-m", "longspan.train.process_memory"],
        input=json.dumps(task),
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
    )
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise UnsupportedError(f"measuring a training step failed: {reason}")
    return dict(json.loads(lines[-1]))


def _main(task: Mapping[str, Any]) -> None:
    """Print what `measure` returns for a task that another process wrote."""
    torch.set_num_threads(task["threads"])
    config: TrainConfig = from_dict(TrainConfig, task["train"], "train")
    try:
        print(json.dumps(measure(task["model"], config)))
    except LongspanError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    _main(json.load(sys.stdin))
