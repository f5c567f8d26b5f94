"""Memory of a training step: reversible blocks against depth, feed-forward and loss in chunks.

    python benchmarks/bench_reversible.py [--layers 2 8 32] [--length 2048] [--dim 128] [--threads 1]

Each row runs in its own process, so that its peak is its own (Linux). Blocks: bytes that autograd saves after the
forward pass (without parameters), and peak resident memory of a forward and backward pass above that before, minus the
gradients of the parameters, which every depth needs. The loss: the same for an output layer of 49,152 classes on
2 x 1,024 tokens of 576, minus the gradients of hidden states and weights. Seconds are CPU time.
"""

import argparse
import json

import torch
from torch import Tensor

from longspan.experiments.claims.activations import MODES, blocks_alone, in_own_process, measure_step
from longspan.models import Head
from longspan.train import chunked_next_token_loss, next_token_loss

VOCABULARY, WIDTH, TOKENS = 49_152, 576, (2, 1024)
MIXERS = ({"name": "window", "window": 128},)


def output_layer(chunk: int) -> dict[str, float]:
    """Measure one output layer; with chunk 0 it computes all logits at once."""
    torch.manual_seed(0)
    hidden, targets = torch.randn(*TOKENS, WIDTH, requires_grad=True), torch.randint(VOCABULARY, TOKENS)
    weight = (torch.randn(VOCABULARY, WIDTH) * 0.02).requires_grad_()

    def loss() -> Tensor:
        if chunk:
            return chunked_next_token_loss(hidden, Head(weight), targets, chunk=chunk)
        return next_token_loss(torch.nn.functional.linear(hidden, weight), targets)

    return measure_step(loss, [hidden, weight])


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 8, 32])
    for name, value in (("length", 2048), ("dim", 128), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--loss", type=int)
    options = parser.parse_args()
    if options.loss is not None:
        torch.set_num_threads(options.threads)
        print(json.dumps(output_layer(options.loss)))
        return
    print(f"{'blocks':24} {'layers':>6} {'saved MB':>9} {'peak MB':>9} {'seconds':>8}")
    for mode in MODES:
        for layers in options.layers:
            measurements = blocks_alone(mode, layers, options.length, options.dim, MIXERS, threads=options.threads)
            _print(mode, layers, measurements)
    print(f"\n{'loss':24} {'chunk':>6} {'saved MB':>9} {'peak MB':>9} {'seconds':>8}")
    for chunk in (0, 512, 128):
        _print("loss", chunk, in_own_process([__file__, f"--loss={chunk}", f"--threads={options.threads}"]))


def _print(mode: str, size: int, cost: dict[str, float]) -> None:
    print(f"{mode:24} {size:6} {cost['saved'] / 1e6:9.1f} {cost['peak'] / 1e6:9.1f} {cost['seconds']:8.1f}", flush=True)


if __name__ == "__main__":
    main()
