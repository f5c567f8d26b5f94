"""Memory of activations in a training step: bytes that autograd saves, and the peak of a process (Linux)."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from longspan.errors import UnsupportedError
from longspan.models import Decoder, DecoderConfig
from longspan.process import forget_peak, peak_bytes, resident_bytes

MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "ffn_chunk": {"ffn_chunk": 256},
    "checkpoint": {"checkpoint": True},
    "reversible": {"reversible": True},
    "reversible, ffn_chunk": {"reversible": True, "ffn_chunk": 256},
}
"""Fields of a model, by mode."""


def measure_step(loss: Callable[[], Tensor], parameters: list[Tensor]) -> dict[str, float]:
    """Measure memory and time of a forward and backward pass that computes gradients of `parameters`.

    Returns:
        "saved": bytes that autograd stores after the forward pass, without parameters. "peak": peak resident bytes
        minus those before the pass and minus the gradients of the parameters. "seconds": CPU time.
    """
    own = {p.untyped_storage().data_ptr() for p in parameters}
    saved: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        """Count the bytes of a tensor that autograd saves, unless it is a parameter; return the tensor unchanged."""
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return t

    if not forget_peak():
        raise UnsupportedError("peak memory is read from /proc, which exists on Linux only; run this claim there")
    before, begin = resident_bytes(), time.process_time()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        total = loss()
    size = sum(saved.values())
    total.backward()
    seconds = time.process_time() - begin
    gradients = sum(p.numel() * p.element_size() for p in parameters)
    peak = peak_bytes()
    assert before is not None
    assert peak is not None
    return {"saved": size, "peak": peak - before - gradients, "seconds": seconds}


def blocks(mode: str, layers: int, length: int, dim: int, mixers: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Measure a training step of a model with 4 heads and dropout on one text of random tokens.

    Args:
        mode: a key of `MODES`.
        layers, dim, mixers: fields of the model.
        length: number of tokens.
    """
    torch.manual_seed(0)
    fields = {"vocab_size": 64, "dim": dim, "num_heads": 4, "mixers": tuple(mixers), "dropout": 0.1, **MODES[mode]}
    model = Decoder(DecoderConfig(num_layers=layers, **fields)).train()
    text = torch.randint(64, (1, length))
    model(text[:, :300])[0].sum().backward()  # warm-up: loads libraries before memory is counted
    model.zero_grad(set_to_none=True)
    return measure_step(lambda: model(text)[0].square().mean(), list(model.parameters()))


def in_own_process(command: Sequence[str]) -> Any:
    """Run a Python program in a separate process, whose peak memory is then its own, and return the JSON it prints.

    malloc gives every tensor pages of its own there, so freed memory returns to the system and fragmentation does not
    count as memory in use.

    Args:
        command: arguments of the Python interpreter.
    """
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "16384", "MALLOC_MMAP_MAX_": "1000000"}
    process = subprocess.run([sys.executable, *command], check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(process.stdout)


def blocks_alone(*arguments: Any, threads: int = 1) -> dict[str, float]:
    """Return `blocks(*arguments)`, measured in a separate process with a number of threads."""
    (record,) = blocks_in_process([arguments], threads=threads)
    return record


def blocks_in_process(runs: Sequence[Sequence[Any]], threads: int = 1) -> list[dict[str, float]]:
    """Return `blocks` of the arguments of each run, measured one after another in one separate process."""
    if not runs:
        return []
    code = "import json, sys; from longspan.experiments.claims.activations import main; main(*json.loads(sys.argv[1]))"
    records: list[dict[str, float]] = in_own_process(["-c", code, json.dumps([threads, runs])])
    return records


def main(threads: int, runs: Sequence[Sequence[Any]]) -> None:
    """Run `blocks` with the arguments of each run and print a JSON list; the program of `blocks_in_process`."""
    torch.set_num_threads(threads)
    print(json.dumps([blocks(*arguments) for arguments in runs]))
