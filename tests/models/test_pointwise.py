"""RMSNorm and SwiGLU with gradients by hand: equal to torch's, with further derivatives wherever torch has them."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from longspan.models.pointwise import RMSNorm, swiglu

EPS = 1e-5
NORM = RMSNorm(8, EPS)


def _draw(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=dtype, generator=generator).requires_grad_()


def _normalized(x: Tensor, weight: Tensor) -> Tensor:
    normalized: Tensor = torch.func.functional_call(NORM, {"weight": weight}, x)
    return normalized


CASES: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], list[tuple[int, ...]]]] = {
    "rmsnorm": (_normalized, lambda x, weight: F.rms_norm(x, weight.shape, weight, EPS), [(3, 5, 8), (8,)]),
    "swiglu": (swiglu, lambda gate, up: F.silu(gate) * up, [(3, 5, 8), (3, 5, 8)]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_are_those_of_torch(name: str, dtype: torch.dtype) -> None:
    ours, theirs, shapes = CASES[name]
    inputs = [_draw(*shape, seed=seed, dtype=dtype) for seed, shape in enumerate(shapes)]
    direction = _draw(3, 5, 8, seed=7, dtype=dtype).detach()
    outputs = [function(*inputs) for function in (ours, theirs)]
    torch.testing.assert_close(*outputs)
    assert "Backward" in type(outputs[0].grad_fn).__name__
    assert type(outputs[0].grad_fn).__name__.startswith("_"), "the gradient by hand is not used"
    gradients = [torch.autograd.grad(out, inputs, direction) for out in outputs]
    for ours_of, theirs_of in zip(*gradients, strict=True):
        torch.testing.assert_close(ours_of, theirs_of)


@pytest.mark.parametrize("name", CASES)
def test_second_derivatives_are_right(name: str) -> None:
    function, _, shapes = CASES[name]
    inputs = [_draw(*shape, seed=seed) for seed, shape in enumerate(shapes)]
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("name", CASES)
def test_one_input_may_be_a_constant(name: str) -> None:
    ours, theirs, shapes = CASES[name]
    for constant in range(2):
        inputs = [_draw(*shape, seed=seed) for seed, shape in enumerate(shapes)]
        inputs[constant].requires_grad_(False)
        gradients = [
            torch.autograd.grad(function(*inputs).square().sum(), inputs[1 - constant], create_graph=graph)[0]
            for function, graph in ((ours, False), (ours, True), (theirs, False))
        ]
        torch.testing.assert_close(gradients[0], gradients[2])
        torch.testing.assert_close(gradients[1], gradients[2])


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_transforms_and_forward_mode_work_as_in_torch(name: str) -> None:
    ours, theirs, shapes = CASES[name]
    inputs = tuple(_draw(*shape, seed=seed).detach() for seed, shape in enumerate(shapes))
    tangents = tuple(_draw(*shape, seed=seed + 3).detach() for seed, shape in enumerate(shapes))
    for left, right in zip(*(torch.func.jvp(function, inputs, tangents) for function in (ours, theirs)), strict=True):
        torch.testing.assert_close(left, right)
    with torch.autograd.forward_ad.dual_level():
        learning = [t.clone().requires_grad_() for t in inputs]
        dual = [torch.autograd.forward_ad.make_dual(*pair) for pair in zip(learning, tangents, strict=True)]
        forward, expected = (torch.autograd.forward_ad.unpack_dual(f(*dual)).tangent for f in (ours, theirs))
        torch.testing.assert_close(forward, expected)
    last = inputs[1].reshape(-1, 8)[0]
    per_row = [
        torch.func.vmap(torch.func.grad(lambda x, function=function: function(x, last).sum()))(inputs[0][0])
        for function in (ours, theirs)
    ]
    torch.testing.assert_close(*per_row)


def test_a_row_of_zeros_has_finite_gradients() -> None:
    x, weight = torch.zeros(2, 8, requires_grad=True), torch.ones(8, requires_grad=True)
    gradients = torch.autograd.grad(_normalized(x, weight).sum(), (x, weight))
    expected = torch.autograd.grad(F.rms_norm(x, (8,), weight, EPS).sum(), (x, weight))
    torch.testing.assert_close(gradients, expected)
