"""What a training step keeps: reversible blocks against depth, the feed-forward and the loss in chunks.

    python benchmarks/bench_reversible.py [--layers 2 8 32] [--length 2048] [--dim 128] [--threads 1]

Each row is a process of its own, so that its peak is its own (Linux). Blocks: bytes that autograd saves after the
forward pass (parameters not counted), and the peak of resident memory of a forward and backward pass above what stood
before, less the gradients of the parameters, which every depth has to have. The loss: the same of an output layer of
49,152 classes on 2 x 1,024 tokens of 576, less the gradients of hidden states and weights. Seconds are of this pass.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import longspan as ls
from longspan.models import Head
from longspan.train import chunked_next_token_loss, next_token_loss

VOCABULARY, WIDTH, TOKENS = 49_152, 576, (2, 1024)
MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "ffn_chunk": {"ffn_chunk": 256},
    "checkpoint": {"checkpoint": True},
    "reversible": {"reversible": True},
    "reversible, ffn_chunk": {"reversible": True, "ffn_chunk": 256},
}


def resident(field: str) -> int:
    """Bytes resident now (VmRSS), or at most since `forget_peak` (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def forget_peak() -> None:
    """The peak counts from here (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def measured(loss: Callable[[], Tensor], parameters: list[Tensor]) -> dict[str, float]:
    """Bytes saved and needed, and seconds, of a forward and backward pass; `parameters` get their gradients."""
    own = {p.untyped_storage().data_ptr() for p in parameters}
    saved: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return t

    forget_peak()
    before, begin = resident("VmRSS"), time.perf_counter()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        total = loss()
    size = sum(saved.values())
    total.backward()
    seconds = time.perf_counter() - begin
    gradients = sum(p.numel() * p.element_size() for p in parameters)
    return {"saved": size, "peak": resident("VmHWM") - before - gradients, "seconds": seconds}


def blocks(mode: str, layers: int, length: int, dim: int) -> dict[str, float]:
    """One model."""
    torch.manual_seed(0)
    fields = {"vocab_size": 64, "dim": dim, "num_heads": 4, "mixers": ({"name": "window", "window": 128},)}
    model = ls.Decoder(ls.DecoderConfig(**fields, num_layers=layers, dropout=0.1, **MODES[mode])).train()
    text = torch.randint(64, (1, length))
    model(text[:, :300])[0].sum().backward()  # warm, so that libraries are loaded before memory is counted
    model.zero_grad(set_to_none=True)
    return measured(lambda: model(text)[0].square().mean(), list(model.parameters()))


def output_layer(chunk: int) -> dict[str, float]:
    """One output layer; chunk 0: whole logits."""
    torch.manual_seed(0)
    hidden, targets = torch.randn(*TOKENS, WIDTH, requires_grad=True), torch.randint(VOCABULARY, TOKENS)
    weight = (torch.randn(VOCABULARY, WIDTH) * 0.02).requires_grad_()

    def loss() -> Tensor:
        if chunk:
            return chunked_next_token_loss(hidden, Head(weight), targets, chunk=chunk)
        return next_token_loss(torch.nn.functional.linear(hidden, weight), targets)

    return measured(loss, [hidden, weight])


def main() -> None:
    """Print a table of each."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 8, 32])
    for name, value in (("length", 2048), ("dim", 128), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--one", nargs=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.one:
        mode, size = options.one[0], int(options.one[1])
        found = output_layer(size) if mode == "loss" else blocks(mode, size, options.length, options.dim)
        print(json.dumps(found))
        return
    print(f"{'blocks':24} {'layers':>6} {'saved MB':>9} {'peak MB':>9} {'seconds':>8}")
    for mode in MODES:
        for layers in options.layers:
            _print(mode, layers, options)
    print(f"\n{'loss':24} {'chunk':>6} {'saved MB':>9} {'peak MB':>9} {'seconds':>8}")
    for chunk in (0, 512, 128):
        _print("loss", chunk, options)


def _print(mode: str, size: int, options: argparse.Namespace) -> None:
    sizes = [f"--{name}={getattr(options, name)}" for name in ("length", "dim", "threads")]
    command = [sys.executable, __file__, "--one", mode, str(size), *sizes]
    # tensors in pages of their own, so that what is freed is given back and fragments do not count as memory in use
    surroundings = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "16384", "MALLOC_MMAP_MAX_": "1000000"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=surroundings)
    found = json.loads(done.stdout)
    print(
        f"{mode:24} {size:6} {found['saved'] / 1e6:9.1f} {found['peak'] / 1e6:9.1f} {found['seconds']:8.1f}", flush=True
    )


if __name__ == "__main__":
    main()
