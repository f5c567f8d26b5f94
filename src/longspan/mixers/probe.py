"""Measure which keys each query reads, by changing one value at a time and comparing outputs.

`support_sizes` also counts the keys to which an entmax layer gives a nonzero weight.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from longspan.contract.base import Mechanism, Mixer
from longspan.contract.rows import BatchLayout
from longspan.errors import ConfigError
from longspan.mechanisms.entmax.layer import EntmaxMechanism

# number of sequences in one batch
_ROWS = 32
# number of keys whose weights are measured in one call
_WIDTH = 256


@torch.no_grad()
def influence(mixer: Mixer, length: int, *, seed: int = 0) -> Tensor:
    """Return how much the output of each query changes with the value of each key; zero if the query does not read it.

    The whole mixer runs, in fp64, on standard normal hidden states from an empty past. Queries, keys, gates and spans
    are made to ignore the last coordinate of the hidden states. Changing that coordinate at position j then changes the
    value there and nothing else, through whatever path values take: memories are measured just as attention is, and no
    mechanism's own mask is used. Where the output is an attention map times the values (`linear_in_values`), all other
    values are zero and the changed one is one: the result is the map, and a weight is zero only if it is exactly zero.
    Otherwise the other values are normal numbers too, and a change must be visible in fp64.

    Args:
        mixer: as built by `longspan.mixers.build`; it is copied and not changed.
        length: tokens of the sequence.
        seed: of the hidden states, which matter where visibility depends on data.

    Returns:
        (heads, length, length) fp64: queries in rows, keys in columns.

    Raises:
        ConfigError: a length below 1.
    """
    if length < 1:
        raise ConfigError(f"{mixer.name}: length = {length}: must be at least 1")
    probed = _blind(mixer)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, length, mixer.shape.dim, generator=generator).to(probed.projections.v_proj.weight)
    x[..., -1] = 0
    outs: list[Tensor] = []
    hook = probed.core.register_forward_hook(lambda _core, _inputs, output: outs.append(output[0]))
    rows = min(_ROWS, length)
    probed(x.expand(rows, -1, -1))
    for first in range(0, length, rows):
        changed = x.repeat(rows, 1, 1)
        position = torch.arange(first, min(first + rows, length))
        changed[position - first, position, -1] = 1
        probed(changed)
    hook.remove()
    # all batches have the same size, so that sums are computed alike and a row without change has the same bits
    sums = torch.cat([(out - outs[0]).abs().amax(-1) for out in outs[1:]])[:length]
    return sums.permute(1, 2, 0).contiguous()


def _blind(mixer: Mixer) -> Mixer:
    """Return a copy in fp64 in which only the values read the last coordinate of the hidden states."""
    probed = copy.deepcopy(mixer).double().eval()
    projections, core = probed.projections, probed.core
    for projection in (projections.q_proj, projections.k_proj):
        if projection is not None:
            projection.weight[:, -1] = 0
    if core.traits.linear_in_values:
        projections.v_proj.weight.zero_()
        if projections.v_proj.bias is not None:
            projections.v_proj.bias.zero_()
    projections.v_proj.weight[:, -1] = 1
    for module in core.modules():
        if isinstance(module, Mechanism) and module.traits.receives_hidden and module.traits.convertible:
            module.register_forward_pre_hook(_blind_hidden, with_kwargs=True)
    return probed


def _blind_hidden(core: nn.Module, arguments: Any, keywords: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Zero the last coordinate of the hidden states that a core receives for gates and spans (a forward pre-hook).

    Cores that compute values from hidden states have a `no_conversion_reason` and are not hooked.
    """
    x = keywords["hidden"].x.clone()
    x[..., -1] = 0
    return arguments, {**keywords, "hidden": keywords["hidden"]._replace(x=x)}


@torch.no_grad()
def support_sizes(core: EntmaxMechanism, q: Tensor, k: Tensor, v: Tensor, state: Any, rows: BatchLayout) -> Tensor:
    """Return the number of keys (batch, heads, length) with a nonzero weight, in one call of an entmax layer.

    The layer runs with unit vectors instead of values, so that its outputs are its weights. The other arguments are
    those of `Mechanism.forward`.
    """
    memory = 0 if state is None else state.v.shape[2]
    columns = memory + v.shape[2]
    counts = q.new_zeros(q.shape[:3])
    for first in range(0, columns, _WIDTH):
        width = min(_WIDTH, columns - first)
        unit = v.new_zeros(*v.shape[:2], columns, width)
        unit[:, :, torch.arange(first, first + width), torch.arange(width)] = 1
        before = None if state is None else state._replace(v=unit[:, :, :memory])
        # `forward` instead of a call, which would trigger the hooks of those who observe the layer
        weights, _ = core.forward(q, k, unit[:, :, memory:], before, rows)
        counts += (weights != 0).sum(-1)
    return counts
