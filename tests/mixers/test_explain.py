"""What mechanisms tell about a call: weights of values, and numbers that the definitions confirm."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from longspan import mixers, ops, reference
from longspan.contract.explain import CoreCall, Diagnostic, Retrieval, explanations, has_token_weights
from longspan.errors import UnsupportedError
from longspan.mechanisms.memorizing.layer import MemorizingMechanism
from longspan.mechanisms.window_linear.layer import WindowLinearMechanism
from longspan.mixers import BatchLayout, Mixer
from longspan.mixers.probe import token_weights

DIM, LENGTH, BEFORE = 32, 11, 9
FORMS = [(name, fields) for name in mixers.names() for fields in mixers.examples(name)]


# infini whose values and normalizer count differently what comes again
UNEVEN = [fields for name, fields in FORMS if ("delta" in fields.values()) != ("gamma" in fields.values())]


def built(name: str, **fields: Any) -> Mixer:
    torch.manual_seed(0)
    mixer = mixers.build(name, dim=DIM, num_heads=4, **fields).double().eval()
    with torch.no_grad():
        for parameter in mixer.core.parameters():
            if not parameter.any():
                parameter.normal_(0, 0.3)
    return mixer


def call_of(mixer: Mixer, *, before: int = BEFORE, length: int = LENGTH) -> CoreCall:
    """A call after `before` tokens, as a layer makes it."""
    calls: list[CoreCall] = []

    def record(_core: Any, arguments: Any, keywords: dict[str, Any], _out: Any) -> None:
        q, k, v, before_state, rows = arguments
        calls.append(CoreCall(q, k, v, before_state, rows, keywords["hidden"]))

    x = torch.randn(1, before + length, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    hook = mixer.core.register_forward_hook(record, with_kwargs=True)
    with torch.no_grad():
        state = mixer(x[:, :before])[1] if before else None
        mixer(x[:, before:], state)
    hook.remove()
    return calls[-1]


def told(mixer: Mixer, call: CoreCall) -> dict[str, Any]:
    with torch.no_grad():
        return {item.name: item for item in explanations(mixer.core, call)}


@pytest.mark.parametrize(("name", "fields"), FORMS)
def test_weights_are_those_of_the_outputs(name: str, fields: dict[str, Any]) -> None:
    mixer = built(name, **fields)
    call = call_of(mixer, before=BEFORE if mixer.traits.streams else 0)
    if not has_token_weights(mixer.core):
        with pytest.raises(UnsupportedError, match="not weighted values"):
            token_weights(mixer.core, call)
        return
    weights = token_weights(mixer.core, call)
    later = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    assert not weights[..., later].any()
    if getattr(mixer.core, "adds", True):
        # infini that does not add counts nothing twice, so that values of the state may have negative weights
        assert (weights.sum(-1) < 1 + 1e-9).all()

    def outputs(v: Tensor) -> Tensor:
        with torch.no_grad():
            out: Tensor = mixer.core(call.q, call.k, v, call.state, call.rows, hidden=call.hidden)[0]
        return out

    other = torch.randn(call.v.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    expected = outputs(call.v) - outputs(other)
    torch.testing.assert_close(weights @ (call.v - other).repeat_interleave(4 // call.v.shape[1], 1), expected)


@pytest.mark.parametrize(("name", "fields"), FORMS)
def test_from_an_empty_state_weights_sum_to_one(name: str, fields: dict[str, Any]) -> None:
    mixer = built(name, **fields)
    if not mixer.traits.linear_in_values:
        return
    call = call_of(mixer, before=0)
    sums = token_weights(mixer.core, call).sum(-1)
    if fields in UNEVEN:
        assert not torch.isclose(sums, torch.ones_like(sums)).all()
        assert "need not sum to 1" in told(mixer, call)["share of the memory"].caption
        return
    # a query that sees no key has no weights: the first one with include_self = False, or features that do not overlap
    assert (torch.isclose(sums, torch.ones_like(sums)) | (sums == 0)).all()
    assert (sums != 0).double().mean() > 0.6


def test_decays_and_write_strengths_are_those_of_the_recurrence() -> None:
    mixer = built("gated_delta", conv_size=1)
    call = call_of(mixer)
    core: Any = mixer.core
    numbers = told(mixer, call)
    a, b = numbers["decay"].values, numbers["write strength"].values
    assert call.hidden is not None
    x = call.hidden.x
    expected = torch.exp(-core.A_log.exp() * F.softplus(core.decay(x) + core.dt_bias)).mT
    torch.testing.assert_close(a, expected)
    # the recurrence with these numbers gives the outputs of the core, before norm and gate
    weights = core.q_conv, core.k_conv, core.v_conv
    q, k, v = (F.silu(t * weight[..., 0][:, None]) for t, weight in zip(call[:3], weights, strict=True))
    q, k = ops.unit_vectors(q), ops.unit_vectors(k)
    out, _ = reference.gated_delta_attention(q, k, v, a.log(), b, state=call.state.memory)
    gate = F.silu(core.gate(x)).unflatten(2, (4, -1)).transpose(1, 2)
    normed = F.rms_norm(out, (out.shape[-1],), core.norm, core.config.norm_eps) * gate
    with torch.no_grad():
        actual = core(call.q, call.k, call.v, call.state, call.rows, hidden=call.hidden)[0]
    torch.testing.assert_close(actual, normed, rtol=1e-6, atol=1e-6)


def test_the_gate_of_infini_is_the_share_of_its_memory() -> None:
    mixer = built("infini", segment=4)
    call = call_of(mixer, before=0)
    weights = token_weights(mixer.core, call)
    share = told(mixer, call)["share of the memory"].values
    # from the second segment on, all weight on earlier segments is that of the memory
    for token in range(4, LENGTH):
        begin = token // 4 * 4
        torch.testing.assert_close(weights[0, :, token, :begin].sum(-1), share)


def test_retrieved_pairs_are_the_nearest_keys() -> None:
    mixer = built("memorizing", window=4, max_memories=10, k=3)
    call = call_of(mixer)
    pairs = told(mixer, call)["retrieved pairs"]
    assert isinstance(pairs, Retrieval)
    assert isinstance(mixer.core, MemorizingMechanism)
    scale = mixer.core.scale
    x = torch.randn(1, BEFORE + LENGTH, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        _, keys, _ = mixer.projections(x)
        cosines = F.normalize(call.q, dim=-1) @ F.normalize(keys, dim=-1).mT
    for token in range(LENGTH):
        end = (BEFORE + token) // 4 * 4
        best = cosines[0, :, token, max(end - 10, 0) : end].topk(3, -1)
        order = pairs.weights[0, :, token].sort(-1, descending=True)
        positions = pairs.positions[0, :, token].gather(-1, order.indices)
        torch.testing.assert_close(positions, best.indices + max(end - 10, 0))
        expected = (best.values * scale[:, None]).softmax(-1)
        torch.testing.assert_close(order.values, expected, rtol=1e-4, atol=1e-4)


def test_nothing_is_retrieved_from_an_empty_store() -> None:
    mixer = built("memorizing", window=4, max_memories=10, k=3)
    pairs = told(mixer, call_of(mixer, before=0))["retrieved pairs"]
    assert (pairs.positions[0, :, :4] == -1).all()
    assert (pairs.positions[0, :, 6] >= 0).all()


def test_tokens_of_a_bucket_or_cluster_are_read() -> None:
    for name, fields in (
        ("lsh", {"bucket_size": 20, "num_hashes": 2, "num_buckets": 4, "selection": "strict"}),
        ("routing", {"num_clusters": 3, "window": 20}),
    ):
        mixer = built(name, **fields)
        call = call_of(mixer, before=0)
        names = torch.stack([item.values for item in explanations(mixer.core, call) if isinstance(item, Diagnostic)])
        same = (names[:, 0, :, :, None] == names[:, 0, :, None, :]).any(0).tril(-1)
        # without any such token a query reads itself
        alone = torch.eye(LENGTH, dtype=torch.bool) & ~same.any(-1, keepdim=True)
        assert ((token_weights(mixer.core, call)[0] > 0) == (same | alone)).all(), name


def test_spans_and_supports_bound_the_weights() -> None:
    spans = built("adaptive_span", max_span=9, ramp=3, initial=0.4)
    call = call_of(spans, before=0)
    seen = (token_weights(spans.core, call)[0] > 0).sum(-1)[:, -1]
    (span,) = told(spans, call).values()
    torch.testing.assert_close(span.values, torch.full((4,), 3.6, dtype=torch.float64))
    # distances below span + ramp have a weight
    assert (seen == 7).all()
    dynamic = built("adaptive_span", max_span=6, ramp=3, dynamic=True)
    call = call_of(dynamic)
    assert call.hidden is not None
    core: Any = dynamic.core
    logits = call.hidden.x @ core.span_weight.mT + core.span_bias
    torch.testing.assert_close(told(dynamic, call)["span"].values, 6 * logits.sigmoid().mT)
    entmax = built("entmax", alpha_init=1.8)
    call = call_of(entmax, before=0)
    expected = (token_weights(entmax.core, call) > 0).sum(-1).double()
    assert expected.max() > expected.min()
    numbers = told(entmax, call)
    torch.testing.assert_close(numbers["support"].values, expected)
    torch.testing.assert_close(numbers["alpha"].values, torch.full((4,), 1.8, dtype=torch.float64))


def test_mixed_heads_tell_what_their_parts_tell() -> None:
    parts = [{"name": "infini", "num_heads": 1, "segment": 4}, {"name": "entmax", "num_heads": 3}]
    mixer = built("mixed_heads", mixers=parts)
    numbers = told(mixer, call_of(mixer))
    assert list(numbers) == ["share of the memory of heads 1 to 1", "alpha of heads 2 to 4", "support of heads 2 to 4"]
    assert numbers["support of heads 2 to 4"].values.shape == (1, 3, LENGTH)


def test_the_factor_of_a_linear_memory_scales_its_weights() -> None:
    mixer = built("window_linear", window=3)
    call = call_of(mixer, before=0)
    factor = told(mixer, call)["factor of the memory"].values
    assert isinstance(mixer.core, WindowLinearMechanism)
    torch.testing.assert_close(factor, mixer.core.gate.exp())
    weights = token_weights(mixer.core, call)[0, :, -1]
    before = weights[:, :-3].sum(-1) / weights[:, -3:].sum(-1)
    with torch.no_grad():
        mixer.core.gate.zero_()
    weights = token_weights(mixer.core, call)[0, :, -1]
    torch.testing.assert_close(before, factor * weights[:, :-3].sum(-1) / weights[:, -3:].sum(-1))


def test_an_outside_mechanism_need_not_tell_anything() -> None:
    mixer = built("full")
    call = call_of(mixer)
    assert explanations(mixer.core, call) == []
    assert isinstance(call.rows, BatchLayout)


def test_write_strengths_of_segments_are_those_of_the_memory() -> None:
    mixer = built("associative", segment=4, num_memory_tokens=3, memory_dim=4)
    core: Any = mixer.core
    # five tokens after nine: the third segment ends within the call, the fourth stays incomplete
    call = call_of(mixer, before=9, length=5)
    (strengths,) = told(mixer, call).values()
    assert strengths.values.shape == (1, 12, 5)
    assert torch.isnan(strengths.values[..., 3:]).all()
    beta = strengths.values[0, :, 0].view(4, 3)
    torch.testing.assert_close(strengths.values[0, :, 1:3], beta.reshape(12, 1).expand(12, 2))
    k, v = (
        torch.cat([old[:, :, -1:], new[:, :, :3]], 2)[0]
        for old, new in ((call.state.k, call.k), (call.state.v, call.v))
    )
    with torch.no_grad():
        weights = (core.tokens @ k.mT / k.shape[-1] ** 0.5).softmax(-1)
        phi, values = reference.dpfp(weights @ k @ core.key, core.config.nu), weights @ v @ core.value
        before = call.state.values[0], call.state.keys[0]
        expected = reference.associative_write(phi, values, beta, *before, constant_gamma=False, damped=True)
        _, after = core(call.q, call.k, call.v, call.state, call.rows)
    torch.testing.assert_close(after.values[0], expected[0])
    torch.testing.assert_close(after.keys[0], expected[1])
