"""`lsh` as a module without projections; the equations are in the package docstring."""

import functools
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from longspan import host, ops
from longspan.config import check_least
from longspan.contract.base import Shape, Traits
from longspan.contract.explain import CoreCall, Diagnostic, Explanation
from longspan.contract.redraw import DrawnMechanism
from longspan.contract.rings import RingState, empty_rings, make_rings, next_rings
from longspan.contract.rows import BatchLayout
from longspan.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class LSHConfig:
    """Configuration of `lsh`.

    Attributes:
        bucket_size: chunk size in tokens; per hash round a token sees at most twice as many.
        num_hashes: number of hash rounds. The paper trains with 2 to 8 and evaluates with 8.
        num_buckets: number of hash buckets, even; about usual length / bucket_size / 2, the same for all inputs.
        selection: "strict", or "sorted" as in the paper; None = "strict" if causal, else "sorted".
        shared_qk: if True, keys are normalized queries, as in the paper; if False, the layer has its own key
            projection.
        redraw_every: number of optimizer steps after which the random rotations are redrawn; 0 = never. Every redraw
            also discards the states that a training run carries from step to step, so with `train.carry` use 0 or many
            steps.
        seed: random seed of the first rotations.
    """

    bucket_size: int = 64
    num_hashes: int = 2
    num_buckets: int = 64
    selection: Literal["strict", "sorted"] | None = None
    shared_qk: bool = True
    redraw_every: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        check_least(self, "lsh", {"bucket_size": 1, "num_hashes": 1, "num_buckets": 2, "redraw_every": 0})
        if self.num_buckets % 2:
            raise ConfigError(
                f"lsh.num_buckets = {self.num_buckets}: must be even, as each direction is used with both signs"
            )


_NO_STREAM = "selection='sorted' depends on later tokens, so it does not stream; build it with selection='strict'"


