"""Content-based attention against public packages of the same mechanism: alternating time in one process, and memory.

    pip install --no-deps reformer-pytorch routing-transformer local-attention einops \
        "product-key-memory<0.2" axial-positional-embedding mixture-of-experts
    python benchmarks/bench_peers.py [--lengths 4096 16384] [--pairs 3] [--threads 2] [--cpu-time]

4 heads of 64, fp32, batch 1, causal, attention only (of shared queries and keys, and values), the packages in training
mode. Ratios are the package's time over ours, above 1 is faster; memory is the peak above the inputs, each in its own
process. In the packages later tokens change what earlier ones see, so they do not compute the same function.
"""

import argparse
import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench_ops import CASES, DIM, HEADS, Case, call, steps, tensors
from longspan import ops
from longspan.experiments.claims.growth import peak_bytes
from timing import compare

OURS: dict[str, Case] = {case.name: case for case in CASES}
PAIRS = (
    ("reformer-pytorch, 4 rounds", "lsh 64, 4 rounds"),
    ("reformer-pytorch, 4 rounds", "lsh 64, 4 rounds, sorted"),
    ("routing-transformer", "routing 256"),
    ("routing-transformer", "routing 256, balanced"),
)


def ours(name: str) -> tuple[Callable[[list[Tensor]], Tensor], Case]:
    """Our operation and its case."""
    if name not in OURS:
        plain = OURS[name.removesuffix(", sorted")]
        OURS[name] = plain._replace(name=name, settings={**plain.settings, "selection": "sorted"})
    return functools.partial(call, OURS[name], ops), OURS[name]


def peer(name: str, length: int) -> Callable[[list[Tensor]], Tensor]:
    """A package's attention of queries (its keys) and values (1, heads, length, dim)."""
    warnings.simplefilter("ignore")
    if name.startswith("reformer"):
        from reformer_pytorch import LSHAttention

        lsh: Any = LSHAttention(bucket_size=64, n_hashes=4, causal=True)
        return lambda inputs: lsh(inputs[0][0], inputs[1][0])[0]
    from routing_transformer.routing_transformer import KmeansAttention

    routing: Any = KmeansAttention(length // 256, 256, HEADS, DIM, causal=True, shared_qk=True)
    routing(*(torch.randn(1, HEADS, length, DIM) for _ in range(3)))  # initializes its centroids
    return lambda inputs: routing(inputs[0], inputs[0], inputs[1])[0]


def step_of(name: str, length: int) -> Callable[[], object]:
    """Forward and backward pass of one of ours or of a package."""
    mine = not name.startswith(("reformer", "routing-"))
    function, case = ours(name) if mine else (peer(name, length), OURS["lsh 64, 4 rounds"])
    return steps(function, tensors(case, length), train=True)


def main() -> None:
    """Print a row per pair."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 16384])
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cpu-time", action="store_true", help="on a busy machine; with one thread")
    options = parser.parse_args()
    import time

    torch.set_num_threads(1 if options.cpu_time else options.threads)
    clock = time.process_time if options.cpu_time else time.perf_counter
    print(f"{'length':>8} {'package':<28}{'ours':<28}{'forward':>8}{'f + b':>8}{'their MB':>10}{'our MB':>8}")
    for length in options.lengths:
        for theirs, name in PAIRS:
            function, case = ours(name)
            inputs = tensors(case, length)
            ratios = [
                compare(
                    steps(peer(theirs, length), inputs, train),
                    steps(function, inputs, train),
                    pairs=options.pairs,
                    clock=clock,
                ).ratio
                for train in (False, True)
            ]
            peaks = [peak_bytes(step_of, package, length) / 1e6 for package in (theirs, name)]
            figures = f"{ratios[0]:>8.2f}{ratios[1]:>8.2f}{peaks[0]:>10,.0f}{peaks[1]:>8,.0f}"
            print(f"{length:>8} {theirs:<28}{name:<28}{figures}", flush=True)


if __name__ == "__main__":
    main()
