"""Time per token of recurrent memory relative to its backbone, alternating (A B A B) in one process.

    python benchmarks/bench_memory.py [--pairs 7] [--segments 16] [--batch 8] [--threads 2]

A: a RecurrentMemory over an encoder that streams segments of 499 tokens with 8 memory tokens. B: the same encoder on
segments of 507. Bar: A needs at most 1.05 times the time of B per token of its input (507 columns per segment in both).
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch

import longspan as ls


def main() -> None:
    """Print the ratio of every pair and their median."""
    parser = argparse.ArgumentParser()
    for name, value in (("pairs", 7), ("segments", 16), ("batch", 8), ("threads", 2), ("dim", 64)):
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    config = ls.EncoderConfig(
        vocab_size=4096,
        dim=options.dim,
        num_layers=2,
        num_heads=4,
        mixers=({"name": "window", "window": 8}, {"name": "full"}),
        activation="gelu",
        norm="layernorm",
        bias=True,
    )
    encoder = ls.Encoder(config).eval()
    memory = ls.RecurrentMemory(encoder, num_memory_tokens=8, segment_length=499).eval()
    short = torch.randint(4096, (options.batch, 499))
    long = torch.randint(4096, (options.batch, 507))

    def stream() -> None:
        state = None
        for _ in range(options.segments):
            _, state = memory(short, state)

    def plain() -> None:
        for _ in range(options.segments):
            encoder(long)

    ratios = []
    for index in range(options.pairs + 1):
        with torch.no_grad():
            first, second = _seconds(stream), _seconds(plain)
        if index:  # the first pair warms up
            ratios.append(first / second)
            tokens = options.batch * options.segments * 499 / first
            print(
                f"memory {first * 1e3:.1f} ms  backbone {second * 1e3:.1f} ms  {ratios[-1]:.3f}  {tokens:,.0f} tokens/s"
            )
    print(f"median of {len(ratios)}: {statistics.median(ratios):.3f} times the backbone's time (bar 1.05)")


def _seconds(call: Callable[[], None]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
