"""One branch of a gated mechanism alone: what it reads, and what it does not."""

from typing import Any

import pytest
import torch

import longspan as ls
from longspan.errors import ConfigError

FORMS: list[tuple[str, dict[str, Any], int]] = [
    ("infini", {"segment": 4}, 4),
    ("infini", {"segment": 4, "sinks": 2, "update": "delta"}, 4),
    ("memorizing", {"window": 4, "max_memories": 64, "k": 64}, 4),
    ("window_linear", {"window": 4}, 4),
    ("window_linear", {"window": 4, "sinks": 1}, 4),
]


@pytest.mark.parametrize(("name", "fields", "size"), FORMS)
@torch.no_grad()
def test_a_branch_alone_reads_only_its_keys(name: str, fields: dict[str, Any], size: int) -> None:
    mixer = ls.mixers.build(name, dim=16, num_heads=2, **fields).double().eval()
    x = torch.randn(1, 24, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    far, near = x.clone(), x.clone()
    far[:, 3] += 1  # no sink, in the first segment, out of every window at the end
    near[:, 20] += 1  # in the last segment and window

    def moves(changed: torch.Tensor) -> float:
        return float((mixer(changed)[0] - mixer(x)[0])[:, 23].abs().max())

    assert moves(far) > 1e-6
    assert moves(near) > 1e-6
    with ls.mixers.only_branch(mixer, "local"):
        assert moves(far) == 0
        assert moves(near) > 1e-6
        first = mixer(x)[0]
    with ls.mixers.only_branch(mixer, "memory"):
        assert moves(far) > 1e-6
        assert moves(near) < 1e-12
        # nothing has entered the memory yet
        torch.testing.assert_close(mixer(x)[0][:, :size], first[:, :size], atol=1e-9, rtol=0)


@torch.no_grad()
def test_the_context_ends() -> None:
    mixer: Any = ls.mixers.build("infini", dim=16, num_heads=2, segment=4).eval()
    x = torch.randn(1, 12, 16, generator=torch.Generator().manual_seed(0))
    before = mixer(x)[0]
    with pytest.raises(ZeroDivisionError), ls.mixers.only_branch(mixer, "memory"):
        raise ZeroDivisionError
    assert mixer.core.branch is None
    torch.testing.assert_close(mixer(x)[0], before, atol=0, rtol=0)


def test_models_without_branches_are_refused() -> None:
    window = ls.mixers.build("window", dim=16, num_heads=2)
    with pytest.raises(ConfigError, match="no layer of this model"), ls.mixers.only_branch(window, "local"):
        pass
