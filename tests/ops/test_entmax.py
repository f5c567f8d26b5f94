"""alpha-entmax: against its definition and another implementation; gradients, limits and root finding."""

from typing import Any

import entmax as oracle  # type: ignore[import-untyped]
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import longspan as ls
from longspan import ops, reference
from longspan.mechanisms.entmax.curve import num_steps

# Any, as the calls unpack lists and dicts of arguments
entmax_attention: Any = ops.entmax_attention
reference_entmax_attention: Any = reference.entmax_attention

FP64 = torch.float64
ALPHAS = [1.0, 1.001, 1.05, 1.2, 1.25, 1.5, 1.75, 1.97, 2.0]
HEADS = [1.0, 1.15, 1.5, 2.0]


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=FP64, generator=torch.Generator().manual_seed(seed))


def heads(seed: int, length: int, memory: int = 0, *, kv_heads: int = 2, batch: int = 2) -> list[Tensor]:
    """q, k, v as projections give them, and an alpha per head."""
    shapes = ((batch, length, 4, 8), (batch, memory + length, kv_heads, 8), (batch, memory + length, kv_heads, 8))
    qkv = [2 * draw(seed + i, *shape).transpose(1, 2) for i, shape in enumerate(shapes)]
    return [t.requires_grad_() for t in [*qkv, torch.tensor(HEADS, dtype=FP64)]]


