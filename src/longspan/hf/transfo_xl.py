"""Transformer-XL's published weights (Dai et al. 2019), as transformers up to 4.35 has them, as a `Decoder`.

    attention          `transformer_xl`; `untie_r`, u and w of each layer: where one pair serves all, each gets a copy
    blocks             post-norm, or pre-norm without a last norm (`pre_lnorm`); biases in the feed-forward only
    embeddings         adaptive (`cutoffs`, `div_val`, `d_embed`), times sqrt(dim)
    output layer       adaptive softmax with a bias for every token and cluster, tied as `tie_projs` says

The same function, up to rounding, of the same memory, with two things to know. First, a text begins without memory
here, as in the paper's PyTorch code; transformers (and the paper's TensorFlow code) begin with `mem_len` zero vectors,
which tokens see until they are pushed out: `zero_memory` is a state that begins so. Second, without `same_length` a
token sees its segment and the `mem_len` positions before it, and a segment there is a call: `tgt_len` in the
configuration says how long (default `mem_len`, as the paper trains), and calls of another length there are another
model. With `same_length` (all published language models) nothing depends on it but where gradients end.

Token ids are those of the published vocabulary, which `tokenizer = "word"` does not have: text is encoded by what came
with the weights. Memory, `same_length` and `clamp_len` may be others than in training: change them in the
configuration. Dropout on attention weights, on positions and on the last hidden states, which transformers has in
training, is left out.
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from longspan.errors import CheckpointError, ConfigError, UnsupportedError
from longspan.hf.published import PublishedConfig, Renaming
from longspan.mechanisms.transformer_xl.layer import TransformerXLMechanism, TransformerXLState
from longspan.models import Decoder, DecoderConfig, StackState, load_weights

_WHERE = "import_checkpoint: transfo-xl"
_TIED = ("crit.out_layers.", "crit.out_projs.")
_BIASES = {"content_bias": "r_w_bias", "position_bias": "r_r_bias"}


def import_transfo_xl(weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> Decoder:
    """A Transformer-XL language model as a `Decoder`.

    Args:
        weights: of `TransfoXLLMHeadModel`, under its names; tied ones may be left out.
        config: of it, as plain data; optionally `tgt_len`, the tokens of a segment.

    Raises:
        ConfigError: the configuration lacks something.
        UnsupportedError: another attention than the paper's (`attn_type`), a sampled softmax, `ext_len`.
        CheckpointError: weights that are missing, left over, or of other shapes.
    """
    table = _Table(config)
    model = Decoder(_decoder(table))
    published = {name: weight for name, weight in weights.items() if not name.endswith("pos_emb.inv_freq")}
    load_weights(model, _Mapping(published, model, table).run(), _WHERE)
    return model


def zero_memory(model: Decoder, batch_size: int = 1) -> StackState:
    """The state in which transformers begins a text: `mem_len` zero vectors in every layer, seen as if they were read.

    Args:
        model: of `transformer_xl` layers with memory "hidden".
        batch_size: rows.

    Raises:
        UnsupportedError: a layer of another mechanism.
    """
    cores = model.cores()
    layers: list[TransformerXLState] = []
    for block, core in zip(model.layers, cores, strict=True):
        if not isinstance(core, TransformerXLMechanism) or core.config.cache != "hidden":
            raise UnsupportedError("zero_memory: every layer must be transformer_xl with memory = 'hidden'")
        empty = block.mixer.init_state(batch_size)
        # a pre-norm block's memory holds what its norm makes of the zeros
        hidden = empty.hidden if block.post else block.mixer_norm(empty.hidden).detach()
        # a border, so that the first segment begins with the first token
        count = core.config.segment * -(-core.reach // core.config.segment)
        layers.append(TransformerXLState(hidden, torch.full_like(empty.live, count)))
    if len({int(state.live[0]) for state in layers}) != 1:
        raise UnsupportedError("zero_memory: the layers have segments of different lengths")
    return StackState(tuple(layers), layers[0].live)


class _Table(PublishedConfig):
    """A configuration that says what it lacks, and what of it this library has not."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(_WHERE, config := {**config})
        # an earlier name
        if "n_token" in config:
            config.setdefault("vocab_size", config["n_token"])
        for name, known in (("attn_type", 0), ("ext_len", 0)):
            if config.get(name, known) != known:
                raise UnsupportedError(f"{_WHERE}: {name} = {config[name]!r}: only {known} is known")
        if config.get("sample_softmax", -1) > 0:
            raise UnsupportedError(f"{_WHERE}: sample_softmax: a sampled softmax is not known; only adaptive ones are")
        self.cuts = tuple(int(cut) for cut in self["cutoffs"])
        self.tied = bool(config.get("tie_word_embeddings", True))
        # one table and at most one map for all clusters
        self.alike = self["div_val"] == 1
        self.mapped = not self.alike or self["d_embed"] != self["d_model"]
        shared = [False] + [bool(config.get("proj_share_all_but_first", True))] * len(self.cuts)
        self.tied_maps = [bool(tied) for tied in config.get("tie_projs", shared)][: len(self.cuts) + 1]
        if len(self.tied_maps) <= len(self.cuts):
            raise ConfigError(f"{_WHERE}: tie_projs names {len(self.tied_maps)} of {len(self.cuts) + 1} clusters")

    @property
    def plain(self) -> bool:
        """One table and one softmax, without maps."""
        return not self.cuts and not self.mapped


