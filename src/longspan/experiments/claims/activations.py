"""What a training step keeps of its activations: bytes that autograd saves, and the peak of a process (Linux)."""

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
"""Fields of a model, by a name."""


def measure_step(loss: Callable[[], Tensor], parameters: list[Tensor]) -> dict[str, float]:
    """A forward and backward pass, in which `parameters` get their gradients.

    Returns:
        "saved": bytes that autograd holds behind the forward pass, parameters not counted. "peak": bytes resident at
        most above what stood before, less the gradients of the parameters. "seconds": of processor time.
    """
    own = {p.untyped_storage().data_ptr() for p in parameters}
    saved: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return t

    if not forget_peak():
        raise UnsupportedError("the peak of memory is read from /proc, which only Linux has")
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
    """`measure_step` of a model of 4 heads with dropout on one text of random tokens.

    Args:
        mode: of `MODES`.
        layers, dim, mixers: of the model.
        length: tokens.
    """
    torch.manual_seed(0)
    fields = {"vocab_size": 64, "dim": dim, "num_heads": 4, "mixers": tuple(mixers), "dropout": 0.1, **MODES[mode]}
    model = Decoder(DecoderConfig(num_layers=layers, **fields)).train()
    text = torch.randint(64, (1, length))
    model(text[:, :300])[0].sum().backward()  # warm, so that libraries are loaded before memory is counted
    model.zero_grad(set_to_none=True)
    return measure_step(lambda: model(text)[0].square().mean(), list(model.parameters()))


def in_own_process(command: Sequence[str]) -> dict[str, float]:
    """What a Python program prints as JSON, run alone, so that its peak is its own.

    Tensors stand in pages of their own there, so that what is freed is given back and fragments do not count as memory
    in use.

    Args:
        command: arguments of the Python that runs this one.
    """
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "16384", "MALLOC_MMAP_MAX_": "1000000"}
    process = subprocess.run([sys.executable, *command], check=True, stdout=subprocess.PIPE, text=True, env=environment)
    figures: dict[str, float] = json.loads(process.stdout)
    return figures


def blocks_alone(*arguments: Any, threads: int = 1) -> dict[str, float]:
    """`blocks(*arguments)` in a process of its own."""
    code = "import json, sys; from longspan.experiments.claims.activations import main; main(*json.loads(sys.argv[1]))"
    return in_own_process(["-c", code, json.dumps([threads, *arguments])])


def main(threads: int, *arguments: Any) -> None:
    """What the process of `blocks_alone` does."""
    torch.set_num_threads(threads)
    print(json.dumps(blocks(*arguments)))
