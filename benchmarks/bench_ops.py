"""Speed of the attention operations against dense causal attention of PyTorch, alternating in one process.

    python benchmarks/bench_ops.py [--lengths 4096 16384] [--pairs 5] [--threads N] [--only NAME] [--against CASE]
                                  [--cpu-time]

Outputs and gradients of every operation are first compared with its dense definition at a small size; a wrong one is
not timed. Figures are ratios, dense time / operation time, so above 1 is faster than dense; `--against` replaces dense
attention by another case (`--only "gated delta" --against "linear, features given"`). fp32, batch 1, 4 heads of 64;
rows named "training" are 8 rows of 512 tokens with 512 older keys, against dense attention over the same keys.
"""

import argparse
import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from longspan import ops, reference
from timing import compare

HEADS, DIM = 4, 64


class Case(NamedTuple):
    """One operation with its settings; `stale` and `relative` are tensors that it takes besides q, k, v."""

    name: str
    op: str
    settings: dict[str, Any]
    relative: bool = False
    stale: bool = False


CASES = (
    Case("window 512", "window_attention", {"window": 512}),
    Case("window 512 blocks", "window_attention", {"window": 512, "blocks": True}),
    Case("window 128", "window_attention", {"window": 128}),
    Case("relative window 1024", "relative_attention", {"window": 1024}, True),
    Case("relative 512 + 512", "relative_attention", {"window": 512, "segment": 512}, True),
    Case("relative 512 + 512 stale", "relative_attention", {"window": 512, "segment": 512, "border": 512}, True, True),
    Case("sparse strided 128", "sparse_attention", {"pattern": "strided", "stride": 128}),
    Case("sparse fixed 128, 8", "sparse_attention", {"pattern": "fixed", "stride": 128, "summary": 8}),
    Case("adaptive span 128 of 1024", "adaptive_span_attention", {"ramp": 32, "window": 1024}),
    Case("linear, features given", "linear_attention", {}),
    Case("gated delta", "gated_delta_attention", {}),
    Case("performer 256", "favor_attention", {}),
    Case("performer 256, bidirectional", "favor_attention", {"causal": False}),
    Case("lsh 64, 1 round", "lsh_attention", {"bucket_size": 64, "rounds": 1}),
    Case("lsh 64, 4 rounds", "lsh_attention", {"bucket_size": 64, "rounds": 4}),
    Case("lsh 64, 1 round, sorted", "lsh_attention", {"bucket_size": 64, "rounds": 1, "selection": "sorted"}),
    Case("lsh 64, 1 round, own keys", "lsh_attention", {"bucket_size": 64, "rounds": 1, "separate": True}),
    Case("routing 256", "routing_attention", {"window": 256}),
    Case("routing 256, balanced", "routing_attention", {"window": 256, "selection": "balanced"}),
    Case("routing 256, own keys", "routing_attention", {"window": 256, "separate": True}),
    Case(
        "routing 256, own keys, bal.", "routing_attention", {"window": 256, "separate": True, "selection": "balanced"}
    ),
    Case("entmax", "entmax_attention", {}),
    Case("entmax 1.5", "entmax_attention", {"alpha": 1.5}),
    Case("bp 8", "bp_attention", {"nearest": 8}),
    Case("infini 512", "infini_attention", {"segment": 512}),
    Case("infini 512 delta gamma", "infini_attention", {"segment": 512, "update": "delta", "normalizer": "gamma"}),
)
FEATURES = 256
LEVELS = 13


