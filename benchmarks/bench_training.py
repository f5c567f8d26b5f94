"""Speed of a training step: bytes per second of each mechanism, and its share of the rate of bare products.

    python benchmarks/bench_training.py [full window ...] [--rounds 7] [--calls 8x256 1x2048]

The models of `recipes/lm`, forward, loss, backward and optimizer step on random bytes, one thread, CPU time, without
data or evaluation. Step and bare products alternate, A B A B, after two steps of warm-up, and the median of the rounds
counts, so that a slow minute affects both.

FLOPs are 3 forward passes as `Decoder.flops` counts them, attention with all the scores that the operation computes,
but causal full attention with the half that torch's kernel computes. Recomputation is not counted, so the share is a
lower bound. The bare products are those of the shapes of the model: a call's rows times every linear map, forward and
both gradients, and scores and outputs of 64 queries with 320 keys, in the proportion of their FLOPs.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from longspan.config import read_toml
from longspan.models import build_model, resolve_model
from longspan.train import next_token_loss
from longspan.train.recipes import find_recipe
from timing import once

NAMES = ("full", "window", "sparse", "lsh", "entmax")
VOCABULARY, QUERIES, KEYS = 257, 64, 320


def make_model(name: str) -> tuple[nn.Module, bool]:
    """The model of `recipes/lm/NAME.toml`, and whether its training carries a state from step to step."""
    torch.manual_seed(0)
    recipe = read_toml(find_recipe(f"lm/{name}.toml"))
    model: nn.Module = build_model(resolve_model(dict(recipe["model"], vocab_size=VOCABULARY)))
    return model, recipe["train"].get("carry", True)


def make_step(model: nn.Module, rows: int, length: int, *, carry: bool) -> Callable[[], None]:
    """A training step on `rows` x `length` random bytes; without `carry` no state is built, as in `longspan train`."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    tokens, targets = (torch.randint(0, 256, (rows, length)) for _ in range(2))

    def step() -> None:
        optimizer.zero_grad()
        loss = next_token_loss(model(tokens, None, keep_state=carry)[0], targets) / tokens.numel()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def forward_flops(model: nn.Module, rows: int, length: int) -> tuple[float, float]:
    """FLOPs of a forward pass in linear maps, and in attention."""
    maps = sum(2 * rows * length * part.weight.numel() for part in model.modules() if isinstance(part, nn.Linear))
    maps += 2 * rows * length * VOCABULARY * model.config.dim * (model.output is None)
    attention = sum(block.mixer.core.flops(length, rows) for block in model.layers)
    halves = sum(block.mixer.core.flops(length, rows) for block in model.layers if block.mixer.name == "full") / 2
    return maps, attention - halves


def make_products(model: nn.Module, rows: int, length: int) -> tuple[Callable[[], None], float]:
    """Bare products of the shapes of a step, and their FLOPs."""
    tokens, calls = rows * length, list[Callable[[], object]]()
    attention = forward_flops(model, rows, length)[1]
    for weight in [part.weight.detach() for part in model.modules() if isinstance(part, nn.Linear)]:
        x, y = torch.randn(tokens, weight.shape[1]), torch.randn(tokens, weight.shape[0])
        d_weight = torch.empty_like(weight)
        calls += [
            lambda x=x, y=y, weight=weight: torch.mm(x, weight.mT, out=y),
            lambda x=x, y=y, weight=weight: torch.mm(y, weight, out=x),
            lambda x=x, y=y, d_weight=d_weight: torch.mm(y.mT, x, out=d_weight),
        ]
    flops = 3 * sum(2.0 * tokens * part.weight.numel() for part in model.modules() if isinstance(part, nn.Linear))
    q, k, scores = torch.randn(QUERIES, 32), torch.randn(KEYS, 32), torch.empty(QUERIES, KEYS)
    out = torch.empty(QUERIES, 32)
    tiles = max(1, round(3 * attention / (4 * QUERIES * KEYS * 32)))

    def run() -> None:
        for call in calls:
            call()
        for _ in range(tiles):
            torch.mm(q, k.mT, out=scores)
            torch.mm(scores, k, out=out)

    return run, flops + tiles * 4.0 * QUERIES * KEYS * 32


def main() -> None:
    """Print a row per mechanism and shape of a call."""
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", default=NAMES)
    parser.add_argument("--calls", nargs="+", default=["8x256", "1x2048"], help="rows x length")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'mechanism':10} {'call':>8} {'bytes/s':>9} {'MFLOP/byte':>11} {'GFLOP/s':>8} {'products':>9} {'share':>6}")
    for name in options.names:
        for call in options.calls:
            rows, length = map(int, call.split("x"))
            model, carry = make_model(name)
            step = make_step(model, rows, length, carry=carry)
            products, product_flops = make_products(model, rows, length)
            for _ in range(2):
                step()
                products()
            pairs = [(once(step, time.process_time), once(products, time.process_time)) for _ in range(options.rounds)]
            flops = 3 * sum(forward_flops(model, rows, length))
            seconds = statistics.median(first for first, _ in pairs)
            share = statistics.median((flops / first) / (product_flops / second) for first, second in pairs)
            rate = product_flops / statistics.median(second for _, second in pairs)
            print(
                f"{name:10} {call:>8} {rows * length / seconds:>9,.0f} {flops / rows / length / 1e6:>11.1f} "
                f"{flops / seconds / 1e9:>8.1f} {rate / 1e9:>9.1f} {share:>6.0%}",
                flush=True,
            )


if __name__ == "__main__":
    main()