def _decoder(table: _Table) -> DecoderConfig:
    """The same architecture in this library's fields."""
    table.warn_of_dropout("dropatt")
    mem_len = int(table["mem_len"])
    segment = int(table.config.get("tgt_len") or mem_len)
    if not segment:
        raise ConfigError(f"{_WHERE}: mem_len = 0: say in tgt_len how many tokens a segment has")
    mixer = {
        "name": "transformer_xl",
        "segment": segment,
        "mem_len": mem_len,
        "same_length": bool(table["same_length"]),
        "clamp_len": max(int(table["clamp_len"]), 0),
    }
    dim, width = int(table["d_model"]), int(table["d_embed"])
    maps: Literal["all", "rare", "none"] = "all" if all(table.tied_maps) else "none"
    if maps == "none" and table.cuts and all(table.tied_maps[1:]):
        maps = "rare"
    return DecoderConfig(
        vocab_size=int(table["vocab_size"]),
        dim=dim,
        num_layers=int(table["n_layer"]),
        num_heads=int(table["n_head"]),
        head_dim=int(table["d_head"]),
        mixers=(mixer,),
        ffn_dim=int(table["d_inner"]),
        activation="relu",
        norm="layernorm",
        norm_position="pre" if table["pre_lnorm"] else "post",
        norm_eps=float(table["layer_norm_epsilon"]),
        final_norm=False,
        positions="none",
        bias=True,
        mixer_bias=False,
        dropout=float(table["dropout"]),
        tie_embeddings=table.tied,
        scale_embeddings=True,
        output_bias=True,
        adaptive_cutoffs=table.cuts,
        adaptive_div=float(table["div_val"]),
        embedding_dim=width if width != dim or (table.mapped and not table.cuts) else None,
        tie_projections=maps,
    )