def tensors(
    case: Case, length: int, *, batch: int = 1, memory: int = 0, heads: int = HEADS, dim: int = DIM
) -> list[Tensor]:
    """q, k, v and other tensors of the case, laid out as a model's projections return them."""
    shape = (batch, length, heads, dim)
    keyed = (batch, memory + length, heads, dim)
    inputs = [torch.randn(s).transpose(1, 2) for s in (shape, keyed, keyed)]
    if case.relative:
        distances = case.settings["window"] + case.settings.get("segment", 0)
        inputs += [torch.randn(heads, min(distances, memory + length), dim), *torch.randn(2, heads, dim).unbind()]
    if case.stale:
        inputs += [inputs[1].clone(), inputs[2].clone()]
    if case.op == "linear_attention":
        inputs[:2] = [F.elu(t) + 1 for t in inputs[:2]]
    if case.op == "gated_delta_attention":  # decays as at initialization, a few percent per token
        inputs[:2] = [F.normalize(t, dim=-1) for t in inputs[:2]]
        inputs += [-F.softplus(torch.randn(batch, heads, length) - 3), torch.rand(batch, heads, length)]
    if case.op == "infini_attention":
        inputs.append(torch.zeros(heads))
    if case.op == "bp_attention":  # levels that cover 65,536 tokens
        entries = ops.bp_entries(case.settings["nearest"], LEVELS, True)
        inputs += [torch.randn(LEVELS, heads, dim), torch.randn(entries, dim)]
    if case.op == "adaptive_span_attention":
        # like trained heads: most near the ramp, one far; their mean is an eighth of the window
        inputs.append(torch.tensor([0.0, 0.03125, 0.09375, 0.375])[:heads] * case.settings["window"])
    if case.op == "entmax_attention":  # an alpha per head, spread as after training, or one for all
        alpha = case.settings.get("alpha")
        inputs.append(torch.linspace(1.1, 1.9, heads) if alpha is None else torch.full((heads,), alpha))
    if case.op in ("lsh_attention", "routing_attention") and not case.settings.get("separate"):
        del inputs[2]  # keys are the queries
    return [t.requires_grad_() for t in inputs]


def call(case: Case, where: Any, inputs: list[Tensor]) -> Tensor:
    """The case's operation of `where` (ops or reference)."""
    settings = dict(case.settings)
    settings.pop("alpha", None)
    if case.stale:
        *inputs, stale_k, stale_v = inputs
        settings["detached_kv"] = (stale_k, stale_v)
    if case.op == "lsh_attention":
        return lsh(where, inputs, **settings)
    if case.op == "routing_attention":
        return routing(where, inputs, **settings)
    if case.op == "favor_attention":
        inputs = [*inputs, projection(inputs[0].shape[-1])]
    out = getattr(where, case.op)(*inputs, **settings)
    output: Tensor = out[0] if isinstance(out, tuple) else out
    return output


