"""Import Reformer's published weights (Kitaev et al. 2020), in the format of transformers, as a `Decoder`.

    local layer      `window` with blocks: the own chunk and the previous one, logits q . k / sqrt(head_dim)
    LSH layer        `lsh`, selection "sorted", shared: keys q / |q|, logits q . k, a token attends to itself only if it
                     sees no other key
    reversible       two streams, both of them into the last norm and an output layer of width 2 dim
    axial positions  factorized, with `position_dims`: one vector per coordinate, concatenated

The model computes the same function, up to rounding, with the same rotations. Transformers redraws them in every call,
also in evaluation, unless its configuration has a `hash_seed`; then we draw the same rotations once and keep them.
Lengths up to a chunk and multiples of all chunk lengths agree. Other lengths are padded by transformers; if both kinds
of layers have different chunk lengths, its last LSH chunks may then consist of padding, which the first chunk sees
instead of tokens.

The key projection of LSH layers, which the mechanism does not use, is a copy of the query projection. `lm_head.bias` is
added to the logits, as in Reformer's own code; transformers 5 before 5.24 stores it but does not use it. Dropout of
attention weights is ignored, with a warning.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from longspan.errors import ConfigError, UnsupportedError
from longspan.hf.published import PublishedConfig, Renaming
from longspan.models import Decoder, DecoderConfig, load_weights

_WHERE = "import_checkpoint: reformer"
_CONSTANTS = ("mask_value_float16", "mask_value_float32")
"""Constants that earlier versions of transformers stored with the weights."""
_DIFFERENCES = (
    "looks back across hash rounds (the first chunk of a round sees the last one of the previous round) and counts a "
    "pair once for each round in which it occurs"
)


def import_reformer(weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> Decoder:
    """Build a `Decoder` from the weights of a causal Reformer.

    Args:
        weights: of `ReformerModelWithLMHead`, by its names.
        config: its configuration, as plain data.

    Raises:
        ConfigError: the configuration has a missing field.
        UnsupportedError: several hash rounds, a factorized hash, an unset number of buckets, chunks that see more than
            themselves and the previous one, an encoder, an activation other than relu and gelu.
        CheckpointError: weights that are missing, unexpected, or have other shapes.
    """
    table = PublishedConfig(_WHERE, config)
    model = Decoder(_decoder_config(table))
    published = {name: weight for name, weight in weights.items() if not name.endswith(_CONSTANTS)}
    # two names of one tensor in transformers 4; if they differ (from 5.24 on), the logits use this one
    if "lm_head.decoder.bias" in published:
        published["lm_head.bias"] = published.pop("lm_head.decoder.bias")
    ours = _WeightMap(published, model, table).run()
    load_weights(model, ours, _WHERE)
    return model


def _decoder_config(table: PublishedConfig) -> DecoderConfig:
    """Return the configuration of a `Decoder` with the architecture of a Reformer of transformers."""
    if not table["is_decoder"]:
        raise UnsupportedError(f"{_WHERE}: is_decoder = False: encoders are not supported, only language models")
    if table["hidden_act"] not in ("relu", "gelu"):
        raise UnsupportedError(f"{_WHERE}: hidden_act = {table['hidden_act']!r}: only relu and gelu are supported")
    if table.config.get("tie_word_embeddings"):
        raise UnsupportedError(f"{_WHERE}: tie_word_embeddings = True is not supported, as the output layer is wider")
    layers = list(table["attn_layers"])
    table.warn_of_dropout(*(f"{kind}_attention_probs_dropout_prob" for kind in sorted(set(layers))))
    positions: dict[str, Any] = {"positions": "learned", "max_positions": int(table["max_position_embeddings"])}
    if table["axial_pos_embds"]:
        positions = _axial(table)
    return DecoderConfig(
        vocab_size=int(table["vocab_size"]),
        dim=int(table["hidden_size"]),
        num_layers=len(layers),
        num_heads=int(table["num_attention_heads"]),
        head_dim=int(table["attention_head_size"]),
        mixers=tuple(_mixer(table, kind, index) for index, kind in enumerate(layers)),
        ffn_dim=int(table["feed_forward_size"]),
        activation=table["hidden_act"],
        norm="layernorm",
        norm_eps=float(table["layer_norm_eps"]),
        bias=True,
        mixer_bias=False,
        output_bias=True,
        dropout=float(table["hidden_dropout_prob"]),
        tie_embeddings=False,
        reversible=True,
        streams="both",
        **positions,
    )


def _axial(table: PublishedConfig) -> dict[str, Any]:
    """Return the position fields for axial positions, one table per coordinate."""
    dim, shape, widths = int(table["hidden_size"]), tuple(table["axial_pos_shape"]), tuple(table["axial_pos_embds_dim"])
    if sum(widths) != dim:
        raise ConfigError(f"{_WHERE}: axial_pos_embds_dim = {list(widths)}: the sum must be hidden_size = {dim}")
    if len(widths) != len(shape):
        raise ConfigError(
            f"{_WHERE}: axial_pos_embds_dim = {list(widths)}: needs {len(shape)} widths, as many as axial_pos_shape"
        )
    return {"positions": "factorized", "position_shape": shape, "position_dims": widths}


def _mixer(table: PublishedConfig, kind: str, index: int) -> dict[str, Any]:
    """Return the mixer table of a layer of kind "local" or "lsh"."""
    if kind not in ("local", "lsh"):
        raise UnsupportedError(f"{_WHERE}: attn_layers[{index}] = {kind!r}: only local and lsh are supported")
    neighbors = table[f"{kind}_num_chunks_before"], table[f"{kind}_num_chunks_after"]
    if neighbors != (1, 0):
        raise UnsupportedError(
            f"{_WHERE}: {kind}_num_chunks_before, _after = {neighbors[0]}, {neighbors[1]}: only 1, 0 is supported, the "
            "own chunk and the previous one"
        )
    if kind == "local":
        return {"name": "window", "window": int(table["local_attn_chunk_length"]), "blocks": True}
    return {
        "name": "lsh",
        "bucket_size": int(table["lsh_attn_chunk_length"]),
        "num_hashes": 1,
        "num_buckets": _buckets(table),
        "selection": "sorted",
        "redraw_every": 1 if table.config.get("hash_seed") is None else 0,  # transformers redraws in every call
        "seed": index,
    }


def _buckets(table: PublishedConfig) -> int:
    """Return the number of buckets of a single hash round.

    Raises:
        UnsupportedError: several rounds, a factorized hash, or an unset number.
    """
    rounds, buckets = table["num_hashes"], table["num_buckets"]
    if rounds != 1:
        raise UnsupportedError(
            f"{_WHERE}: num_hashes = {rounds} is not supported: transformers {_DIFFERENCES}, so logits would differ; "
            "set num_hashes = 1 in the config to import the same weights"
        )
    if isinstance(buckets, (list, tuple)) and len(buckets) == 1:
        buckets = buckets[0]
    if isinstance(buckets, (list, tuple)):
        raise UnsupportedError(
            f"{_WHERE}: num_buckets = {list(buckets)}: a factorized hash is not supported; set one even number in the "
            "config to import the same weights"
        )
    if buckets is None:
        raise UnsupportedError(
            f"{_WHERE}: num_buckets is not set, and transformers would derive it from the first text; set it in the "
            "config to the largest power of 2 not above 2 * length / chunk"
        )
    return int(buckets)


class _WeightMap(Renaming):
    """Maps the published weights to the names of a `Decoder`, each of them used exactly once."""

    def __init__(self, published: dict[str, Tensor], model: Decoder, table: PublishedConfig) -> None:
        super().__init__(_WHERE, published)
        self.table = table
        self.ours = dict(model.state_dict())

    def run(self) -> dict[str, Tensor]:
        """Return all weights by the names of the `Decoder`.

        Raises:
            CheckpointError: one is missing or not used.
        """
        self.move("embedding.weight", "reformer.embeddings.word_embeddings.weight")
        self._positions()
        for index, kind in enumerate(self.table["attn_layers"]):
            self._layer(f"blocks.{index}", f"reformer.encoder.layers.{index}", kind)
        self.move_pair("norm", "reformer.encoder.layer_norm")
        self.move("output.weight", "lm_head.decoder.weight")
        self.move("output_bias", "lm_head.bias")
        return self.done()

    def _positions(self) -> None:
        """Map the position embeddings, one table per axis if they are axial."""
        theirs = "reformer.embeddings.position_embeddings"
        if not self.table["axial_pos_embds"]:
            self.move("position_embedding.weight", f"{theirs}.embedding.weight")
            return
        for axis in range(len(self.table["axial_pos_shape"])):
            # (1, ..., size, ..., 1, width)
            part = self.take(f"{theirs}.weights.{axis}").flatten(0, -2)
            self.ours[f"position_embedding.tables.{axis}.weight"] = part

    def _layer(self, ours: str, theirs: str, kind: str) -> None:
        """Map the weights of one layer."""
        attention, maps = f"{theirs}.attention", f"{ours}.mixer.projections"
        names = ("query", "key", "value") if kind == "local" else ("query_key", "query_key", "value")
        taken = {name: self.take(f"{attention}.self_attention.{name}.weight") for name in dict.fromkeys(names)}
        for own, name in zip(("q_proj", "k_proj", "v_proj"), names, strict=True):
            if (own, name) != ("k_proj", "query_key"):  # with shared keys there is no k_proj
                self.ours[f"{maps}.{own}.weight"] = taken[name]
        self.move(f"{maps}.o_proj.weight", f"{attention}.output.dense.weight")
        self.move_pair(f"{ours}.mixer_norm", f"{attention}.layer_norm")
        self.move_pair(f"{ours}.ffn_norm", f"{theirs}.feed_forward.layer_norm")
        self.move_pair(f"{ours}.ffn.up_proj", f"{theirs}.feed_forward.dense.dense")
        self.move_pair(f"{ours}.ffn.down_proj", f"{theirs}.feed_forward.output.dense")
        if kind == "lsh":
            self._rotations(f"{ours}.mixer.core.rotations", taken["value"].dtype)

    def _rotations(self, name: str, dtype: torch.dtype) -> None:
        """Set the LSH rotations of a layer: drawn as transformers draws them for a hash_seed, otherwise our own."""
        own, seed = self.ours[name].to(dtype), self.table.config.get("hash_seed")
        if seed is not None:
            heads, rounds, head_dim, half = own.shape
            generator = torch.Generator().manual_seed(seed)
            own = torch.randn(heads, head_dim, rounds, half, generator=generator, dtype=dtype).transpose(1, 2)
        self.ours[name] = own