def ragged(length: int, memory: int, *, causal: bool = True) -> dict[str, Any]:
    column = torch.arange(length).expand(2, -1)
    begins = torch.rand(2, length, generator=torch.Generator().manual_seed(length)) < 0.1
    origin = torch.where(begins, column, -memory).cummax(1).values
    rows: dict[str, Any] = {
        "lengths": torch.tensor([length, length // 2]),
        "start": (origin + memory).clamp(min=0) if causal else origin,
    }
    return rows | ({"memory_lengths": torch.tensor([memory // 3, memory])} if memory else {})


def agree(operands: list[Tensor], **keywords: Any) -> None:
    fast, slow = (where.entmax_attention(*operands, **keywords) for where in (ops, reference))
    torch.testing.assert_close(fast, slow, atol=1e-9, rtol=0)
    with torch.no_grad():
        torch.testing.assert_close(entmax_attention(*operands, **keywords), slow, atol=1e-9, rtol=0)
    weight = draw(7, *slow.shape)
    grads = (torch.autograd.grad(out, operands, weight) for out in (fast, slow))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


CALLS = [(1, 0, 4), (1, 40, 2), (2, 5, 1), (63, 36, 4), (63, 36, 2), (63, 36, 1), (150, 0, 2), (90, 73, 1)]


@pytest.mark.parametrize("window", [None, 1, 37])
@pytest.mark.parametrize(("length", "memory", "kv_heads"), CALLS)
def test_attention_equals_its_definition(length: int, memory: int, window: int | None, kv_heads: int) -> None:
    tensors = heads(0, length, memory, kv_heads=kv_heads)
    agree(tensors, window=window)
    agree(tensors, window=window, **ragged(length, memory))


@pytest.mark.parametrize("window", [None, 1, 37, 500])
@pytest.mark.parametrize("length", [1, 63, 150])
def test_bidirectional(length: int, window: int | None) -> None:
    tensors = heads(0, length)
    agree(tensors, window=window, causal=False)
    agree(tensors, window=window, causal=False, **ragged(length, 0, causal=False))


@pytest.mark.long  # the fourth law reads a thousand tokens too
def test_a_thousand_tokens() -> None:
    agree(heads(0, 1000, batch=1))
    agree(heads(0, 700, 63, batch=1), window=100, scale=0.7)


@settings(max_examples=20)
@given(
    length=st.integers(1, 150),
    memory=st.sampled_from([0, 0, 1, 40, 130]),
    sizes=st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3)),
    window=st.sampled_from([None, 1, 2, 16, 64, 90, 1000]),
    causal=st.booleans(),
    limits=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    seed=st.integers(0, 10**6),
)
def test_random_calls(
    length: int,
    memory: int,
    sizes: tuple[int, int, int],
    window: int | None,
    causal: bool,
    limits: tuple[bool, bool, bool],
    seed: int,
) -> None:
    (batch, group, kv_heads), generator = sizes, torch.Generator().manual_seed(seed)
    q = draw(seed, batch, length, group * kv_heads, 4)
    k, v = draw(seed + 1, 2, batch, memory + length, kv_heads, 4)
    alpha = 1 + torch.rand(group * kv_heads, generator=generator, dtype=FP64)
    keywords: dict[str, Any] = {"window": window, "causal": causal}
    if limits[0]:
        keywords["lengths"] = torch.randint(0, length + 1, (batch,), generator=generator)
    if limits[1]:
        keywords["memory_lengths"] = torch.randint(0, memory + 1, (batch,), generator=generator)
    if limits[2] and (causal or memory == 0):
        keywords["start"] = torch.randint(-5, memory + length, (batch, length), generator=generator).sort()[0]
    agree([t.requires_grad_() for t in (*(t.transpose(1, 2) for t in (q, k, v)), alpha)], **keywords)


# the function ------------------------------------------------------------------------------------------------


def package_entmax(z: Tensor, alpha: float) -> Tensor:
    """The same weights by the package `entmax`: exact by sorting at 1.5 and 2, else by bisection."""
    if alpha == 1:
        return z.softmax(-1)
    if alpha in (1.5, 2.0):
        weights: Tensor = (oracle.entmax15 if alpha == 1.5 else oracle.sparsemax)(z, dim=-1)
    else:
        weights = oracle.entmax_bisect(z, alpha, dim=-1, n_iter=100)
    return weights


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
def test_against_another_implementation(alpha: float, scale: float) -> None:
    z = (scale * draw(1, 5, 300)).requires_grad_()
    weight = draw(2, 5, 300)
    expected = package_entmax(z, alpha)
    (slope,) = torch.autograd.grad(expected, z, weight)
    for where in (ops, reference):
        p = where.entmax(z, alpha)
        torch.testing.assert_close(p, expected, atol=1e-9, rtol=0)
        torch.testing.assert_close(torch.autograd.grad(p, z, weight)[0], slope, atol=1e-9, rtol=0)


@pytest.mark.parametrize("alpha", [1.05, 1.3, 1.5, 1.8])
def test_alpha_gradient_against_another_implementation(alpha: float) -> None:
    z, weight = draw(1, 5, 40), draw(2, 5, 40)
    slopes = []
    for function in (ops.entmax, reference.entmax, lambda z, a: oracle.entmax_bisect(z, a, dim=-1, n_iter=100)):
        a = torch.full((5, 1), alpha, dtype=FP64, requires_grad=True)
        slopes.append(torch.autograd.grad(function(z, a), a, weight)[0])
    torch.testing.assert_close(slopes[0], slopes[1], atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(slopes[0], slopes[2], atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize("where", [ops, reference])
@pytest.mark.parametrize("alpha", [1.02, 1.3, 1.5, 1.8, 1.95])
def test_gradients_equal_finite_differences(where: Any, alpha: float) -> None:
    z = draw(3, 2, 9).requires_grad_()
    a = torch.full((2, 1), alpha, dtype=FP64, requires_grad=True)
    assert torch.autograd.gradcheck(where.entmax, (z, a))


@pytest.mark.parametrize("keywords", [{}, {"window": 5}, {"causal": False}])
def test_gradients_of_attention_equal_finite_differences(keywords: dict[str, Any]) -> None:
    q, k, v = (t.detach().requires_grad_() for t in heads(4, 11, batch=1)[:3])
    alpha = torch.tensor([1.1, 1.3, 1.5, 1.9], dtype=FP64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *t: entmax_attention(*t, **keywords), (q, k, v, alpha), fast_mode=True)


def test_the_gradient_of_alpha_at_the_softmax() -> None:
    """At alpha = 1 it is the one-sided derivative, and near it no digit is lost: a head can leave the softmax."""
    z, weight = draw(5, 20), draw(6, 20)

    def loss(alpha: float) -> float:
        return float((ops.entmax(z, alpha) * weight).sum())

    step = 1e-4  # second-order one-sided difference
    numeric = (4 * loss(1 + step) - loss(1 + 2 * step) - 3 * loss(1.0)) / (2 * step)
    slopes = []
    for alpha in (1.0, 1 + 1e-12, 1 + 1e-8, 1 + 1e-6):
        a = torch.tensor(alpha, dtype=FP64, requires_grad=True)
        slopes.append(float(torch.autograd.grad((ops.entmax(z, a) * weight).sum(), a)[0]))
    assert abs(slopes[0] - numeric) < 1e-6 * max(1.0, abs(numeric))
    assert max(abs(s - slopes[0]) for s in slopes) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, FP64])
def test_series_and_formula_meet(dtype: torch.dtype) -> None:
    """On both sides of the alpha at which the slope changes from its series to its formula."""
    border = 5e-3 if dtype == torch.float32 else 1e-4
    z, weight = draw(5, 200).to(dtype) * 3, draw(6, 200).to(dtype)
    slopes = []
    for a in (0.999 * border, 1.001 * border):
        alpha = torch.tensor(1 + a, dtype=FP64, requires_grad=True)
        slopes.append(float(torch.autograd.grad((ops.entmax(z, alpha) * weight).sum(), alpha)[0]))
        attention = [z[:1, None].expand(1, 1, 1, 1) * 0 + 1, z.view(1, 1, 200, 1), weight.view(1, 1, 200, 1)]
        alpha = torch.tensor([1 + a], dtype=FP64, requires_grad=True)
        out = entmax_attention(*attention, alpha, causal=False, scale=1.0)
        slopes.append(float(torch.autograd.grad(out.sum(), alpha)[0]))
    spread = max(slopes) - min(slopes)
    assert spread < (1e-3 if dtype == torch.float32 else 1e-5) * max(1.0, abs(slopes[0]))


def test_entmax_approaches_the_softmax() -> None:
    z = 3 * draw(7, 6, 500)
    distances = [float((ops.entmax(z, 1 + a) - z.softmax(-1)).abs().max()) for a in (1e-3, 1e-6, 1e-9, 0.0)]
    assert distances[0] < 1e-2
    assert distances[1] < 1e-5
    assert distances[2] < 1e-8
    assert distances[3] < 1e-15


@pytest.mark.parametrize("alpha", ALPHAS)
def test_entmax_has_its_defining_properties(alpha: float) -> None:
    """Sums to one, keeps the order, ignores a shift, commutes with permutations, gives zero at -inf."""
    z = 2 * draw(8, 7, 60)
    p = ops.entmax(z, alpha)
    torch.testing.assert_close(p.sum(-1), torch.ones(7, dtype=FP64))
    assert (p >= 0).all()
    order = z.argsort(-1)
    assert (p.gather(-1, order).diff(dim=-1) >= 0).all()
    torch.testing.assert_close(ops.entmax(z + 123.0, alpha), p, atol=1e-12, rtol=0)
    torch.testing.assert_close(ops.entmax(z.gather(-1, order), alpha), p.gather(-1, order), atol=1e-12, rtol=0)
    hidden = z.clone()
    hidden[:, 40:] = -torch.inf
    masked = ops.entmax(hidden, alpha)
    torch.testing.assert_close(masked[:, :40], ops.entmax(z[:, :40], alpha), atol=1e-12, rtol=0)
    assert not masked[:, 40:].any()
    hidden[2] = -torch.inf
    assert not ops.entmax(hidden, alpha)[2].any()
    leaf = hidden.requires_grad_()
    assert torch.isfinite(torch.autograd.grad(ops.entmax(leaf, alpha).square().sum(), leaf)[0]).all()
    torch.testing.assert_close(ops.entmax(z.mT, alpha, dim=0), p.mT, atol=1e-12, rtol=0)


def test_support_shrinks_as_alpha_grows() -> None:
    z = draw(9, 5, 400)
    support = torch.stack([(ops.entmax(z, alpha) > 0).sum(-1) for alpha in (1.0, 1.2, 1.5, 1.8, 2.0)])
    assert (support.diff(dim=0) <= 0).all()
    assert (support[0] == 400).all()
    assert (support[-1] < 20).all()


def test_alpha_may_differ_per_row_or_head() -> None:
    z = draw(10, 2, len(ALPHAS), 6, 50)
    alpha = torch.tensor(ALPHAS, dtype=FP64)[:, None, None]
    joint = ops.entmax(z, alpha)
    for i, value in enumerate(ALPHAS):
        torch.testing.assert_close(joint[:, i], ops.entmax(z[:, i], value), atol=1e-12, rtol=0)


def families(keys: int) -> dict[str, Tensor]:
    """Rows that are hard on root finding: nearly equal, far apart, clustered, of geometric and heavy tails."""
    g = torch.Generator().manual_seed(keys)
    normal, even = (f(16, keys, dtype=FP64, generator=g) for f in (torch.randn, torch.rand))
    scores = {f"normal {s}": normal * s for s in (1e-3, 0.1, 1.0, 30.0, 1e4)}
    ladder = torch.arange(keys, dtype=FP64)
    scores |= {
        "equal": torch.zeros(16, keys, dtype=FP64),
        "even": even,
        "tail below": even.log(),
        "tail above": -even.log(),
        "heavy tail": torch.tan(3.1 * (even - 0.5)),
        "ladder of 12": -(12.0 ** (ladder.clamp(max=16) - 16)).expand(16, -1),
        "ladder of 3": -(3.0 ** (ladder % 33 - 32)).expand(16, -1),
        "two heaps": (even < 0.1) * 0.7 + normal * 1e-4,
        "one above": torch.cat([torch.full((16, 1), 0.5, dtype=FP64), normal[:, 1:] * 0.01], 1),
        "few below": torch.where(even < 0.02, -(10 ** (4 * normal)).clamp(max=1e4), normal * 1e-3),
    }
    return scores


STEEP = [1.01, 1.06, 1.1, 1.21, 1.29, 1.3, 1.47, 1.5, 1.53, 1.6, 1.75, 1.76, 1.9, 1.99, 2.0]
# only near 2 does a longer row miss its threshold with more steps than 2,000 keys do
ROWS = [(alpha, keys) for keys in (2, 17, 300, 2000) for alpha in STEEP] + [(1.9, 5000), (1.99, 5000)]


@pytest.mark.parametrize(("alpha", "keys"), ROWS)
def test_the_fixed_number_of_steps_is_enough(alpha: float, keys: int) -> None:
    names, rows = list(families(keys)), 16 if keys <= 300 else 4
    z = torch.stack([family[:rows] for family in families(keys).values()])
    missed = (ops.entmax(z, alpha) - reference.entmax(z, alpha)).abs().amax((1, 2))
    assert (missed <= 1e-9).all(), dict(zip(names, missed.tolist(), strict=True))
    # the same rows as scores of attention whose values are unit vectors: the tiles and their fp32 steps
    z = z[:, :: rows // 2].flatten(0, 1)
    for dtype, near in ((FP64, 1e-9), (torch.float32, 2e-5 * z.abs().amax(-1).clamp(min=1))):
        value = torch.linspace(-1, 1, keys, dtype=dtype)
        out = entmax_attention(
            torch.ones(len(z), 1, min(2, keys), 1, dtype=dtype),
            z.to(dtype)[:, None, :, None],
            value[None, None, :, None].expand(len(z), -1, -1, -1),
            torch.tensor([alpha]),
            causal=False,
            scale=1.0,
        )
        weights = reference.entmax(z.to(dtype).double(), float(torch.tensor(alpha)))
        missed = (out[:, 0, 0, 0].double() - (weights * value).sum(-1)).abs()
        assert (missed < near).all(), (dtype, dict(zip(names, missed.view(-1, 2).tolist(), strict=True)))


@pytest.mark.parametrize("alpha", [1.75, 1.95, 2.0])
@pytest.mark.parametrize("scale", [0.02, 0.1, 0.3])
def test_steps_do_not_grow_with_the_length(alpha: float, scale: float) -> None:
    """Many nearly equal scores, as a new model has them: Newton's steps alone would need more and more."""
    z = scale * draw(12, 2, 65536)
    torch.testing.assert_close(ops.entmax(z, alpha), reference.entmax(z, alpha), atol=1e-9, rtol=0)


def test_fewer_steps_would_not_be_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test of the number of steps can fail."""
    from longspan.mechanisms.entmax import curve as entmax_curve

    monkeypatch.setattr(entmax_curve, "num_steps", lambda a, dtype: num_steps(a, dtype) // 2)
    far = max(float((ops.entmax(z, 1.9) - reference.entmax(z, 1.9)).abs().max()) for z in families(300).values())
    assert far > 1e-9


# precision, bits and bad input -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_low_precision_stays_near(dtype: torch.dtype) -> None:
    rough = [t.detach().to(dtype) for t in heads(0, 150, 40)[:3]]
    alpha = torch.tensor(HEADS)
    out = entmax_attention(*rough, alpha, window=90)
    assert out.dtype == dtype
    slow = reference_entmax_attention(*(t.double() for t in rough), alpha.double(), window=90)
    near = 0.05 if dtype == torch.bfloat16 else 2e-5
    torch.testing.assert_close(out.double(), slow, atol=near, rtol=near)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_large_offsets_give_no_nan(alpha: float, dtype: torch.dtype) -> None:
    z = (draw(11, 4, 64) * 100).to(dtype) + 5000
    p = ops.entmax(z.requires_grad_(), alpha)
    assert p.dtype == dtype
    torch.testing.assert_close(p.double().sum(-1), torch.ones(4, dtype=FP64), atol=0.02, rtol=0)
    assert torch.isfinite(torch.autograd.grad(p.float().square().sum(), z)[0]).all()


def test_alpha_keeps_its_dtype_and_half_precision_is_computed_in_fp32() -> None:
    qkv = [t.detach().bfloat16().requires_grad_() for t in heads(0, 70)[:3]]
    alpha = torch.tensor(HEADS, requires_grad=True)
    outputs_and_gradients = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = entmax_attention(*qkv, alpha)
            outputs_and_gradients.append([out, *torch.autograd.grad(out.float().square().sum(), [*qkv, alpha])])
    assert [t.dtype for t in outputs_and_gradients[0]] == [torch.bfloat16] * 4 + [torch.float32]
    assert all(torch.equal(a, b) for a, b in zip(*outputs_and_gradients, strict=True))


def test_nothing_visible_and_no_tokens_give_zeros() -> None:
    tensors = heads(0, 6, 4)
    no_tokens = {"lengths": torch.tensor([0, 6]), "memory_lengths": torch.tensor([0, 0])}
    out = entmax_attention(*tensors, window=3, **no_tokens)
    assert not out[0].any()
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(out.sum(), tensors))
    assert entmax_attention(*heads(0, 0, 5)).shape == (2, 4, 0, 8)
    assert ops.entmax(torch.zeros(3, 0), 1.5).shape == (3, 0)


def test_wrong_arguments_raise_one_clear_line() -> None:
    q, k, v, alpha = heads(0, 6)
    with pytest.raises(ls.ConfigError, match=r"alpha has values from 1.0 to 2.5; must be in \[1, 2\]"):
        entmax_attention(q, k, v, alpha.detach().clamp(max=1.5) * 0 + torch.tensor([1.0, 2.5, 1.0, 1.0]))
    with pytest.raises(ls.ConfigError, match=r"alpha has shape \(3,\); expected \(heads,\) = \(4,\)"):
        entmax_attention(q, k, v, alpha[:3])
    with pytest.raises(ls.ConfigError, match="window = 0: must be at least 1"):
        entmax_attention(q, k, v, alpha, window=0)
    with pytest.raises(ls.ConfigError, match="size 1 at dim -1"):
        ops.entmax(torch.zeros(3, 4), torch.full((4,), 1.5))
    with pytest.raises(ls.ConfigError, match=r"in \[1, 2\]"):
        ops.entmax(torch.zeros(3, 4), float("nan"))
