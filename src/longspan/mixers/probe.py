"""Which keys a query reads, measured on the mixer itself: one value at a time is changed, outputs are compared; and how
many keys a layer of entmax gives a weight.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from longspan.contract.base import Mechanism, Mixer
from longspan.contract.rows import BatchLayout
from longspan.errors import ConfigError
from longspan.mechanisms.entmax.layer import EntmaxMechanism

# sequences that are run at once
_ROWS = 32
# keys whose weights are read off at once
_WIDTH = 256


@torch.no_grad()
def influence(mixer: Mixer, length: int, *, seed: int = 0) -> Tensor:
    """How much the output of each query changes where the value of a key does; zero where it does not read that key.

    The whole mixer runs, in fp64, on hidden states of normal numbers from an empty past. Queries and keys (and
    gates and spans that read hidden states) are made blind to the last coordinate of the hidden states, so changing
    that coordinate at position j changes the value there and nothing else, through whatever path values take: memories
    are measured as attention is, and no mask of any mechanism is asked. Where the output is an attention map times the
    values (`linear_in_values`) all other values are zero and the changed one is one: the result is the map, and a
    weight is zero only if it is exactly zero. Else the other values are normal numbers too, and a change is one that
    shows in fp64.

    Args:
        mixer: as `longspan.mixers.build` makes them; it is copied and stays as it is.
        length: tokens of the sequence.
        seed: of the hidden states, which matter where what is seen depends on them.

    Returns:
        (heads, length, length) fp64: queries down, keys across.

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
        at = torch.arange(first, min(first + rows, length))
        changed[at - first, at, -1] = 1
        probed(changed)
    hook.remove()
    # rows of equal batches, so that the same sums are compared: a row without change gives the same bits
    sums = torch.cat([(out - outs[0]).abs().amax(-1) for out in outs[1:]])[:length]
    return sums.permute(1, 2, 0).contiguous()


def _blind(mixer: Mixer) -> Mixer:
    """A copy in fp64 of which only the values read the last coordinate of the hidden states."""
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
    """Hidden states for gates and spans; a core that makes values of them has `no_conversion_reason`, and gets all."""
    x = keywords["hidden"].x.clone()
    x[..., -1] = 0
    return arguments, {**keywords, "hidden": keywords["hidden"]._replace(x=x)}


@torch.no_grad()
def support_sizes(core: EntmaxMechanism, q: Tensor, k: Tensor, v: Tensor, state: Any, rows: BatchLayout) -> Tensor:
    """(batch, heads, length) how many keys get a weight that is not zero, in one call of a layer of entmax.

    The layer runs with unit vectors in the place of values, so that its outputs are its weights; arguments are those of
    a call.
    """
    memory = 0 if state is None else state.v.shape[2]
    columns = memory + v.shape[2]
    counts = q.new_zeros(q.shape[:3])
    for first in range(0, columns, _WIDTH):
        width = min(_WIDTH, columns - first)
        unit = v.new_zeros(*v.shape[:2], columns, width)
        unit[:, :, torch.arange(first, first + width), torch.arange(width)] = 1
        before = None if state is None else state._replace(v=unit[:, :, :memory])
        # not the module's call, which is watched
        weights, _ = core.forward(q, k, unit[:, :, memory:], before, rows)
        counts += (weights != 0).sum(-1)
    return counts
