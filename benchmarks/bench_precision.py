"""Error of a compressive memory with bf16 input against fp64, after a thousand and a hundred thousand segments.

    python benchmarks/bench_precision.py [--segments 1000 100000]

One token per segment, one head of 8, random keys and values rounded to bf16. The error is the relative difference of a
probe's output to the same run in fp64. It takes minutes, as the delta update is sequential over segments.
"""

import argparse
import itertools

import torch
from torch import Tensor

from longspan import ops

A_CALL, DIM = 1000, 8


def differences(update: str, normalizer: str, segments: list[int]) -> dict[int, float]:
    """Relative error of the probe's output, by number of segments."""
    generator, gate = torch.Generator().manual_seed(0), torch.full((1,), 1e9)

    def read(tokens: tuple[Tensor, Tensor], dtype: torch.dtype) -> Tensor:
        k, v = (t.to(dtype) for t in tokens)
        rule = {"segment": 1, "update": update, "normalizer": normalizer}
        out, after = ops.infini_attention(k, k, v, gate, state=states[dtype], **rule)
        if len(k[0, 0]) > 1:
            states[dtype] = after
        return out.double()

    states = {dtype: ops.empty_memory(1, 1, DIM, DIM, None, dtype) for dtype in (torch.bfloat16, torch.float64)}
    probe = torch.randn(1, 1, 1, DIM, generator=generator).bfloat16()
    errors = {}
    for done in range(A_CALL, max(segments) + 1, A_CALL):
        tokens = tuple(torch.randn(1, 1, A_CALL, DIM, generator=generator).bfloat16() for _ in range(2))
        for dtype in states:
            read(tokens, dtype)
        if done in segments:
            ours, exact = (read((probe, probe), dtype) for dtype in states)
            if not bool(ours.isfinite().all()):
                raise SystemExit(f"{update}, {normalizer}: not finite after {done:,} segments")
            errors[done] = float((ours - exact).norm() / exact.norm())
    return errors


def main() -> None:
    """Print a row per form of the memory."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--segments", type=int, nargs="+", default=[1000, 100_000], help="multiples of 1,000")
    options = parser.parse_args()
    for update, normalizer in itertools.product(("linear", "delta"), ("paper", "gamma")):
        errors = differences(update, normalizer, options.segments)
        print(f"{update:<7} {normalizer:<6}", "  ".join(f"{n:,}: {x:.1e}" for n, x in errors.items()), flush=True)


if __name__ == "__main__":
    main()
