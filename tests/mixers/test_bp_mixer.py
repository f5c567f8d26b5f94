"""The bp layer: its state, its cost, its errors, and a comparison with the paper's own form."""

from typing import Any

import pytest
import torch

import longspan as ls
from longspan.errors import ConfigError
from longspan.mechanisms.bp import definition as bp

FP64 = torch.float64


def build(**more: Any) -> Any:
    torch.manual_seed(0)
    fields = {"k": 2, "max_level": 4} | more
    return ls.mixers.build("bp", dim=16, num_heads=4, num_kv_heads=2, **fields).double()


def test_a_state_grows_by_levels_not_by_tokens() -> None:
    small, large = (ls.mixers.build("bp", dim=64, num_heads=1, k=8, max_level=level) for level in (12, 13))
    full = ls.mixers.build("full", dim=64, num_heads=1)
    assert large.state_nbytes(1, 10**6) - small.state_nbytes(1, 10**6) < 20 * 2 * 64 * 4
    assert large.state_nbytes(1, 10**6) < full.state_nbytes(1, 10**6) / 3000


def test_a_span_begins_as_the_mean_of_its_tokens() -> None:
    mixer, x = build(), torch.randn(1, 4, 16, dtype=FP64)
    _, k, v = mixer.projections(x)
    state = mixer(x)[1]
    # the newest span of level 1 lies after the k + 1 tokens, where its slots end
    newest = sum(bp.capacities(2, 4)[:2]) - 1
    torch.testing.assert_close(state.k[:, :, newest], k[:, :, 2:].mean(2))
    torch.testing.assert_close(state.v[:, :, newest - 1], v[:, :, :2].mean(2))
    # level 3 holds four tokens of eight, level 2 has no open span
    torch.testing.assert_close(state.open_v[:, :, 2], v.mean(2))
    torch.testing.assert_close(state.open_mass[:, :, 2].exp(), torch.full((1, 2), 4.0, dtype=FP64))
    assert not state.open_v[:, :, 1].any()


def test_positions_depend_on_the_tree_alone_where_the_model_has_none() -> None:
    """A token that moves by a whole span of the highest level sees the same."""
    mixer, x = build(max_level=3), torch.randn(1, 20, 16, dtype=FP64)
    far = mixer(torch.cat([torch.randn(1, 64, 16, dtype=FP64), x], 1))[0][:, -1]
    near = mixer(torch.cat([torch.randn(1, 48, 16, dtype=FP64), x], 1))[0][:, -1]
    assert not torch.allclose(far, near)  # at least 23 earlier tokens are seen
    x = torch.randn(1, 40, 16, dtype=FP64)  # and at most 30
    far = mixer(torch.cat([torch.randn(1, 64, 16, dtype=FP64), x], 1))[0][:, -1]
    near = mixer(torch.cat([torch.randn(1, 48, 16, dtype=FP64), x], 1))[0][:, -1]
    torch.testing.assert_close(far, near)


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"k": 0}, "bp.k = 0"), ({"max_level": 25}, "from 0 to 24"), ({"max_level": -1}, "from 0 to 24")],
)
def test_refusals(fields: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(**fields)


def test_the_papers_graph_and_ours_agree_on_who_sees_whom() -> None:
    """With means as spans and the same projections, our layer gives the outputs of the paper's."""
    length, k, heads, dim = 37, 2, 2, 8
    graph = bp.paper_graph(length, k)
    q_weight, k_weight, v_weight = (torch.randn(dim, dim, dtype=FP64) for _ in range(3))
    x = torch.randn(1, length, dim, dtype=FP64)
    means, level = [x], 1
    while level <= (length - 1).bit_length():
        means.append(torch.stack([part.mean(1) for part in x.split(1 << level, 1)], 1))
        level += 1
    nodes = torch.cat(means, 1)
    relative = torch.zeros(int(graph.relative_places.max()) + 1, dim // heads, dtype=FP64)
    paper = bp.paper_layer(nodes, q_weight, k_weight, v_weight, relative, graph, heads=heads)[:, :length]
    q, key, value = ((x @ w).unflatten(-1, (heads, -1)).transpose(1, 2) for w in (q_weight, k_weight, v_weight))
    ours, _ = ls.ops.bp_attention(q, key, value, torch.zeros(level - 1, heads, dim // heads, dtype=FP64), nearest=k)
    torch.testing.assert_close(ours.transpose(1, 2).flatten(2), paper)


def test_spans_of_the_paper_begin_as_means_of_their_tokens() -> None:
    length, heads, dim = 21, 2, 8
    graph = bp.paper_graph(length, 1, causal=False)
    q_weight, k_weight, v_weight = (torch.randn(dim, dim, dtype=FP64) for _ in range(3))
    x = torch.randn(1, length, dim, dtype=FP64)
    nodes = torch.cat([x, x.new_zeros(1, len(graph.relative_places) - length, dim)], 1)
    relative = torch.randn(int(graph.relative_places.max()) + 1, dim // heads, dtype=FP64)
    out = bp.paper_layer(nodes, q_weight, k_weight, v_weight, relative, graph, heads=heads)
    values = x @ v_weight
    torch.testing.assert_close(out[:, length : length + 10], values[:, :20].unflatten(1, (10, 2)).mean(2))
    torch.testing.assert_close(out[:, length + 10], values[:, 20])
