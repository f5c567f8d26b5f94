"""Gradients of gradients (gradient penalties, Hessians) are right or refused, on every path: never silently wrong."""

import ast
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import longspan as ls
from longspan import ops
from longspan.errors import UnsupportedError
from longspan.train.loss import chunked_next_token_loss

from .models import FIELDS, NAMES, converted, own, tokens

# torch's own, when it first meets forward-mode derivatives
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")

DIM, LENGTH = 16, 13
LOSSES: dict[str, Callable[[Tensor], Tensor]] = {"sum": lambda y: y.sum(), "square": lambda y: y.square().sum()}


def _mixer(name: str) -> Any:
    torch.manual_seed(0)
    return ls.mixers.build(name, dim=DIM, num_heads=2, **FIELDS[name]).double().eval()


def _input(seed: int = 1) -> Tensor:
    drawn = torch.randn(1, LENGTH, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return drawn.requires_grad_()


def _penalty(run: Callable[[], Tensor], x: Tensor) -> Tensor:
    gradient = torch.autograd.grad(run(), x, create_graph=True)[0]
    return gradient.square().sum()


def _slope(penalty: Callable[[], Tensor], leaf: Tensor, direction: Tensor, step: float = 1e-6) -> float:
    """The derivative of the penalty along a direction, by differences of first-order gradients alone."""
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            leaf.add_(direction, alpha=sign * step)
        values.append(float(penalty().detach()))
        with torch.no_grad():
            leaf.add_(direction, alpha=-sign * step)
    return (values[0] - values[1]) / (2 * step)


def _right_or_refused(run: Callable[[], Tensor], x: Tensor, leaves: list[Tensor]) -> int:
    """How many of the leaves were refused, one by one through `torch.autograd.grad`; the others must be right."""
    refused = 0
    for leaf in leaves:
        first = torch.autograd.grad(run(), leaf, allow_unused=True)[0]
        if first is None or not first.any():
            continue  # cut off by design: it has no first derivative either
        penalty = _penalty(run, x)
        assert penalty.requires_grad, "the gradient is a constant: its derivative would silently be zero"
        try:
            (second,) = torch.autograd.grad(penalty, leaf, allow_unused=True)
        except UnsupportedError:
            refused += 1
            continue
        direction = torch.randn(leaf.shape, dtype=leaf.dtype, generator=torch.Generator().manual_seed(3))
        value = 0.0 if second is None else float((second * direction).sum())
        expected = _slope(lambda: _penalty(run, x), leaf, direction)
        assert value == pytest.approx(expected, rel=1e-4, abs=1e-5)
    return refused


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", NAMES)
def test_a_penalty_by_autograd_grad_is_right_or_refused(name: str, loss: str) -> None:
    mixer, x = _mixer(name), _input()

    def run() -> Tensor:
        return LOSSES[loss](mixer(x)[0])

    assert _right_or_refused(run, x, [x, *mixer.parameters()]) > 0


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", NAMES)
def test_a_penalty_by_backward_is_refused(name: str, loss: str) -> None:
    mixer, x = _mixer(name), _input()
    with pytest.raises(UnsupportedError, match="second derivatives") as error:
        _penalty(lambda: LOSSES[loss](mixer(x)[0]), x).backward()
    assert "\n" not in str(error.value)


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True:UserWarning")
@pytest.mark.parametrize("name", NAMES)
def test_an_unused_graph_of_gradients_changes_nothing(name: str) -> None:
    mixer, x = _mixer(name), _input()
    leaves = [x, *(p for p in mixer.parameters() if p.requires_grad)]
    plain = torch.autograd.grad(mixer(x)[0].square().sum(), leaves, allow_unused=True)
    mixer(x)[0].square().sum().backward(create_graph=True)
    for leaf, expected in zip(leaves, plain, strict=True):
        assert (leaf.grad is None) == (expected is None)
        if leaf.grad is not None:
            torch.testing.assert_close(leaf.grad, expected, rtol=1e-12, atol=1e-12)
            with torch.no_grad():
                leaf.grad.mul_(0.5)  # clipping works in place
            leaf.grad = None


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("transformer_xl", "compressive")])
def test_a_penalty_across_two_calls_is_right_or_refused(name: str) -> None:
    mixer, x, later = _mixer(name), _input(), _input(2).detach()

    def run() -> Tensor:
        first, state = mixer(x)
        total: Tensor = first.sum() + mixer(later, state)[0].sum()
        return total

    assert _right_or_refused(run, x, [x, mixer.projections.v_proj.weight]) > 0


