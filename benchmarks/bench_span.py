"""Speedup of learned spans: a model with short spans against the same model with all spans at the maximum.

    python benchmarks/bench_span.py [--length 8192] [--max-span 4096] [--pairs 5] [--threads 2] [--cpu-time]

Four layers of four heads, mean span an eighth of the maximum; the paper has maxima up to 8,192. Outputs of the trimmed
model are first compared with the dense definition on all keys. Bar: the forward pass is at least 2 times faster.
"""

import argparse
import time
from unittest import mock

import torch

import longspan as ls
from timing import compare

SHARES = (0.0, 0.03125, 0.09375, 0.375)  # share of the maximum per head: most near the ramp, one far


def model(max_span: int, shares: tuple[float, ...], dim: int) -> ls.Decoder:
    """A decoder with the spans, and the same weights on every call."""
    torch.manual_seed(0)
    mixers = ({"name": "adaptive_span", "max_span": max_span},)
    decoder = ls.Decoder(ls.DecoderConfig(dim=dim, num_layers=4, num_heads=4, mixers=mixers)).eval()
    with torch.no_grad():
        for core in decoder.cores():
            core.get_parameter("span").copy_(torch.tensor(shares))
    return decoder


def main() -> None:
    """Check, time, print."""
    parser = argparse.ArgumentParser(description="Speed of short spans against full ones")
    for name, value in (("length", 8192), ("max-span", 4096), ("pairs", 5), ("threads", 2), ("dim", 256)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--cpu-time", action="store_true", help="on a busy machine; with --threads 1")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    short, full = (model(options.max_span, shares, options.dim) for shares in (SHARES, (1.0,) * 4))
    with torch.no_grad():
        text = torch.randint(256, (1, 2 * options.max_span))
        trimmed = short(text)[0]
        with mock.patch.object(ls.ops, "adaptive_span_attention", ls.reference.adaptive_span_attention):
            difference = (short(text)[0] - trimmed).abs().max().item()
        print(f"trimmed against the definition on all keys: {difference:.1e} (bar 1e-5)")
        if difference > 1e-5:
            raise SystemExit("the outputs differ; no speed is printed")
        text = torch.randint(256, (1, options.length))
        clock = time.process_time if options.cpu_time else time.perf_counter
        times = compare(lambda: full(text), lambda: short(text), pairs=options.pairs, clock=clock)
    nbytes = [decoder.state_nbytes(1, options.length) for decoder in (full, short)]
    print(f"mean span {sum(SHARES) / 4:.3f} of {options.max_span}, {options.length} tokens")
    print(f"full spans {times.base * 1e3:.0f} ms, a state of {nbytes[0]:,} bytes")
    print(f"short ones {times.candidate * 1e3:.0f} ms, {nbytes[1]:,} bytes: {times.ratio:.2f} times faster (bar 2)")


if __name__ == "__main__":
    main()