class LSHMechanism(DrawnMechanism):
    """LSH attention without projections: random rotations, and ring buffers of earlier tokens as state."""

    Config = LSHConfig
    config: LSHConfig
    conversion_fields: ClassVar[dict[str, Any]] = {"shared_qk": False}
    examples = (
        {"bucket_size": 2, "num_hashes": 2, "num_buckets": 4, "selection": "strict"},
        {"bucket_size": 3, "num_hashes": 1, "num_buckets": 6},
        {"bucket_size": 2, "num_hashes": 3, "num_buckets": 4, "selection": "strict", "shared_qk": False},
        {"bucket_size": 4, "num_hashes": 2, "num_buckets": 4, "selection": "sorted"},
        {"bucket_size": 3, "num_hashes": 3, "num_buckets": 6, "selection": "sorted", "shared_qk": False},
    )
    what = "lsh: rotations"
    wide = ("rotations",)
    rotations: Tensor

    def __init__(self, shape: Shape, config: LSHConfig) -> None:
        super().__init__(shape, config)
        self.strict = (config.selection or ("strict" if shape.causal else "sorted")) == "strict"
        self.hashed_heads = shape.num_heads if config.shared_qk else shape.num_kv_heads
        """Number of heads with their own rotations and their own ring buffers in a state."""
        self.register_buffer("rotations", self._draw_rotations(torch.Generator().manual_seed(config.seed)))
        self._count_draws()

    def _draw_rotations(self, generator: torch.Generator | None) -> Tensor:
        """Draw random rotations (heads, rounds, head_dim, num_buckets // 2); generator None = torch's."""
        config, dtype = self.config, torch.promote_types(torch.get_default_dtype(), torch.float32)
        shape = (self.hashed_heads, config.num_hashes, self.shape.head_dim, config.num_buckets // 2)
        return host.normal(*shape, generator=generator, dtype=dtype).to(torch.get_default_device())

    @functools.cached_property
    def traits(self) -> Traits:
        """Capability flags: "strict" is causal, streams and has a bounded state; "sorted" is causal in values only.

        With shared keys the layer needs no key projection.
        """
        return Traits(
            causal=self.strict,
            value_causal=not self.strict,
            streams=self.shape.causal and self.strict,
            no_stream_reason=_NO_STREAM,
            bounded=self.strict,
            selects=True,
            uses_keys=not self.config.shared_qk,
        )

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, state: RingState | None, rows: BatchLayout, **unused: Any
    ) -> tuple[Tensor, RingState | None]:
        """Return LSH attention outputs (batch, heads, length, head_dim), and the next ring buffers.

        Args:
            q: (batch, heads, length, head_dim), before RoPE.
            k, v: (batch, kv_heads, length, head_dim), before RoPE; k is not used with shared keys.
            state: ring buffers of the tokens before the call; None = empty.
            rows: batch layout of the call (padding, documents, positions).

        Returns:
            The outputs and the next state; the state is None if the instance does not stream or nobody reads it.

        Raises:
            UnsupportedError: the state was made with earlier rotations.
        """
        q, k = self.rotate(q, k[:, :0] if self.config.shared_qk else k, rows)
        rings = None
        if state is not None:
            self.check_draw(state, rows)
            rings = ops.LSHRings(state.k, state.v, state.position)
        shared, rotations, count = self.config.shared_qk, self._rotations_per_head(), self.config.num_buckets
        query_buckets = rows.choose(lambda: ops.lsh_buckets(q, rotations), below=count)
        key_buckets = query_buckets if shared else rows.choose(lambda: ops.lsh_buckets(k, self.rotations), below=count)
        out = ops.lsh_attention(
            q,
            v,
            k=None if shared else k,
            rotations=rotations,
            bucket_size=self.config.bucket_size,
            causal=self.shape.causal,
            selection="strict" if self.strict else "sorted",
            buckets=(query_buckets, key_buckets),
            rings=rings,
            lengths=rows.lengths,
            start=rows.origin,
        )
        if not (self.traits.streams and rows.keeps_state):
            return out, None
        if shared:
            k, v = q, v.repeat_interleave(self.shape.group, 1)
        if rings is None:
            rings = make_rings(count, 2 * self.config.bucket_size, k, v, key_buckets, rows)
        else:
            rings = next_rings(rings, k, v, key_buckets, rows)
        return out, RingState(*rings, self.drawn_of(rows), rows.live)

    def _rotations_per_head(self) -> Tensor:
        """Return the rotations of every query head, (heads, rounds, head_dim, num_buckets // 2)."""
        return self.rotations.repeat_interleave(self.shape.num_heads // self.hashed_heads, 0)

    def explain(self, call: CoreCall) -> list[Explanation]:
        """Return the bucket of each query in each hash round."""
        q, _ = self.rotate(call.q, call.k[:, :0], call.rows)
        buckets = ops.lsh_buckets(q, self._rotations_per_head())
        reads = "it reads keys of the same bucket" if self.strict else "tokens are sorted by it and cut into chunks"
        caption = f"Bucket, from 0 to {self.config.num_buckets - 1}, of the query in a hash round; {reads}."
        return [
            Diagnostic(
                name=f"bucket of round {number + 1}",
                caption=caption,
                values=buckets[:, :, number],
                discrete=True,
            )
            for number in range(self.config.num_hashes)
        ]

    def after_step(self, step: int, generator: torch.Generator | None = None) -> None:
        """Redraw the random rotations every `redraw_every` optimizer steps."""
        self.redraw_at(step, self.config.redraw_every, self.rotations, lambda: self._draw_rotations(generator))

    def init_state(self, batch_size: int, device: torch.device | None, dtype: torch.dtype) -> RingState:
        """Return the empty state of `batch_size` rows: ring buffers at full capacity, all slots empty."""
        config = self.config
        shape = self.hashed_heads, config.num_hashes, config.num_buckets, 2 * config.bucket_size
        return empty_rings(shape, self.shape.head_dim, batch_size, device, dtype)

    def flops(self, length: int, batch_size: int = 1) -> int:
        """Count the FLOPs (2 per multiply-add) for `batch_size` rows: hashing, scores and outputs."""
        config, shape = self.config, self.shape
        entries = ops.lsh_cost(
            length,
            bucket_size=config.bucket_size,
            num_buckets=config.num_buckets,
            num_hashes=config.num_hashes,
            causal=shape.causal,
            shared_qk=config.shared_qk,
            selection="strict" if self.strict else "sorted",
        )
        hashed = shape.num_heads + (0 if config.shared_qk else shape.num_kv_heads)
        hashes = hashed * length * config.num_hashes * config.num_buckets // 2
        return batch_size * shape.head_dim * (4 * shape.num_heads * entries + 2 * hashes)

    def pairs(self, length: int) -> int:
        """Count the (query, key) pairs over all query heads; an upper bound: full buckets, disjoint rounds."""
        most = 2 * self.config.bucket_size * self.config.num_hashes
        if not self.shape.causal or not self.strict:
            return self.shape.num_heads * length * max(1, min(most, length - 1))
        return self.shape.num_heads * sum(max(1, min(most, i)) for i in range(length))
