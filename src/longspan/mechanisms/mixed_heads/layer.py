"""`mixed_heads` as a module without projections; see the package docstring."""

import functools
from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from longspan.contract import registry
from longspan.contract.base import Hidden, Mechanism, ParameterGroup, Shape, Traits, merge_traits
from longspan.contract.explain import CoreCall, Explanation, explanations, has_token_weights
from longspan.contract.maps import collected
from longspan.contract.rows import BatchLayout
from longspan.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class MixedHeadsConfig:
    """Configuration of `mixed_heads`.

    Attributes:
        mixers: tables, one per mechanism, with its `name`, its `num_heads` and its own fields. The heads must add up to
            the layer's. A mixer's heads must be whole groups of query heads that share a kv head, or lie within one.
            Empty = half window, half full.
    """

    mixers: tuple[dict[str, Any], ...] = ()


class MixedHeadsState(NamedTuple):
    """The states of all mechanisms of the layer."""

    parts: tuple[Any, ...]  # one state per mechanism
    live: Tensor  # (batch,) tokens since the last reset


class MixedHeadsMechanism(Mechanism):
    """Splits q, k, v by heads over several mechanisms and concatenates their outputs."""

    Config = MixedHeadsConfig
    config: MixedHeadsConfig
    examples = (
        {"mixers": [{"name": "window", "num_heads": 2, "window": 4}, {"name": "full", "num_heads": 2}]},
        {
            "mixers": [
                {"name": "window", "num_heads": 2, "window": 3, "blocks": True},
                {"name": "transformer_xl", "num_heads": 2, "segment": 4, "mem_len": 5},
            ]
        },
    )

    def __init__(self, shape: Shape, config: MixedHeadsConfig) -> None:
        super().__init__(shape, config)
        half = shape.num_heads // 2
        tables = config.mixers or (
            {"name": "window", "num_heads": shape.num_heads - half},
            {"name": "full", "num_heads": half},
        )
        self.queries: list[slice] = []
        self.keys: list[slice] = []
        cores: list[Mechanism] = []
        first = 0
        for i, table in enumerate(tables):
            where = f"mixed_heads.mixers[{i}]"
            fields = {key: value for key, value in table.items() if key not in ("name", "num_heads")}
            count = table.get("num_heads")
            if not isinstance(count, int) or count < 1 or "name" not in table:
                raise ConfigError(f"{where} = {table!r}: needs a name and a num_heads of at least 1")
            keys = self._kv_heads(first, first + count, where)
            part = replace(shape, num_heads=count, num_kv_heads=keys.stop - keys.start)
            cores.append(registry.build_mechanism(table["name"], part, fields, where))
            if cores[-1].value_dim != cores[0].value_dim:
                widths = f"the width of values is {cores[-1].value_dim}, in mixers[0] {cores[0].value_dim}"
                raise ConfigError(f"{where}: {widths}; all mixers of a layer need the same width")
            self.queries.append(slice(first, first + count))
            self.keys.append(keys)
            first += count
        if first != shape.num_heads:
            raise ConfigError(
                f"mixed_heads.mixers: num_heads add up to {first}, the layer has {shape.num_heads}; make them equal"
            )
        self.parts = nn.ModuleList(cores)

    def _kv_heads(self, first: int, last: int, where: str) -> slice:
        """Return the kv heads that belong to query heads first .. last - 1.

        Raises:
            ConfigError: the heads cut through groups of query heads that share a kv head.
        """
        group = self.shape.group
        if first % group == 0 and last % group == 0:
            return slice(first // group, last // group)
        if first // group == (last - 1) // group:
            return slice(first // group, first // group + 1)
        raise ConfigError(
            f"{where}: heads {first} to {last} cut through groups of {group} that share a kv head; change num_heads"
        )

    @property
    def cores(self) -> list[Mechanism]:
        """The mechanisms, in the order of their heads."""
        return [core for core in self.parts if isinstance(core, Mechanism)]

    @functools.cached_property
    def traits(self) -> Traits:
        """Capability flags: what all mechanisms support, what any of them needs; reasons name their part."""
        return merge_traits([_labeled(core.traits, f"mixers[{i}]: ") for i, core in enumerate(self.cores)])

    def head_traits(self) -> list[Traits]:
        """Return the capability flags of each query head's mechanism, one entry per head."""
        return [traits for core in self.cores for traits in core.head_traits()]

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        state: MixedHeadsState | None,
        rows: BatchLayout,
        *,
        hidden: Hidden | None = None,
        aux_losses: list[Tensor] | None = None,
    ) -> tuple[Tensor, MixedHeadsState]:
        """Return the concatenated outputs (batch, heads, length, value_dim) of all mechanisms, and their next states.

        Args:
            q: (batch, heads, length, head_dim), before RoPE.
            k: (batch, kv_heads, length, head_dim), before RoPE.
            v: (batch, kv_heads, length, value_dim).
            state: states of the mechanisms after the tokens before the call; None = empty.
            rows: batch layout of the call (padding, documents, positions).
            hidden: the layer's input and projections, passed to the mechanisms that need them.
            aux_losses: list to which the mechanisms append auxiliary losses; None = do not compute them.
        """
        outputs, next_states = [], []
        for i, (core, queries, keys) in enumerate(zip(self.cores, self.queries, self.keys, strict=True)):
            part = _hidden_of(core, hidden, keys)
            before = None if state is None else state.parts[i]
            out, next_state = core(
                q[:, queries], k[:, keys], v[:, keys], before, rows, hidden=part, aux_losses=collected(aux_losses, core)
            )
            outputs.append(out)
            next_states.append(next_state)
        return torch.cat(outputs, 1), MixedHeadsState(tuple(next_states), rows.live)

    @property
    def affine_in_values(self) -> bool:
        """Whether every mechanism has weights of the values of a call; see `contract.explain`."""
        return all(has_token_weights(core) for core in self.cores)

    def explain(self, call: CoreCall) -> list[Explanation]:
        """Return what every mechanism tells about its heads, which the names of the numbers name."""
        told: list[Explanation] = []
        for i, (core, queries, keys) in enumerate(zip(self.cores, self.queries, self.keys, strict=True)):
            part = CoreCall(
                call.q[:, queries],
                call.k[:, keys],
                call.v[:, keys],
                None if call.state is None else call.state.parts[i],
                call.rows,
                _hidden_of(core, call.hidden, keys),
            )
            heads = f" of heads {queries.start + 1} to {queries.stop}"
            told += [replace(item, name=item.name + heads) for item in explanations(core, part)]
        return told

    def layout_inputs(self, state: MixedHeadsState | None) -> dict[Hashable, Tensor]:
        """Return the tensors of all mechanisms whose values the layout of a call needs on the host."""
        inputs: dict[Hashable, Tensor] = {}
        for index, core in enumerate(self.cores):
            inputs |= core.layout_inputs(None if state is None else state.parts[index])
        return inputs

    def init_state(self, batch_size: int, device: torch.device | None, dtype: torch.dtype) -> MixedHeadsState:
        """Return the empty states of all mechanisms for `batch_size` rows."""
        parts = tuple(core.init_state(batch_size, device, dtype) for core in self.cores)
        return MixedHeadsState(parts, torch.zeros(batch_size, dtype=torch.int64, device=device))

    def fit(self, state: MixedHeadsState | None, k: Tensor, hidden: Hidden | None = None) -> MixedHeadsState | None:
        """Return the states of all mechanisms in the dtypes of this call."""
        if state is None:
            return None
        pairs = zip(self.cores, state.parts, strict=True)
        return MixedHeadsState(tuple(core.fit(part, k, hidden) for core, part in pairs), state.live)

    def state_nbytes(self, batch_size: int, length: int, dtype: torch.dtype) -> int:
        """Return the exact bytes of all states after `length` tokens, plus one count per row."""
        return 8 * batch_size + sum(core.state_nbytes(batch_size, length, dtype) for core in self.cores)

    def flops(self, length: int, batch_size: int = 1) -> int:
        """Count the FLOPs (2 per multiply-add) for `batch_size` rows of `length` tokens, summed over the mechanisms."""
        return sum(core.flops(length, batch_size) for core in self.cores)

    def pairs(self, length: int) -> int:
        """Count the attended (query, key) pairs of `length` tokens, summed over the mechanisms' heads."""
        return sum(core.pairs(length) for core in self.cores)

    def after_step(self, step: int, generator: torch.Generator | None = None) -> None:
        """Call `after_step` of every mechanism after an optimizer step (clamps, redraws, statistics)."""
        for core in self.cores:
            core.after_step(step, generator)

    @property
    def redraw_count(self) -> int:
        """Sum of the mechanisms' redraw counts, which changes whenever one of them redraws its random projection."""
        return sum(core.redraw_count for core in self.cores)

    def parameter_groups(self) -> list[ParameterGroup]:
        """Return the parameters of all mechanisms that need optimizer settings of their own."""
        return [group for core in self.cores for group in core.parameter_groups()]


def _hidden_of(core: Mechanism, hidden: Hidden | None, keys: slice) -> Hidden | None:
    """Return the hidden states of the layer for a mechanism of some kv heads; None if it does not receive any."""
    if hidden is None or not core.traits.receives_hidden:
        return None
    return Hidden(hidden.x, lambda x: hidden.project(x, keys))


def _labeled(traits: Traits, label: str) -> Traits:
    """Return a copy of the traits whose reasons start with `label`."""
    return replace(
        traits,
        no_stream_reason=label + traits.no_stream_reason,
        no_conversion_reason=label + traits.no_conversion_reason if traits.no_conversion_reason else "",
    )
