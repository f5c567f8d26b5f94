"""Adaptive Span: what is learned, what it costs, and states from before a span grew or shrank."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import longspan as ls
from longspan.models import model_hash

DIM, HEADS = 32, 4


def build(spans: list[float] | None = None, **fields: Any) -> Any:
    torch.manual_seed(0)
    fields = {"max_span": 64, "ramp": 4, **fields}
    mixer = ls.mixers.build("adaptive_span", dim=DIM, num_heads=HEADS, rope=10000.0, **fields).double()
    if spans is not None:
        set_spans(mixer, spans)
    return mixer


def set_spans(mixer: Any, spans: list[float]) -> None:
    """Set the spans of the heads, in tokens."""
    with torch.no_grad():
        mixer.core.span.copy_(torch.tensor(spans) / mixer.core.config.max_span)


def drawn(length: int, seed: int = 1) -> Tensor:
    return torch.randn(2, length, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def window(size: int, mixer: Any) -> Any:
    mixer_of_window = ls.mixers.build("window", dim=DIM, num_heads=HEADS, rope=10000.0, window=size).double()
    mixer_of_window.projections.load_state_dict(mixer.projections.state_dict())
    return mixer_of_window


def test_full_spans_are_a_window() -> None:
    mixer = build([64.0] * HEADS)
    torch.testing.assert_close(mixer(drawn(150))[0], window(64, mixer)(drawn(150))[0], atol=1e-12, rtol=0)


def test_penalty_is_the_mean_span() -> None:
    mixer = build([0.0, 8.0, 16.0, 40.0], penalty=0.5)
    aux_losses: list[Tensor] = []
    mixer(drawn(9), aux_losses=aux_losses)
    assert aux_losses[0].item() == pytest.approx(0.5 * 16.0)
    (gradient,) = torch.autograd.grad(aux_losses[0], mixer.core.span)
    assert gradient[1:].tolist() == pytest.approx([0.5 * 64 / HEADS] * 3)
    dynamic = build(dynamic=True, penalty=1.0)
    dynamic_penalties: list[Tensor] = []
    mask = torch.arange(9) < torch.tensor([9, 4])[:, None]
    dynamic(drawn(9), mask=mask, aux_losses=dynamic_penalties)
    short = [p for row, n in ((0, 9), (1, 4)) for p in penalty_of(dynamic, drawn(9)[row : row + 1, :n])]
    torch.testing.assert_close(dynamic_penalties[0], (9 * short[0] + 4 * short[1]) / 13)


def penalty_of(mixer: Any, x: Tensor) -> list[Tensor]:
    aux_losses: list[Tensor] = []
    mixer(x, aux_losses=aux_losses)
    return aux_losses


def test_after_step_clamps() -> None:
    mixer = build()
    with torch.no_grad():
        mixer.core.span.copy_(torch.tensor([-0.3, 0.2, 1.7, 1.0]))
    mixer.after_step(1)
    assert mixer.core.span.tolist() == pytest.approx([0.0, 0.2, 1.0, 1.0])


def test_spans_learn_as_far_as_they_are_needed() -> None:
    """A head that must copy from 20 tokens back lengthens its span; without any gain, the penalty closes it."""
    torch.manual_seed(0)
    mixer = build([8.0] * HEADS, penalty=1e-4, ramp=16)
    optimizer = torch.optim.Adam(mixer.parameters(), lr=0.01)
    for step in range(60):
        x = torch.randn(4, 64, DIM, dtype=torch.float64)
        aux_losses: list[Tensor] = []
        y = mixer(x, aux_losses=aux_losses)[0]
        loss = (y[:, 20:] - x[:, :-20]).square().mean() + sum(aux_losses)
        optimizer.zero_grad()
        loss.backward()
        assert torch.isfinite(mixer.core.span.grad).all()
        optimizer.step()
        mixer.after_step(step)
    assert max(mixer.core.spans) > 10
    far = max(mixer.core.spans)
    for step in range(60):
        span_penalties = penalty_of(mixer, drawn(8))
        optimizer.zero_grad()
        (1e4 * span_penalties[0]).backward()
        optimizer.step()
        mixer.after_step(step)
    assert max(mixer.core.spans) < far / 2


def test_bytes_follow_the_longest_span() -> None:
    sizes = []
    for longest in (0.0, 10.0, 59.0, 64.0):
        mixer = build([0.0, longest, 0.0, 0.0])
        state = mixer(drawn(100))[1]
        assert ls.state.nbytes(state) == mixer.state_nbytes(2, 100, torch.float64)
        assert state.k.shape[2] == min(63, int(longest) + 4 - 1)
        sizes.append(ls.state.nbytes(state))
    assert sizes == sorted(sizes)


@pytest.mark.parametrize(("before", "after"), [(6.0, 40.0), (40.0, 6.0), (0.0, 64.0)])
def test_states_continue_when_spans_change(before: float, after: float) -> None:
    """Where spans grow, older tokens are missing instead of zeros; where they shrink, the newest columns remain."""
    mixer, x = build([before, 0.0, 0.0, 0.0]), drawn(90)
    with torch.no_grad():
        state = mixer(x[:, :50])[1]
        num_kept = state.k.shape[2]
        set_spans(mixer, [after, 0.0, 0.0, 0.0])
        parts = []
        for first, last in ((50, 51), (51, 63), (63, 90)):
            part, state = mixer(x[:, first:last], state)
            parts.append(part)
            assert ls.state.nbytes(state) == mixer.state_nbytes(2, last, torch.float64)
        actual = torch.cat(parts, 1)
        # the same tokens at the same positions, where only the last `num_kept` before the change exist
        gone = 50 - min(num_kept, 50)
        whole = ls.mixers.build("adaptive_span", dim=DIM, num_heads=HEADS, rope=10000.0, max_span=64, ramp=4).double()
        whole.load_state_dict(mixer.state_dict())
        expected = whole(x[:, gone:])[0][:, 50 - gone :]
    torch.testing.assert_close(actual, expected, atol=1e-9, rtol=0)


def test_short_spans_cost_less_and_give_the_same_outputs() -> None:
    """Four layers whose mean span is an eighth of the maximum: fewer FLOPs, and the outputs of untrimmed attention."""
    models: list[Any] = []
    for trimmed in (True, False):
        torch.manual_seed(0)
        config = ls.DecoderConfig(
            dim=32, num_layers=4, num_heads=4, mixers=({"name": "adaptive_span", "max_span": 512, "ramp": 16},)
        )
        model: Any = ls.Decoder(config).eval()
        spans = torch.tensor([0.0, 0.03, 0.1, 0.37])
        for block in model.layers:
            with torch.no_grad():
                block.mixer.core.span.copy_(spans)
        if not trimmed:
            for block in model.layers:
                block.mixer.core.forward = untrimmed(block.mixer.core)
        models.append(model)
    text = torch.randint(256, (1, 1200), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(models[0](text)[0], models[1](text)[0], atol=1e-5, rtol=1e-5)
    full: Any = ls.Decoder(models[0].config)
    for block in full.layers:
        nn.init.ones_(block.mixer.core.span)
    assert models[0].layers[0].mixer.core.flops(4096) * 2 < full.layers[0].mixer.core.flops(4096)


def untrimmed(core: Any) -> Any:
    """The core with every head computed as far as max_span: the definition on all keys."""

    def forward(q: Tensor, k: Tensor, v: Tensor, state: Any, rows: Any, **_: Any) -> Any:
        q, k = core.rotate(q, k, rows)
        span = core.config.max_span * core.span
        out = ls.reference.adaptive_span_attention(q, k, v, span, ramp=core.config.ramp, window=core.config.max_span)
        return out, core.init_state(q.shape[0], q.device, q.dtype)

    return forward


def test_wrong_fields_raise_one_clear_line() -> None:
    for fields, word in (
        ({"max_span": 0}, "max_span"),
        ({"ramp": 0}, "ramp"),
        ({"initial": 1.5}, "initial"),
        ({"persistent": -1}, "persistent"),
    ):
        with pytest.raises(ls.ConfigError, match=word):
            build(**fields)
    with pytest.raises(ls.ConfigError, match="bidirectional"):
        build(causal=False)


def test_spans_have_a_rate_of_their_own_if_it_is_set() -> None:
    (group,) = build(persistent=2).core.parameter_groups()
    assert (group.name, group.lr, group.weight_decay) == ("spans", None, 0.0)
    assert len(group.parameters) == 3
    core = build(persistent=2, span_lr=0.02).core
    spans, persistent = core.parameter_groups()
    assert (spans.name, spans.lr, spans.weight_decay) == ("spans", 0.02, 0.0)
    assert spans.parameters[0] is core.span
    assert (persistent.name, persistent.lr, persistent.weight_decay) == ("persistent", None, 0.0)
    assert [p.shape[1] for p in persistent.parameters] == [2, 2]
    dynamic, _ = build(dynamic=True, span_lr=0.02).core.parameter_groups()
    assert len(dynamic.parameters) == 2


def test_a_rate_that_is_not_set_does_not_change_the_hash_of_a_model() -> None:
    """States of earlier versions name a model without this field."""

    def model(**fields: Any) -> ls.Decoder:
        torch.manual_seed(0)
        mixer = {"name": "adaptive_span", "max_span": 8, **fields}
        mixed = {"name": "mixed_heads", "mixers": [{**mixer, "num_heads": 1}, {"name": "full", "num_heads": 1}]}
        return ls.Decoder(ls.DecoderConfig(vocab_size=11, dim=16, num_layers=2, num_heads=2, mixers=(mixer, mixed)))

    before = model_hash(model())
    assert model_hash(model(span_lr=None)) == before
    assert model_hash(model(span_lr=0.1)) != before
