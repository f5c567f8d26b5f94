"""Time and memory against length, for mechanisms with linear cost: one call over the text, and a stream.

    python benchmarks/bench_length.py [--lengths 16384 65536 262144 1048576] [--cpu-time] [--threads 2]

At once: one forward pass of 2 heads of 64 over the whole length; nanoseconds per token, and peak bytes per token above
the inputs (each length in its own process). Stream: the same mixer reads the length in calls of 4,096; nanoseconds per
token in the first and last eighth, bytes of state.
"""

import argparse
import json
import resource
import subprocess
import sys
import time

import torch
import torch.nn.functional as F

from longspan import mixers, ops
from longspan import state as states

HEADS, DIM, FEATURES = 2, 64, 256
NAMES = ("linear", "performer", "infini", "infini delta gamma", "window")


def at_once(name: str, length: int, threads: int, cpu_time: bool) -> None:
    """One length in this process; prints a JSON line."""
    torch.set_num_threads(threads)
    clock = time.process_time if cpu_time else time.perf_counter
    torch.manual_seed(0)
    inputs = [torch.randn(1, HEADS, length, DIM) for _ in range(3)]
    projection = ops.orthogonal_projection(FEATURES, DIM, generator=torch.Generator().manual_seed(0))

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> object:
        if name == "linear":
            return ops.linear_attention(F.elu(q) + 1, F.elu(k) + 1, v)
        if name == "performer":
            return ops.favor_attention(q, k, v, projection)
        if name == "window":
            return ops.window_attention(q, k, v, window=512)
        rule = {"update": "delta", "normalizer": "gamma"} if name != "infini" else {}
        return ops.infini_attention(q, k, v, torch.zeros(HEADS), segment=512, **rule)

    with torch.no_grad():
        run(*(t[:, :, :8192] for t in inputs))  # warm-up: loads libraries before memory is counted
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        begin = clock()
        run(*inputs)
        seconds = clock() - begin
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"seconds": seconds, "bytes": max(0, peak - before) * 1024}))


def stream(name: str, length: int, threads: int, cpu_time: bool) -> None:
    """A mixer over the whole length in calls of 4,096; prints a row."""
    torch.set_num_threads(threads)
    clock = time.process_time if cpu_time else time.perf_counter
    torch.manual_seed(0)
    fields = {"update": "delta", "normalizer": "gamma"} if name == "infini delta gamma" else {}
    mixer = mixers.build(name.split()[0], dim=HEADS * DIM, num_heads=HEADS, **fields).eval()
    x, state, times = torch.randn(1, 4096, HEADS * DIM), None, []
    with torch.no_grad():
        for _ in range(length // 4096):
            begin = clock()
            _, state = mixer(x, state)
            times.append(clock() - begin)
    eighth = max(1, len(times) // 8)
    first, last = (sum(part) / (eighth * 4096) * 1e9 for part in (times[1 : 1 + eighth], times[-eighth:]))
    print(f"{name:<20} {length:>10,} {first:12,.0f} {last:12,.0f} {states.nbytes(state):14,}", flush=True)


def main() -> None:
    """Both tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--lengths", type=int, nargs="+", default=[16384, 65536, 262144, 1048576])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cpu-time", action="store_true", help="on a busy machine; with one thread")
    parser.add_argument("--one", nargs=2, metavar=("NAME", "LENGTH"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        at_once(options.one[0], int(options.one[1]), options.threads, options.cpu_time)
        return
    print(f"{'at once':<20} {'tokens':>10} {'ns per token':>12} {'bytes per token':>15}")
    for name in NAMES:
        for length in options.lengths:
            extra = ["--cpu-time"] if options.cpu_time else []
            command = [sys.executable, __file__, "--threads", str(options.threads), *extra, "--one", name, str(length)]
            measurement = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            nanoseconds, bytes_per_token = measurement["seconds"] / length * 1e9, measurement["bytes"] / length
            print(f"{name:<20} {length:>10,} {nanoseconds:12,.0f} {bytes_per_token:15,.0f}", flush=True)
    print(f"\n{'stream':<20} {'tokens':>10} {'first ns':>12} {'last ns':>12} {'state bytes':>14}")
    for name in NAMES:
        stream(name, max(options.lengths), options.threads, options.cpu_time)


if __name__ == "__main__":
    main()