class _Mapping(Renaming):
    """Weights under the names of a `Decoder`, each of the published ones used once."""

    def __init__(self, published: dict[str, Tensor], model: Decoder, table: _Table) -> None:
        super().__init__(_WHERE, published)
        self.table, self.count = table, model.config.num_layers
        self.names = model.state_dict().keys()

    def run(self) -> dict[str, Tensor]:
        """All of them. Raises CheckpointError: one is missing or left over."""
        for index in range(self.count):
            self._layer(f"blocks.{index}", f"transformer.layers.{index}")
        for name in _BIASES.values():
            self.left.pop(f"transformer.{name}", None)
        self._embedding()
        self._output()
        for name in [name for name in self.left if name.startswith(_TIED) and self._unused(name)]:
            del self.left[name]
        return self.done()

    def _layer(self, ours: str, theirs: str) -> None:
        attention, mixer = f"{theirs}.dec_attn", f"{ours}.mixer"
        fused = self.take(f"{attention}.qkv_net.weight")
        for name, part in zip(("q_proj", "k_proj", "v_proj"), fused.chunk(3), strict=True):
            self.ours[f"{mixer}.projections.{name}.weight"] = part
        self.move(f"{mixer}.projections.o_proj.weight", f"{attention}.o_net.weight")
        self.move(f"{mixer}.core.r_proj.weight", f"{attention}.r_net.weight")
        for own, name in _BIASES.items():
            # one pair for all layers may be saved once
            shared = f"transformer.{name}"
            own_name = f"{attention}.{name}"
            bias = self.left[shared] if own_name not in self.left and shared in self.left else self.take(own_name)
            self.ours[f"{mixer}.core.{own}"] = bias
        self.move_pair(f"{ours}.mixer_norm", f"{attention}.layer_norm")
        self.move_pair(f"{ours}.ffn_norm", f"{theirs}.pos_ff.layer_norm")
        self.move_pair(f"{ours}.ffn.up_proj", f"{theirs}.pos_ff.CoreNet.0")
        self.move_pair(f"{ours}.ffn.down_proj", f"{theirs}.pos_ff.CoreNet.3")

    def _embedding(self) -> None:
        table, theirs = self.table, "transformer.word_emb"
        if table.plain:
            self.move("embedding.weight", f"{theirs}.emb_layers.0.weight")
            return
        count = 1 if table.alike else len(table.cuts) + 1
        for index in range(count):
            self.move(f"embedding.tables.{index}.weight", f"{theirs}.emb_layers.{index}.weight")
            if table.mapped:
                self.move(f"embedding.projections.{index}.weight", f"{theirs}.emb_projs.{index}")

    def _output(self) -> None:
        table = self.table
        clusters = len(table.cuts) + 1
        ends = (0, *table.cuts, int(table["vocab_size"]))
        sizes = [ends[index + 1] - ends[index] for index in range(clusters)]

        def layers(part: str) -> list[Tensor]:
            """A part of `crit.out_layers` by cluster."""
            if not table.alike:
                return [self.take(f"crit.out_layers.{index}.{part}") for index in range(clusters)]
            whole = self.take(f"crit.out_layers.0.{part}")
            if len(whole) != sum(sizes):
                raise CheckpointError(f"{_WHERE}: crit.out_layers.0.{part} is of {len(whole)} tokens, not {sum(sizes)}")
            return list(whole.split(sizes))

        if table.plain:
            (self.ours["output_bias"],) = layers("bias")
            if not table.tied:
                (self.ours["output.weight"],) = layers("weight")
            return
        for index, bias in enumerate(layers("bias")):
            self.ours[f"output.biases.{index}"] = bias
        if not table.tied:
            for index, weight in enumerate(layers("weight")):
                self.ours[f"output.tables.{index}.weight"] = weight
        if clusters > 1:
            self.move("output.cluster.weight", "crit.cluster_weight")
            self.move("output.cluster_bias", "crit.cluster_bias")
        for index in range(clusters):
            name = f"output.projections.{index}.weight"
            if name in self.names:
                self.ours[name] = self._map(index).T

    def _map(self, index: int) -> Tensor:
        """The output's map of a cluster, (dim, width): its own, or a copy of the embedding's."""
        if self.table.tied_maps[index]:
            return self.ours[f"embedding.projections.{0 if self.table.alike else index}.weight"]
        return self.take(f"crit.out_projs.{index}")

    def _unused(self, name: str) -> bool:
        """Whether an output weight is one that transformers overwrites with the embedding's."""
        if name.startswith("crit.out_layers."):
            return self.table.tied and name.endswith(".weight")
        tied = [f"crit.out_projs.{index}" for index, is_tied in enumerate(self.table.tied_maps) if is_tied]
        return self.table.mapped and name in tied
