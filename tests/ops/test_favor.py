"""FAVOR+: features against their formulas, unbiased in every direction, with the variances of the theory."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from longspan import ops, reference
from longspan.errors import ConfigError

FP64 = torch.float64


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=FP64, generator=generator(seed))


@pytest.mark.parametrize("kind", ["positive", "hyperbolic", "trigonometric", "bounded", "relu"])
@pytest.mark.parametrize("causal", [False, True])
def test_attention_equals_its_definition(kind: str, causal: bool) -> None:
    projection = ops.orthogonal_projection(9, 4, generator=generator()).double()
    bound = -0.05 if kind == "bounded" else None
    outputs_and_gradients = []
    for module in (ops, reference):
        q, k, v = (draw(seed, 2, heads, 130, 4).requires_grad_() for seed, heads in ((1, 4), (2, 2), (3, 2)))
        out, sums = module.favor_attention(q, k, v, projection, kind=kind, bound=bound, causal=causal)
        if kind == "trigonometric":
            # denominators pass through zero; compare where they do not
            near = out.detach().abs() < 5
            outputs_and_gradients.append([torch.where(near, out, 0).detach().clamp(-5, 5)])
            continue
        ends = [sums.values, sums.keys] if causal else []
        outputs_and_gradients.append([out, *ends, *torch.autograd.grad((out * draw(4, *out.shape)).sum(), [q, k, v])])
    for actual, expected in zip(*outputs_and_gradients, strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-8, rtol=1e-7)


@pytest.fixture(scope="module")
def projections() -> list[Tensor]:
    """2,000 draws, which take longer than the features that the tests compute with them."""
    random = generator(1)
    return [ops.orthogonal_projection(32, 16, generator=random) for _ in range(2000)]


@pytest.mark.parametrize("direction", ["positive", "negative", "random"])
@pytest.mark.parametrize("kind", ["positive", "hyperbolic", "bounded"])
def test_unbiased_within_four_standard_errors_of_2000_draws(
    projections: list[Tensor], kind: str, direction: str
) -> None:
    """Raw QR without the signs fails for all-positive and all-negative directions."""
    dim = 16
    unit = {"positive": torch.ones(dim), "negative": -torch.ones(dim), "random": draw(5, dim).float()}[
        direction
    ].double()
    x = 0.7 * unit / unit.norm()
    products = []
    for projection in projections:
        phi, scale = ops.favor_features(x.view(1, 1, 1, -1), projection, kind=kind, bound=-0.02)
        assert scale is not None
        products.append(float((phi.square().sum(-1) * torch.exp(2 * scale)).squeeze()))
    estimates = torch.tensor(products, dtype=FP64)
    error = estimates.std() / math.sqrt(len(estimates))
    assert abs(estimates.mean() - math.exp(float(x @ x))) < 4 * error


def test_directions_are_haar_and_norms_are_those_of_normal_rows() -> None:
    random = generator(2)
    rows = torch.cat([ops.orthogonal_projection(20, 8, generator=random) for _ in range(400)])
    first = rows[:8].double()
    gram = (first / first.norm(dim=1, keepdim=True)) @ (first / first.norm(dim=1, keepdim=True)).mT
    torch.testing.assert_close(gram, torch.eye(8, dtype=FP64), atol=1e-5, rtol=0)
    assert rows.mean(0).abs().max() < 5 / math.sqrt(len(rows)), "signs: no direction is preferred"
    assert abs(float(rows.square().sum(1).mean()) - 8) < 0.3
    fixed = ops.orthogonal_projection(20, 8, generator=random, regularized=True)
    torch.testing.assert_close(fixed.norm(dim=1), torch.full((20,), 8**0.5), atol=1e-5, rtol=0)


def mse(
    kind: str, count: int, x: Tensor, y: Tensor, *, orthogonal: bool = True, draws: int = 400, **more: Any
) -> float:
    random, errors = generator(3), []
    for _ in range(draws):
        if orthogonal:
            projection = ops.orthogonal_projection(count, len(x), generator=random)
        else:
            projection = torch.randn(count, len(x), generator=random)
        (a, la), (b, lb) = (ops.favor_features(t.view(1, 1, 1, -1), projection, kind=kind, **more) for t in (x, y))
        assert la is not None
        assert lb is not None
        errors.append(float(((a * b).sum(-1) * torch.exp(la + lb)).squeeze()) - math.exp(float(x @ y)))
    return sum(error * error for error in errors) / draws


@pytest.mark.long
def test_variances_are_ordered_as_in_theory() -> None:
    x, y = 0.5 * draw(6, 8) / 2, 0.5 * draw(7, 8) / 2
    independent = mse("positive", 8, x, y, orthogonal=False, draws=3000)
    z = float((x + y).square().sum())
    theory = math.exp(z) * math.exp(2 * float(x @ y)) * (1 - math.exp(-z)) / 8
    assert independent == pytest.approx(theory, rel=0.25)
    orthogonal = mse("positive", 8, x, y, draws=3000)
    assert orthogonal < independent
    assert mse("hyperbolic", 8, x, y, draws=3000) < orthogonal
    quarter = mse("positive", 32, x, y, draws=1500)
    assert quarter == pytest.approx(orthogonal / 4, rel=0.35)


def test_the_bound_of_favor_plus_plus_minimizes_its_second_moment() -> None:
    for dim, square in ((16, 1.0), (64, 8.0), (64, 64.0)):
        best = float(ops.bounded_constant(torch.tensor(square, dtype=FP64), dim))
        grid = -torch.logspace(-6, 0.5, 4000, dtype=FP64)
        moment = dim * torch.log(1 - 4 * grid) - dim / 2 * torch.log(1 - 8 * grid)
        moment = moment + 2 * (1 - 4 * grid) * square / (1 - 8 * grid)
        assert best < 0
        assert best == pytest.approx(float(grid[moment.argmin()]), rel=0.01)
    plain = ops.favor_features(draw(8, 1, 1, 3, 4), torch.randn(5, 4, generator=generator()))
    bounded = ops.favor_features(
        draw(8, 1, 1, 3, 4), torch.randn(5, 4, generator=generator()), kind="bounded", bound=0.0
    )
    for actual, expected in zip(bounded, plain, strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-12, rtol=0)


def test_kernels_are_what_they_are_called_and_unknown_ones_are_refused() -> None:
    x, projection = draw(9, 1, 1, 2, 4), torch.eye(4)
    for kind, kernel in ops.KERNELS.items():
        phi, scale = ops.favor_features(x, projection, kind=kind)
        torch.testing.assert_close(phi, kernel(x) + 1e-3, atol=1e-12, rtol=0)
        assert scale is None
    with pytest.raises(ConfigError, match="known: positive"):
        ops.favor_features(x, projection, kind="softmax")
    with pytest.raises(ConfigError, match="bound is missing"):
        ops.favor_features(x, projection, kind="bounded")


def test_many_features_approach_softmax_attention_where_inputs_are_small() -> None:
    q, k, v = (0.25 * draw(seed, 1, 1, 64, 16) if seed < 12 else draw(seed, 1, 1, 64, 16) for seed in (10, 11, 12))
    exact = reference.full_attention(q, k, v, causal=True)
    errors = []
    for count in (16, 256, 4096):
        projection = ops.orthogonal_projection(count, 16, generator=generator(4))
        out, _ = ops.favor_attention(q, k, v, projection)
        errors.append(float((out - exact).norm() / exact.norm()))
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.02
