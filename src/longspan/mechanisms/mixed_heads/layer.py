"""`mixed_heads` as a layer; see the package."""

import functools
from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from longspan.contract import registry
from longspan.contract.base import Hidden, Mechanism, ParameterGroup, Shape, Traits, merge_traits
from longspan.contract.maps import collected
from longspan.contract.rows import BatchLayout
from longspan.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class MixedHeadsConfig:
    """Fields of `mixed_heads`.

    Attributes:
        mixers: tables, each with the `name` of a mechanism, its `num_heads` and its own fields. The heads must add up
            to the layer's, and no part may cut through a group of query heads that share a kv head, unless it lies
            within one. Empty = half window, half full.
    """

    mixers: tuple[dict[str, Any], ...] = ()


class MixedHeadsState(NamedTuple):
    """The states of all parts."""

    parts: tuple[Any, ...]  # one state a part
    live: Tensor  # (batch,) live tokens


class MixedHeadsMechanism(Mechanism):
    """See the package."""

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
                raise ConfigError(f"{where}: needs a name and a num_heads of at least 1, got {table!r}")
            keys = self._kv_heads(first, first + count, where)
            part = replace(shape, num_heads=count, num_kv_heads=keys.stop - keys.start)
            cores.append(registry.build_mechanism(table["name"], part, fields, where))
            if cores[-1].value_dim != cores[0].value_dim:
                widths = f"values of {cores[-1].value_dim}, mixers[0] of {cores[0].value_dim}"
                raise ConfigError(f"{where}: {widths}; the parts of a layer share one width")
            self.queries.append(slice(first, first + count))
            self.keys.append(keys)
            first += count
        if first != shape.num_heads:
            raise ConfigError(f"mixed_heads: the parts have {first} heads together, the layer has {shape.num_heads}")
        self.parts = nn.ModuleList(cores)

    def _kv_heads(self, first: int, last: int, where: str) -> slice:
        group = self.shape.group
        if first % group == 0 and last % group == 0:
            return slice(first // group, last // group)
        if first // group == (last - 1) // group:
            return slice(first // group, first // group + 1)
        raise ConfigError(f"{where}: heads {first} to {last} cut through groups of {group} that share a kv head")

    @property
    def cores(self) -> list[Mechanism]:
        """The mechanisms, in the order of their heads."""
        return [core for core in self.parts if isinstance(core, Mechanism)]

    @functools.cached_property
    def traits(self) -> Traits:
        """See `merge_traits`; reasons say of which part they are."""
        return merge_traits([_labeled(core.traits, f"mixers[{i}]: ") for i, core in enumerate(self.cores)])

    def head_traits(self) -> list[Traits]:
        """The traits of the part that each head belongs to."""
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
        """See `Mechanism.forward`."""
        outs, nexts = [], []
        for i, (core, queries, keys) in enumerate(zip(self.cores, self.queries, self.keys, strict=True)):
            part = None
            if hidden is not None and core.traits.receives_hidden:
                part = Hidden(hidden.x, lambda x, keys=keys: hidden.project(x, keys))
            before = None if state is None else state.parts[i]
            out, after = core(
                q[:, queries], k[:, keys], v[:, keys], before, rows, hidden=part, aux_losses=collected(aux_losses, core)
            )
            outs.append(out)
            nexts.append(after)
        return torch.cat(outs, 1), MixedHeadsState(tuple(nexts), rows.live)

    def layout_inputs(self, state: MixedHeadsState | None) -> dict[Hashable, Tensor]:
        """Those of all parts."""
        inputs: dict[Hashable, Tensor] = {}
        for index, core in enumerate(self.cores):
            inputs |= core.layout_inputs(None if state is None else state.parts[index])
        return inputs

    def init_state(self, batch_size: int, device: torch.device | None, dtype: torch.dtype) -> MixedHeadsState:
        """The empty states of all parts."""
        parts = tuple(core.init_state(batch_size, device, dtype) for core in self.cores)
        return MixedHeadsState(parts, torch.zeros(batch_size, dtype=torch.int64, device=device))

    def fit(self, state: MixedHeadsState | None, k: Tensor, hidden: Hidden | None = None) -> MixedHeadsState | None:
        """See `Mechanism.fit`."""
        if state is None:
            return None
        pairs = zip(self.cores, state.parts, strict=True)
        return MixedHeadsState(tuple(core.fit(part, k, hidden) for core, part in pairs), state.live)

    def state_nbytes(self, batch_size: int, length: int, dtype: torch.dtype) -> int:
        """The sum over the parts, and one count a row."""
        return 8 * batch_size + sum(core.state_nbytes(batch_size, length, dtype) for core in self.cores)

    def flops(self, length: int, batch_size: int = 1) -> int:
        """The sum over the parts."""
        return sum(core.flops(length, batch_size) for core in self.cores)

    def pairs(self, length: int) -> int:
        """The sum over the parts."""
        return sum(core.pairs(length) for core in self.cores)

    def after_step(self, step: int, generator: torch.Generator | None = None) -> None:
        """Of every part."""
        for core in self.cores:
            core.after_step(step, generator)

    @property
    def redraw_count(self) -> int:
        """The sum of the parts' draws: it changes whenever one of them does."""
        return sum(core.redraw_count for core in self.cores)

    def parameter_groups(self) -> list[ParameterGroup]:
        """Those of all parts."""
        return [group for core in self.cores for group in core.parameter_groups()]


def _labeled(traits: Traits, label: str) -> Traits:
    """Traits whose reasons begin with a label."""
    return replace(
        traits,
        no_stream_reason=label + traits.no_stream_reason,
        no_conversion_reason=label + traits.no_conversion_reason if traits.no_conversion_reason else "",
    )