@pytest.mark.parametrize("name", NAMES)
def test_derivatives_by_the_gradient_that_comes_in(name: str) -> None:
    """The double-backward trick of `torch.autograd.functional.jvp` differentiates by it."""
    mixer, x = _mixer(name), _input()
    y = mixer(x)[0]
    weight = torch.ones_like(y, requires_grad=True)
    (gradient,) = torch.autograd.grad(y, x, weight, create_graph=True)
    with pytest.raises(UnsupportedError, match="second derivatives"):
        torch.autograd.grad(gradient.sum(), weight)


@pytest.mark.parametrize("name", ["full", "window"])
def test_derivatives_by_the_gradient_itself_are_right(name: str) -> None:
    """They do not depend on what the gradient was computed from."""
    mixer, x = _mixer(name), _input()
    (gradient,) = torch.autograd.grad(mixer(x)[0].sum(), x, create_graph=True)
    (slope,) = torch.autograd.grad(gradient.square().sum(), gradient)
    torch.testing.assert_close(slope, 2 * gradient)


@pytest.mark.parametrize("name", NAMES)
def test_functional_transforms_are_right_or_refused(name: str) -> None:
    mixer, x = _mixer(name).requires_grad_(False), _input().detach()

    def loss(x: Tensor) -> Tensor:
        total: Tensor = mixer(x)[0].square().sum()
        return total

    with pytest.raises((UnsupportedError, RuntimeError)):
        torch.func.hessian(loss)(x)
    with pytest.raises(UnsupportedError):
        torch.autograd.functional.hessian(loss, x)
    direction = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(3))
    try:
        slope = torch.func.jvp(loss, (x,), (direction,))[1]
    except (UnsupportedError, NotImplementedError, RuntimeError):
        return
    step = 1e-6
    expected = float(loss(x + step * direction) - loss(x - step * direction)) / (2 * step)
    assert float(slope) == pytest.approx(expected, rel=1e-5)


def test_an_op_inside_a_functional_transform_says_so() -> None:
    q = torch.randn(1, 2, 5, 4)
    with pytest.raises(UnsupportedError, match=r"torch\.func"):
        torch.func.grad(lambda q: ops.linear_attention(q.exp(), q.exp(), q)[0].sum())(q)


def test_forward_mode_is_refused() -> None:
    z = torch.randn(3, 4, requires_grad=True)
    with (
        torch.autograd.forward_ad.dual_level(),
        pytest.raises(UnsupportedError, match="forward-mode"),
    ):
        ops.entmax(torch.autograd.forward_ad.make_dual(z, torch.ones_like(z)), 1.5)


# -- ops, one input after another ------------------------------------------------------------------------------------


def _draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def _ops() -> Iterator[tuple[str, Callable[[list[Tensor]], Tensor], list[Tensor]]]:
    q, k, v = (_draw(1, 2, 7, 4, seed=seed) for seed in range(3))
    longer = [_draw(1, 2, 7, 4, seed=0), *(_draw(1, 2, 10, 4, seed=seed) for seed in (1, 2))]
    alpha = torch.full((2,), 1.4, dtype=torch.float64, requires_grad=True)
    yield "full", lambda t: ops.full_attention(*t), [q, k, v]
    yield "full, older keys", lambda t: ops.full_attention(*t), longer
    lengths = torch.tensor([5])
    yield "full, masked", lambda t: ops.full_attention(*t, lengths=lengths), [q, k, v]
    yield "window", lambda t: ops.window_attention(*t, window=3), [q, k, v]
    blocks = torch.tensor([[0, 0], [0, 1], [1, 2]]).expand(1, 2, -1, -1)

    def sparse(t: list[Tensor], **options: Any) -> Any:
        q, k, v = t
        return ops.block_sparse_attention(q, k, v, blocks, query_block=3, key_block=3, **options)

    yield "block sparse", sparse, [q, k, v]
    yield (
        "block sparse, log-sum-exps",
        lambda t: torch.cat([x.flatten() for x in sparse(t, return_lse=True)]),
        [q, k, v],
    )
    yield "linear", lambda t: ops.linear_attention(t[0].exp(), t[1].exp(), t[2])[0], [q, k, v]
    yield "entmax", lambda t: ops.entmax(t[0], t[1][:, None, None]), [q, alpha]
    half = _draw(1, 2, 7, 4, seed=4).detach().half().requires_grad_()
    yield "entmax, half precision", lambda t: ops.entmax(t[0], t[1][:, None, None]), [half, alpha]
    yield "entmax attention", lambda t: ops.entmax_attention(*t), [q, k, v, alpha]