def lsh(where: Any, inputs: list[Tensor], *, rounds: int, separate: bool = False, **settings: Any) -> Tensor:
    """LSH attention with length / `bucket_size` buckets, as in reformer-pytorch."""
    q, v, *k = inputs
    count = max(2, q.shape[2] // settings["bucket_size"] // 2 * 2)
    turn = rotations(q.shape[1], rounds, q.shape[3], count)
    output: Tensor = where.lsh_attention(q, v, k=k[0] if separate else None, rotations=turn, **settings)
    return output


def routing(where: Any, inputs: list[Tensor], *, separate: bool = False, **settings: Any) -> Tensor:
    """Routing attention with length / `window` clusters."""
    q, v, *k = inputs if not separate else (inputs[0], inputs[2], inputs[1])
    output: Tensor = where.routing_attention(
        q,
        k[0] if separate else q,
        v,
        centroids(q.shape[1], max(1, q.shape[2] // settings["window"]), q.shape[3]),
        include_self=separate,
        **settings,
    )
    return output


@functools.cache
def centroids(heads: int, clusters: int, dim: int) -> Tensor:
    """Centroids of the routing rows."""
    return F.normalize(torch.randn(heads, clusters, dim, generator=torch.Generator().manual_seed(0)), dim=-1)


@functools.cache
def rotations(heads: int, rounds: int, dim: int, buckets: int) -> Tensor:
    """Rotations of the lsh rows."""
    return torch.randn(heads, rounds, dim, buckets // 2, generator=torch.Generator().manual_seed(0))


@functools.cache
def projection(dim: int) -> Tensor:
    """The random features of the performer rows."""
    return ops.orthogonal_projection(FEATURES, dim, generator=torch.Generator().manual_seed(0))


def is_right(case: Case) -> bool:
    """Whether outputs and gradients equal the definition, at a size where every kind of tile occurs."""
    generator = torch.Generator().manual_seed(1)
    small = {
        name: max(value // 8, 1) if type(value) is int and name != "rounds" else value
        for name, value in case.settings.items()
    }
    case = case._replace(settings=small)
    inputs = tensors(case, 333, batch=2, dim=16)
    outputs_and_gradients = []
    for where in (ops, reference):
        out = call(case, where, inputs)
        grad = torch.randn(out.shape, generator=generator.manual_seed(2))
        outputs_and_gradients.append((out, *torch.autograd.grad(out, inputs, grad)))
    return all(torch.allclose(a, b, rtol=1e-3, atol=1e-3) for a, b in zip(*outputs_and_gradients, strict=True))


def steps(function: Callable[[list[Tensor]], Tensor], inputs: list[Tensor], train: bool) -> Callable[[], object]:
    """A forward pass without gradients, or a forward and backward pass."""
    if not train:

        def forward() -> Tensor:
            with torch.no_grad():
                return function(inputs)

        return forward
    grad = torch.randn_like(function(inputs))
    return lambda: torch.autograd.grad(function(inputs), inputs, grad)


def dense(inputs: list[Tensor]) -> Tensor:
    """Baseline of causal operations."""
    return F.scaled_dot_product_attention(*inputs, is_causal=True)


def dense_both(inputs: list[Tensor]) -> Tensor:
    """Baseline of bidirectional operations."""
    return F.scaled_dot_product_attention(*inputs)


def extended(inputs: list[Tensor]) -> Tensor:
    """Baseline of the training rows: dense attention over older keys."""
    return ops.full_attention(*inputs)


def report(case: Case, label: str, base: Any, base_inputs: list[Tensor], inputs: list[Tensor], options: Any) -> None:
    """Print one line of the table."""
    cells = []
    for train in (False,) if options.forward_only else (False, True):
        comparison = compare(
            steps(base, base_inputs, train),
            steps(lambda x: call(case, ops, x), inputs, train),
            pairs=options.pairs,
            clock=time.process_time if options.cpu_time else time.perf_counter,
        )
        cells.append(f"{comparison.ratio:8.2f} {comparison.base * 1e3:9.1f} {comparison.candidate * 1e3:9.1f}")
    print(f"{label:>18} {case.name:<26}" + " |".join(cells), flush=True)


def main() -> None:
    """Parse, check, time, print."""
    parser = argparse.ArgumentParser(description="Speed of longspan.ops against dense attention")
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 16384])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", default="")
    parser.add_argument(
        "--against", choices=[case.name for case in CASES], help="a case as baseline instead of dense attention"
    )
    parser.add_argument("--forward-only", action="store_true")
    parser.add_argument("--cpu-time", action="store_true", help="on a busy machine; with --threads 1")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    print(
        f"torch {torch.__version__}, {options.threads} threads, median of {options.pairs} alternating pairs, "
        f"{'CPU' if options.cpu_time else 'wall'} time"
    )
    print(f"{'length':>18} {'operation':<26}{'forward: ratio, dense ms, op ms':<28} | forward + backward: the same")
    cases = []
    for case in CASES:
        if options.only in case.name:
            if is_right(case):
                cases.append(case)
            else:
                print(f"{case.name}: differs from its definition; not timed")
    baseline = next((case for case in CASES if case.name == options.against), None)
    for length in options.lengths:
        base_inputs = [torch.randn(1, HEADS, length, DIM).requires_grad_() for _ in range(3)]
        if baseline is not None:
            base_inputs = tensors(baseline, length)
        for case in cases:
            base = dense if case.settings.get("causal", True) else dense_both
            if baseline is not None:
                base = functools.partial(call, baseline, ops)
            report(case, str(length), base, base_inputs, tensors(case, length), options)
    for case in cases:
        if case.op not in ("window_attention", "relative_attention"):
            continue  # the others carry sums, not older keys
        for batch, heads, dim in ((8, 4, 64), (16, 8, 32)):
            inputs = tensors(case, 512, batch=batch, memory=512, heads=heads, dim=dim)
            label = f"training {batch}x{heads}x{dim}"
            report(case, label, extended, inputs[:3], inputs, options)


if __name__ == "__main__":
    main()
