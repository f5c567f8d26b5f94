"""What layers read at each token of a span: the same as in one pass, causal, and complete with memory tokens."""

from typing import Any

import numpy as np
import pytest
import torch

from longspan.errors import ConfigError
from longspan.models import build_model
from longspan.train.token_layers import MEMORY, TOP, LayerView, LayerWatch
from longspan.train.token_view import read_span

STACK: dict[str, Any] = {"dim": 16, "num_layers": 2, "num_heads": 2, "vocab_size": 256}
TOKENS = np.frombuffer(b"\0the people of this union shall have peace", np.uint8)
SEGMENT = 6


def made(**fields: Any) -> Any:
    torch.manual_seed(1)
    return build_model({**STACK, **fields}).double().eval()


def views_of(model: Any, span: range, layer: int = 0) -> list[LayerView]:
    watch = LayerWatch(model, span, layer)
    read_span(model, TOKENS, span, segment=8, watch=watch.see)
    return watch.views()


def dense(view: LayerView, tokens: int, first: int = 0) -> np.ndarray[Any, Any]:
    """Weights (tokens, positions) of which the strongest are known."""
    assert view.strongest is not None
    weights = np.zeros((tokens, len(TOKENS)))
    for token, (row, values) in enumerate(zip(view.strongest.positions, view.strongest.weights, strict=True)):
        weights[token, row[row >= 0]] = values[row >= 0]
    assert not np.triu(weights, first + 1).any()
    return weights


def test_weights_are_those_of_the_attention_map() -> None:
    model = made(mixers=[{"name": "window", "window": 5}, {"name": "linear"}])
    span = range(len(TOKENS))
    mean, window, linear = views_of(model, span)
    assert (mean.number, window.number, linear.number) == (0, 1, 2)
    assert (window.name, linear.name) == ("Window", "Linear")
    inputs: list[torch.Tensor] = []
    with torch.no_grad():
        model.run(torch.tensor(TOKENS[None].astype(int)), None, None, None, None, inputs=inputs)
        maps = [
            block.mixer.attention_map(block.mixer_norm(h))[0].mean(0)
            for block, h in zip(model.layers, inputs, strict=True)
        ]
    # a token reads at most five others, so all weights are known
    np.testing.assert_allclose(dense(window, len(span)), maps[0].numpy(), atol=1e-9)
    for view, expected in ((linear, maps[1]), (mean, (maps[0] + maps[1]) / 2)):
        assert view.strongest is not None
        best = expected.topk(TOP, -1)
        np.testing.assert_allclose(view.strongest.weights, best.values.numpy(), atol=1e-9)
        real = best.values.numpy() > 1e-6
        np.testing.assert_array_equal(view.strongest.positions[real], best.indices.numpy()[real])
        assert view.sums is not None
        np.testing.assert_allclose(view.sums, 1, atol=1e-9)


def test_a_later_span_reads_the_text_before_it() -> None:
    model = made(mixers=[{"name": "window", "window": 5}])
    (_, whole, _), (_, later, _) = views_of(model, range(30)), views_of(model, range(17, 30))
    expected = dense(whole, 30)[17:]
    np.testing.assert_allclose(dense(later, 13, 17)[:, 17:], expected[:, 17:], atol=1e-9)
    assert later.sums is not None
    np.testing.assert_allclose(later.sums, expected[:, 17:].sum(1), atol=1e-9)
    assert later.sums[0] < 0.9


def test_one_layer_alone() -> None:
    model = made(mixers=[{"name": "full"}, {"name": "gated_delta"}])
    (view,) = views_of(model, range(20), layer=2)
    assert (view.number, view.strongest) == (2, None)
    assert [item.name for item in view.diagnostics] == ["decay", "write strength"]
    assert all(item.values.shape == (2, 20) for item in view.diagnostics)
    with pytest.raises(ConfigError, match="--layer 3: the model has 2 layers"):
        views_of(model, range(20), layer=3)


@pytest.mark.parametrize("extra", [{"update": "gated"}, {"accumulate": True, "max_summaries": 2}, {"per_layer": True}])
@pytest.mark.parametrize("first", [0, 15])
def test_a_recurrent_memory_reads_its_segment_and_memory_tokens(extra: dict[str, Any], first: int) -> None:
    memory = {"num_memory_tokens": 2, "segment_length": SEGMENT, **extra}
    model = made(mixers=[{"name": "full"}], memory=memory)
    span = range(first, 33)
    view = views_of(model, span, layer=1)[0]
    weights = dense(view, len(span), first)
    for token, position in enumerate(span):
        assert not weights[token, : position // SEGMENT * SEGMENT].any()
        assert weights[token, position] > 0
    outside = [item for item in view.diagnostics if item.name == MEMORY]
    assert bool(outside) == ("per_layer" not in extra)
    total = view.sums if view.sums is not None else np.zeros(0)
    if outside:
        total = total + np.nan_to_num(outside[0].values[0])
    # the first tokens may have read tokens of their segment that are not shown
    whole = slice(-first % SEGMENT, None)
    np.testing.assert_allclose(total[whole], 1, atol=1e-9)


@pytest.mark.parametrize("first", [0, 15])
def test_writes_are_the_shares_of_the_evidence(first: int) -> None:
    memory = {"num_memory_tokens": 2, "segment_length": SEGMENT, "update": "gated"}
    model = made(mixers=[{"name": "full"}], memory=memory)
    span = range(first, 33)
    (writes,) = [item for item in views_of(model, span)[0].diagnostics if item.name == "write of the segment"]
    state, mass = None, torch.zeros(1, 2)
    for begin in range(0, 30, SEGMENT):
        with torch.no_grad():
            _, state = model(torch.tensor(TOKENS[None, begin : begin + SEGMENT].astype(int)), state)
        expected = ((state.mass - mass) / state.mass.clamp(min=1e-30))[0].numpy()
        mass = state.mass
        for position in range(max(begin, first), begin + SEGMENT):
            np.testing.assert_allclose(writes.values[:, position - first], expected, atol=1e-6)
    assert mass.min() > 0
    assert np.isnan(writes.values[:, 30 - first :]).all()


def test_retrieved_tokens_have_positions_of_the_text() -> None:
    mixers = [{"name": "memorizing", "window": 3, "max_memories": 30, "k": 30}]
    mean, whole, _ = views_of(made(mixers=mixers), range(30))
    _, later, _ = views_of(made(mixers=mixers), range(17, 30))
    assert not mean.retrievals
    ((ours,), (expected,)) = later.retrievals, whole.retrievals
    # equal bytes have equal keys, and any of them may come first
    np.testing.assert_array_equal(TOKENS[ours.strongest.positions], TOKENS[expected.strongest.positions[17:]])
    np.testing.assert_allclose(ours.strongest.weights, expected.strongest.weights[17:], atol=1e-9)
    for token, row in enumerate(expected.strongest.positions):
        # everything in the complete windows before it, or the largest of it
        assert (row >= 0).sum() == min(token // 3 * 3, TOP)
        assert row.max() < token // 3 * 3
    memory = {"num_memory_tokens": 2, "segment_length": SEGMENT}
    view = views_of(made(mixers=mixers, memory=memory), range(12, 24))[1]
    (inside,) = view.retrievals
    for position, row in zip(range(12, 24), inside.strongest.positions, strict=True):
        # two memory tokens are before the segment, so its first window ends with its first token
        column = position % SEGMENT + 2
        retrieved = sorted(at for at in row.tolist() if at >= 0)
        assert retrieved == list(range(position // SEGMENT * SEGMENT, position - column % 3))