CASES = {name: (function, inputs) for name, function, inputs in _ops()}


@pytest.mark.parametrize("by_sum", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_no_input_of_an_op_is_a_constant_to_its_gradient(name: str, by_sum: bool) -> None:
    function, inputs = CASES[name]
    for gradient_of in inputs:
        for leaf in inputs:
            out = function(inputs)
            (gradient,) = torch.autograd.grad(
                out.sum() if by_sum else out.square().sum(), gradient_of, create_graph=True
            )
            with pytest.raises(UnsupportedError, match="second derivatives"):
                torch.autograd.grad(gradient.square().sum(), leaf)


def test_every_autograd_function_derives_from_one_base() -> None:
    """A new function cannot miss the check."""
    folder = Path(ls.__file__).parent
    direct = [
        f"{file.relative_to(folder)}:{node.name}"
        for file in sorted(folder.rglob("*.py"))
        if "autograd" in file.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef)
        and any(ast.unparse(base).endswith("autograd.Function") for base in node.bases)
    ]
    assert direct == ["engine/first_order.py:FirstOrder"]


# -- models ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"reversible": True}, {"checkpoint": True}, {"ffn_chunk": 3}])
@pytest.mark.parametrize("name", ["linear", "infini", "lsh"])
def test_models_that_recompute_activations(name: str, options: dict[str, Any]) -> None:
    model = own(name, layers=2, **options).double()
    ids = tokens(1, LENGTH)
    parameters = list(model.parameters())
    for loss in LOSSES.values():
        gradients = torch.autograd.grad(loss(model(ids)[0]), parameters, create_graph=True, allow_unused=True)
        penalty = torch.stack([g.square().sum() for g in gradients if g is not None]).sum()
        with pytest.raises(UnsupportedError, match="second derivatives"):
            torch.autograd.grad(penalty, parameters[0], allow_unused=True)


def test_the_loss_in_chunks() -> None:
    head: Any = own("window").double().head()
    hidden = torch.randn(1, LENGTH, DIM, dtype=torch.float64, requires_grad=True)
    loss = chunked_next_token_loss(hidden, head, tokens(1, LENGTH), chunk=4)
    (gradient,) = torch.autograd.grad(loss, hidden, create_graph=True)
    for leaf in (hidden, head.weight):
        with pytest.raises(UnsupportedError, match="the loss in chunks has no second derivatives"):
            torch.autograd.grad(gradient.square().sum(), leaf, retain_graph=True)


@pytest.mark.parametrize("name", ["full", "linear", "performer", "window", "lsh"])
def test_converted_models(name: str) -> None:
    model = converted(name).double()
    embedded = model.get_input_embeddings()(tokens(1, LENGTH)).detach().requires_grad_()
    logits = model(inputs_embeds=embedded, use_cache=False).logits
    (gradient,) = torch.autograd.grad(logits.sum(), embedded, create_graph=True)
    for leaf in (embedded, next(p for n, p in model.named_parameters() if "v_proj" in n)):
        with pytest.raises(UnsupportedError, match="second derivatives"):
            torch.autograd.grad(gradient.square().sum(), leaf, retain_graph=True)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_by_torch_func_are_right_or_refused(name: str) -> None:
    model = own(name)
    hidden = model.embedding(tokens(2, 9)).detach()

    def logits(x: Tensor) -> Tensor:
        out: Tensor = model(None, None, inputs_embeds=x)[0]
        return out

    try:
        out, pull = torch.func.vjp(logits, hidden)[:2]
    except UnsupportedError:
        return
    leaf = hidden.clone().requires_grad_()
    (expected,) = torch.autograd.grad(logits(leaf).sum(), leaf)
    assert torch.allclose(pull(torch.ones_like(out))[0], expected, atol=1e-5)
