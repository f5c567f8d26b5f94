"""The gated delta rule against its definition, in hard cases: equal keys, long decays, documents, blocks."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from longspan import mixers, ops, reference
from longspan.errors import ConfigError, UnsupportedError
from longspan.mechanisms.gated_delta import operation

FP64 = torch.float64


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=FP64, generator=torch.Generator().manual_seed(seed))


def inputs(
    length: int, *, batch: int = 2, heads: int = 4, kv_heads: int = 2, key_dim: int = 5, value_dim: int = 3
) -> list[Tensor]:
    """q, k, v, log decays, strengths and a state."""
    return [
        draw(0, batch, heads, length, key_dim),
        F.normalize(draw(1, batch, kv_heads, length, key_dim), dim=-1),
        draw(2, batch, kv_heads, length, value_dim),
        -F.softplus(draw(3, batch, kv_heads, length) - 2),
        draw(4, batch, kv_heads, length).sigmoid(),
        draw(5, batch, kv_heads, key_dim, value_dim),
    ]


def packed(length: int) -> dict[str, Tensor]:
    """Rows of several documents, the second of them short."""
    start = torch.full((2, length), -4)
    for row, begin in ((0, 5), (0, 6), (0, length // 2), (1, 0), (1, 7)):
        start[row, begin:] = begin
    return {"lengths": torch.tensor([length, length - 3]), "start": start}


def outputs_and_gradients(where: Any, tensors: list[Tensor], **layout: Tensor) -> list[Tensor]:
    """Outputs at real tokens, the state, and gradients of everything."""
    leaves = [t.clone().requires_grad_() for t in tensors]
    out, state = where.gated_delta_attention(*leaves[:5], state=leaves[5], **layout)
    if "lengths" in layout:
        out = out * (torch.arange(out.shape[2]) < layout["lengths"][:, None])[:, None, :, None]
    loss = (out * draw(7, *out.shape)).sum() + (state * draw(8, *state.shape)).sum()
    return [out, state, *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize(
    ("length", "kv_heads", "documents"),
    [
        *((length, kv_heads, False) for length in (1, 2, 63, 64, 65, 200) for kv_heads in (1, 2, 4)),
        *((length, kv_heads, True) for length in (63, 64, 65, 200) for kv_heads in (1, 2, 4)),
        (1000, 2, False),
        (1000, 2, True),
    ],
)
def test_equals_its_definition(length: int, kv_heads: int, documents: bool, monkeypatch: Any) -> None:
    monkeypatch.setattr(operation, "BLOCK", 128)
    tensors, layout = inputs(length, kv_heads=kv_heads), packed(length) if documents else {}
    for actual, expected in zip(
        outputs_and_gradients(ops, tensors, **layout), outputs_and_gradients(reference, tensors, **layout), strict=True
    ):
        torch.testing.assert_close(actual, expected, atol=1e-9, rtol=1e-9)


def test_no_tokens() -> None:
    *tensors, state = inputs(0)
    for where in (ops, reference):
        out, after = where.gated_delta_attention(*tensors, state=state)
        assert out.shape == (2, 4, 0, 3)
        assert torch.equal(after, state)


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("taps", [1, 4])
@pytest.mark.parametrize("length", [1, 2, 40])
def test_the_convolution_equals_its_definition(length: int, taps: int, documents: bool) -> None:
    tensors = [draw(0, 2, 3, length, 4), draw(1, 3, 4, taps), draw(2, 2, 3, taps - 1, 4)]
    start = packed(length)["start"] if documents else None
    outputs_and_gradients = []
    for where in (ops, reference):
        leaves = [t.clone().requires_grad_() for t in tensors]
        out = where.short_convolution(*leaves[:2], past=leaves[2], start=start)
        outputs_and_gradients.append([out, *torch.autograd.grad((out * draw(3, *out.shape)).sum(), leaves)])
    for fast, slow in zip(*outputs_and_gradients, strict=True):
        torch.testing.assert_close(fast, slow, atol=1e-12, rtol=1e-12)
    if documents is False:
        x, weight, past = tensors
        channels = torch.cat([past, x], 2).transpose(2, 3).flatten(1, 2)
        expected = F.conv1d(channels, weight.flatten(0, 1)[:, None], groups=12).unflatten(1, (3, 4)).transpose(2, 3)
        torch.testing.assert_close(outputs_and_gradients[0][0], expected)


def test_equal_keys_do_not_lose_precision() -> None:
    """Without decay, with strength one: powers of A reach 10^18 in a chunk, the inverse stays within one."""
    q, k, v, log_decay, strength, state = inputs(300, key_dim=16)
    k = F.normalize(torch.ones_like(k) + 1e-3 * k, dim=-1)
    tensors = [q, k, v, torch.zeros_like(log_decay), torch.ones_like(strength), state]
    exact = outputs_and_gradients(reference, tensors)
    for actual, expected in zip(outputs_and_gradients(ops, [t.float() for t in tensors]), exact, strict=True):
        assert (actual - expected).abs().max() <= 2e-5 * expected.abs().max()


def test_a_repeated_key_is_overwritten() -> None:
    """A key reads the value that was last written with it, not a sum or mean."""
    key = F.normalize(draw(0, 1, 1, 1, 8), dim=-1).expand(1, 1, 5, 8)
    values, one = draw(1, 1, 1, 5, 3), torch.ones(1, 1, 5, dtype=FP64)
    out, _ = ops.gated_delta_attention(key, key, values, 0 * one, one)
    torch.testing.assert_close(out, values)


@pytest.mark.parametrize("where", [ops, reference])
def test_a_decay_of_zero_forgets_everything(where: Any) -> None:
    tensors = inputs(100)
    log_decay = tensors[3].clone()
    log_decay[:, :, 40] = -torch.inf
    leaves = [*tensors[:3], log_decay.requires_grad_(), tensors[4]]
    out, state = where.gated_delta_attention(*leaves, state=tensors[5])
    alone, end = where.gated_delta_attention(*(t[:, :, 40:] for t in leaves))
    torch.testing.assert_close(out[:, :, 40:], alone)
    torch.testing.assert_close(state, end)
    if where is ops:
        (gradient,) = torch.autograd.grad(out.sum(), log_decay)
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("dtype", [FP64, torch.float32])
@pytest.mark.parametrize("at", [1, 30, 63, 64, 150])
def test_later_tokens_change_no_bit(at: int, dtype: torch.dtype) -> None:
    tensors = [t.to(dtype) for t in inputs(200)]
    changed = [torch.cat([t[:, :, :at], 30 * t[:, :, at:].flip(2)], 2) for t in tensors[:5]]
    changed[1], changed[4] = F.normalize(changed[1], dim=-1), changed[4].clamp(max=1)
    changed[1][:, :, :at] = tensors[1][:, :, :at]
    before = ops.gated_delta_attention(*tensors[:5], state=tensors[5])[0]
    after = ops.gated_delta_attention(*changed, state=tensors[5])[0]
    assert torch.equal(after[:, :, :at], before[:, :, :at])
    assert not torch.equal(after[:, :, at:], before[:, :, at:])


def test_no_gradient_passes_between_documents() -> None:
    tensors, layout = [t.requires_grad_() for t in inputs(150)], packed(150)
    del layout["lengths"]
    out, _ = ops.gated_delta_attention(*tensors[:5], state=tensors[5], **layout)
    gradients = torch.autograd.grad(out[0, :, 75:100].sum(), tensors)
    for gradient in gradients[:5]:
        assert not gradient[0, :, :75].any()
        assert not gradient[1].any()
    assert not gradients[5].any()


def test_what_training_keeps_is_linear_in_the_length() -> None:
    def saved_bytes(length: int) -> int:
        sizes: dict[int, int] = {}

        def pack(t: Tensor) -> Tensor:
            sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        leaves = [t.float().requires_grad_() for t in inputs(length, batch=1, key_dim=64, value_dim=64)]
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = ops.gated_delta_attention(*leaves[:5], state=leaves[5])
        del out
        return sum(sizes.values())

    # q of four heads, k, v and gates of two, their state of 64 x 64 once per block
    assert saved_bytes(4096) <= 1.02 * 4 * 4096 * (4 * 64 + 2 * 64 + 2 * 64 + 4 + 2 * 64 * 64 / operation.BLOCK)
    assert saved_bytes(4096) <= 2 * saved_bytes(2048)


def test_second_derivatives_are_refused() -> None:
    leaves = [t.requires_grad_() for t in inputs(10)]
    (gradient,) = torch.autograd.grad(
        ops.gated_delta_attention(*leaves[:5], state=leaves[5])[0].sum(), leaves[0], create_graph=True
    )
    with pytest.raises(UnsupportedError, match="gated delta rule has no second derivatives"):
        torch.autograd.grad(gradient.square().sum(), leaves[5])


def test_wrong_shapes_raise_one_clear_line() -> None:
    q, k, v, log_decay, strength, _ = inputs(10)
    for wrong in ([q[:, :3], k, v, log_decay, strength], [q, k, v[:, :, :9], log_decay, strength]):
        with pytest.raises(ConfigError, match="shapes do not match"):
            ops.gated_delta_attention(*wrong)
    with pytest.raises(ConfigError, match=r"expected \(batch, kv_heads, length\) = \(2, 2, 10\)"):
        ops.gated_delta_attention(q, k, v, log_decay[:, :1], strength)
    with pytest.raises(ConfigError, match="shapes do not match"):
        ops.short_convolution(q, draw(0, 4, 5, 4), past=q[:, :, :2])


# the layer ---------------------------------------------------------------------------------------------------


def layer(**fields: Any) -> Any:
    torch.manual_seed(0)
    return mixers.build("gated_delta", dim=24, num_heads=4, num_kv_heads=2, head_dim=6, **fields).double()


def by_hand(mixer: Any, x: Tensor) -> Tensor:
    """One row of the layer, token by token and head by head, from the paper's equations."""
    core, maps = mixer.core, mixer.projections
    memory = [torch.zeros(6, core.value_dim, dtype=FP64) for _ in range(2)]
    mixed = []
    for linear, weight in ((maps.q_proj, core.q_conv), (maps.k_proj, core.k_conv), (maps.v_proj, core.v_conv)):
        channels = F.pad(linear(x).mT, (weight.shape[2] - 1, 0))
        taps = weight.flatten(0, 1)[:, None]
        mixed.append(F.silu(F.conv1d(channels, taps, groups=len(taps))).mT.unflatten(1, (len(weight), -1)))
    outs = []
    for t, token in enumerate(x):
        q, k, v = (x_mixed[t] for x_mixed in mixed)
        a = torch.exp(-core.A_log.exp() * F.softplus(core.decay(token) + core.dt_bias))
        b = core.strength(token).sigmoid()
        gate = F.silu(core.gate(token)).view(4, -1)
        heads = []
        for head in range(4):
            if head % 2 == 0:  # once for the two query heads of a kv head
                i, key = head // 2, F.normalize(k[head // 2], dim=0)
                memory[i] = a[i] * (torch.eye(6) - b[i] * torch.outer(key, key)) @ memory[i]
                memory[i] = memory[i] + b[i] * torch.outer(key, v[i])
            o = F.normalize(q[head], dim=0) @ memory[head // 2]
            heads.append(o / (o.square().mean() + core.config.norm_eps).sqrt() * core.norm * gate[head])
        outs.append(maps.o_proj(torch.cat(heads)))
    return torch.stack(outs)


@pytest.mark.parametrize("fields", [{}, {"expand_v": 1.5, "conv_size": 3}])
@torch.no_grad()
def test_the_layer_is_what_the_equations_say(fields: dict[str, Any]) -> None:
    mixer = layer(**fields)
    mixer.core.norm.copy_(1 + 0.1 * draw(0, mixer.core.value_dim))
    x = draw(1, 1, 75, 24)
    # normalization adds an eps of 1e-6 under the root
    torch.testing.assert_close(mixer(x)[0][0], by_hand(mixer, x[0]), atol=1e-4, rtol=1e-4)


def test_a_new_layer_begins_as_the_paper_does() -> None:
    core: Any = mixers.build("gated_delta", dim=64, num_heads=512, head_dim=2).core
    rates, steps = core.A_log.exp(), F.softplus(core.dt_bias)
    assert 0 < rates.min() < 1 < 15 < rates.max() <= 16
    assert 1e-3 <= steps.min() * 1.0001 < 2e-3 < 5e-2 < steps.max() <= 0.1001
    (group,) = core.parameter_groups()
    assert {id(parameter) for parameter in group.parameters} == {id(core.A_log), id(core.dt_bias)}
    assert group.weight_decay == 0


@torch.no_grad()
def test_a_hundred_thousand_tokens_under_autocast_stay_finite() -> None:
    mixer = layer().float()
    state: Any = None
    x = 3 * torch.randn(1, 12_500, 24, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(8):
            y, state = mixer(x, state)
    assert torch.isfinite(y).all()
    assert state.memory.dtype == torch.float32
    assert state.memory.abs().max() < 100
    assert state.q.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"conv_size": 0}, "gated_delta.conv_size = 0: must be at least 1"),
        ({"norm_eps": 0.0}, "gated_delta.norm_eps = 0.0: must be positive"),
        ({"expand_v": 0.7}, r"gated_delta.expand_v = 0.7: expand_v \* head_dim"),
        ({"causal": False}, "no bidirectional form"),
    ],
)
def test_fields_that_do_not_fit(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        layer(**fields)


def test_about_is_the_docstring_of_the_folder() -> None:
    assert mixers.build("gated_delta", dim=8, num_heads=2).core.about().startswith("Gated DeltaNet (Yang")
