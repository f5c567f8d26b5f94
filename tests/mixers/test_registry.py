from typing import Any

import pytest
import torch

import longspan as ls

SIZES: dict[str, Any] = {"dim": 16, "num_heads": 4}


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("windw", {}, "unknown mixer 'windw'; did you mean 'window'"),
        ("nothing like it", {}, r"known: .*\bfull, "),
        ("window", {"windw": 3}, "window: unknown field 'windw'; did you mean 'window'"),
        ("window", {"window": "3"}, "window.window: expected int, got '3'"),
        ("window", {"window": 0}, "window.window = 0: must be at least 1"),
        ("transformer_xl", {"segment": 0}, "transformer_xl.segment = 0: must be at least 1"),
        ("transformer_xl", {"mem_len": 0, "same_length": True}, "mem_len = 0: must be at least 1"),
        ("transformer_xl", {"causal": False}, "no bidirectional form"),
        ("compressive", {"ratio": 0}, "compressive.ratio = 0: must be at least 1"),
        ("compressive", {"compression": "median"}, "compressive.compression"),
        ("compressive", {"compressor_lr": 0.0}, "compressor_lr = 0.0: must be positive"),
        ("compressive", {"causal": False}, "no bidirectional form"),
        ("full", {"num_kv_heads": 3}, "num_kv_heads = 3: must divide num_heads = 4"),
        ("full", {"dim": 18}, "dim = 18 is not a multiple of num_heads = 4"),
        ("full", {"head_dim": 5, "rope": 1e4}, "needs a positive base and an even head_dim, which is 5"),
        ("full", {"dropout": 1.0}, r"dropout = 1.0: must be in \[0, 1\)"),
        ("mixed_heads", {"mixers": [{"name": "full", "num_heads": 3}]}, "num_heads add up to 3, the layer has 4"),
        (
            "mixed_heads",
            {"mixers": [{"name": "ful", "num_heads": 4}]},
            r"mixed_heads.mixers\[0\]: unknown mixer 'ful'; did you mean",
        ),
        (
            "mixed_heads",
            {"mixers": [{"num_heads": 4}]},
            r"mixed_heads.mixers\[0\] = \{'num_heads': 4\}: needs a name and a num_heads",
        ),
        (
            "mixed_heads",
            {"num_kv_heads": 2, "mixers": [{"name": "full", "num_heads": 1}, {"name": "full", "num_heads": 3}]},
            "heads 1 to 4 cut through groups of 2",
        ),
    ],
)
def test_wrong_arguments_raise_one_clear_line(name: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ls.ConfigError, match=message) as caught:
        ls.mixers.build(name, **{**SIZES, **fields})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ls.mixers.names())
def test_every_field_has_a_default(name: str) -> None:
    mixer = ls.mixers.build(name, **SIZES)
    assert mixer.state_nbytes(2, 10) == ls.state.nbytes(mixer(torch.randn(2, 10, 16))[1])


def test_calls_that_do_not_fit_are_refused() -> None:
    mixer = ls.mixers.build("window", **SIZES)
    with pytest.raises(ls.ConfigError, match=r"window: x has shape \(2, 3, 8\), expected \(batch, length, 16\)"):
        mixer(torch.randn(2, 3, 8))
    with pytest.raises(ls.ConfigError, match="x has 2 rows, the state 3; pass equal numbers"):
        mixer(torch.randn(2, 3, 16), mixer.init_state(3))
    both = ls.mixers.build("window", **SIZES, causal=False)
    with pytest.raises(ls.UnsupportedError, match="bidirectional mixer sees the future"):
        both(torch.randn(2, 3, 16), mixer.init_state(2))
    with pytest.raises(ls.UnsupportedError, match="so it has no state"):
        both.init_state(2)


def test_heads_equal_their_parts_alone() -> None:
    """Each part of `heads` gives the outputs of a separate mixer on the same heads."""
    torch.manual_seed(0)
    parts: list[dict[str, Any]] = [
        {"name": "window", "num_heads": 2, "window": 3},
        {"name": "transformer_xl", "num_heads": 2, "segment": 4, "mem_len": 4},
    ]
    joint: Any = ls.mixers.build("mixed_heads", dim=16, num_heads=4, num_kv_heads=2, rope=1e4, mixers=parts).double()
    x = torch.randn(2, 11, 16, dtype=torch.float64)
    expected = torch.zeros_like(x)
    for i, table in enumerate(parts):
        fields = {key: value for key, value in table.items() if key not in ("name", "num_heads")}
        alone: Any = ls.mixers.build(
            table["name"], dim=16, num_heads=2, num_kv_heads=1, head_dim=4, rope=1e4, **fields
        ).double()
        ours, theirs = joint.projections, alone.projections
        with torch.no_grad():
            theirs.q_proj.weight.copy_(ours.q_proj.weight[8 * i : 8 * i + 8])
            theirs.k_proj.weight.copy_(ours.k_proj.weight[4 * i : 4 * i + 4])
            theirs.v_proj.weight.copy_(ours.v_proj.weight[4 * i : 4 * i + 4])
            theirs.o_proj.weight.copy_(ours.o_proj.weight[:, 8 * i : 8 * i + 8])
        alone.core.load_state_dict(joint.core.cores[i].state_dict())
        expected += alone(x)[0]
    torch.testing.assert_close(joint(x)[0], expected, atol=1e-12, rtol=0)
