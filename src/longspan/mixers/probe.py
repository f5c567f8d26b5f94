"""Measure which keys each query reads, by changing one value at a time and comparing outputs.

`token_weights` measures the weights of one call that a model made; `support_sizes` counts the keys to which an entmax
layer gives a nonzero weight.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from longspan.contract.base import Mechanism, Mixer
from longspan.contract.explain import CoreCall, has_token_weights
from longspan.contract.rows import BatchLayout
from longspan.errors import ConfigError, UnsupportedError
from longspan.mechanisms.entmax.layer import EntmaxMechanism

# number of sequences in one batch
_ROWS = 32


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
def token_weights(core: Mechanism, call: CoreCall) -> Tensor:
    """Return the weights (batch, heads, length, length) of the values of a call in the outputs of the call.

    The core runs with unit vectors instead of values, so these are the weights that its fast operation uses, whatever
    path values take: also those of linear attention and of memories, where there is no softmax. What the state and
    learned vectors add to the outputs does not depend on these values and is subtracted; a row sums to 1 less what the
    state and learned vectors get.

    Args:
        core: whose outputs are an affine function of the values.
        call: its arguments; they are not changed.

    Raises:
        UnsupportedError: the outputs are not an affine function of the values.
    """
    if not has_token_weights(core):
        raise UnsupportedError(f"{type(core).__name__}: its outputs are not weighted values, so there are no weights")
    rows = copy.copy(call.rows)
    rows.keeps_state = False
    length, width = call.v.shape[2], call.v.shape[3]

    def outputs(values: Tensor) -> Tensor:
        """Return the outputs with other values; `forward`, as a call would trigger the hooks of observers."""
        out: Tensor = core.forward(call.q, call.k, values, call.state, rows, hidden=call.hidden)[0]
        return out

    constant = outputs(torch.zeros_like(call.v))
    maps = []
    for first in range(0, length, width):
        unit = torch.zeros_like(call.v)
        index = torch.arange(min(width, length - first), device=unit.device)
        unit[:, :, first + index, index] = 1
        maps.append((outputs(unit) - constant)[..., : len(index)])
    return torch.cat(maps, -1)


def support_sizes(core: EntmaxMechanism, q: Tensor, k: Tensor, v: Tensor, state: Any, rows: BatchLayout) -> Tensor:
    """Return the number of keys (batch, heads, length) with a nonzero weight, in one call of an entmax layer.

    The other arguments are those of `Mechanism.forward`.
    """
    return core.support_sizes(q, k, v, state, rows)
