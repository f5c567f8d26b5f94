"""BP-Transformer with spans that persist through the layers (the paper) or are recomputed per layer (the library).

Both are trained alike on short texts, with a dense implementation of the paper's graph.
"""

import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longspan.experiments.claims.base import Say
from longspan.experiments.claims.contest import ModelRecords
from longspan.experiments.claims.runs import measure_once
from longspan.mechanisms.bp.definition import paper_graph, paper_layer
from longspan.mixers import Traits
from longspan.models import Decoder, DecoderConfig
from longspan.tasks import Documents
from longspan.train import TrainConfig, evaluate_text
from longspan.train.distributed import Group
from longspan.train.document_source import DocumentSource
from longspan.train.lm_evaluation import Window, cut, windowed
from longspan.train.step import Optimization

PERSIST, RECOMPUTED, DENSE = "spans that persist", "spans made anew", "dense"  # keys of saved records
FORMS = (DENSE, RECOMPUTED, PERSIST)
LABELS = {RECOMPUTED: "spans recomputed per layer"}
"""Names of forms in tables, where they differ from the keys."""
_STD = 0.02


class PersistentSpans(nn.Module):
    """Causal language model over the paper's graph of tokens and spans, for calls of at most `length` tokens.

    Apart from attention it is a Decoder: embedding, pre-norm (the paper: post-norm), projections and feed-forward, for
    tokens and spans alike. Spans start as zeros and pass through the layers.
    """

    def __init__(self, decoder: Decoder, length: int, nearest: int) -> None:
        super().__init__()
        self.decoder, self.length = decoder, length
        self.graph = paper_graph(length, nearest)
        config = decoder.config
        shape = int(self.graph.relative_places.max()) + 1, config.dim // config.num_heads
        self.relative = nn.ParameterList(torch.randn(shape) * _STD for _ in decoder.layers)

    @property
    def traits(self) -> Traits:
        """Capabilities for the trainer and the evaluation: causal, and without streaming."""
        return Traits(bidirectional=False, streams=False)

    def forward(
        self,
        tokens: Tensor,
        state: None = None,
        *,
        mask: Tensor | None = None,
        reset: Tensor | None = None,
        aux_losses: list[Tensor] | None = None,
    ) -> tuple[Tensor, None]:
        """Return logits (batch, length, vocabulary) of tokens (batch, length), one text per row, and None."""
        count = tokens.shape[1]
        h = self.decoder.embedding(F.pad(tokens, (0, self.length - count)))
        nodes = torch.cat([h, h.new_zeros(len(h), len(self.graph.relative_places) - self.length, h.shape[2])], 1)
        for block, relative in zip(self.decoder.layers, self.relative, strict=True):
            parts = block.mixer.projections
            assert parts.k_proj is not None
            q, k, v = (projection.weight.mT for projection in (parts.q_proj, parts.k_proj, parts.v_proj))
            heads = self.decoder.config.num_heads
            out = paper_layer(block.mixer_norm(nodes), q, k, v, relative, self.graph, heads=heads)
            nodes = nodes + parts.o_proj(out)
            nodes = nodes + block.feed(nodes)
        return self.decoder.logits(self.decoder.norm(nodes[:, :count])), None

    @property
    def redraw_count(self) -> int:
        """Number of times that random projections were redrawn; always 0, as the model has none."""
        return 0

    def after_step(self, step: int, generator: torch.Generator | None = None) -> None:
        """Do nothing; the trainer calls this after every step."""

    def num_parameters(self) -> int:
        """Return the number of parameters."""
        return sum(parameter.numel() for parameter in self.parameters())

    def parameter_groups(self, *, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """Return optimizer groups: those of the decoder, and relative positions without weight decay."""
        tree = {"name": "tree", "params": list(self.relative), "lr": lr, "weight_decay": 0.0}
        return [*self.decoder.parameter_groups(lr=lr, weight_decay=weight_decay), tree]


def build_form(form: str, length: int, nearest: int, **fields: Any) -> Any:
    """Build a model of one of the `FORMS`; `fields` are those of its decoder.

    Positions come from the tree, or from RoPE in the dense model.
    """
    levels = max(length - 1, 1).bit_length()
    mixer = {"name": "bp", "k": nearest, "max_level": levels} if form == RECOMPUTED else {"name": "full"}
    positions: Any = "rope" if form == DENSE else "none"
    decoder = Decoder(DecoderConfig(vocab_size=256, mixers=(mixer,), positions=positions, **fields))
    return PersistentSpans(decoder, length, nearest) if form == PERSIST else decoder


def fit(model: Any, documents: Documents, config: TrainConfig) -> float:
    """Train on texts of `segment_length` tokens, one per row; return the seconds that it took."""
    length = config.segment_length
    windows = cut(documents.lengths, Window(length, length))
    texts = windowed(documents, windows[windows[:, 3] - windows[:, 1] == length])
    source, optimization = DocumentSource(model, texts, config, Group()), Optimization(model, config, Group())
    started = time.perf_counter()
    for step in range(config.step_limit or 0):
        optimization.step(source, step, config.rate(step, 0.0))
    return time.perf_counter() - started


def compare_forms(
    folder: Path,
    train: Documents,
    held_out: Documents,
    *,
    seeds: int,
    nearest: int,
    config: TrainConfig,
    fields: dict[str, Any],
    say: Say,
) -> ModelRecords:
    """Train and evaluate every form with every seed on the same texts; a second call skips finished trainings."""
    by_form: ModelRecords = {form: [] for form in FORMS}
    length = config.segment_length

    def measured(form: str, seed: int) -> dict[str, Any]:
        """Train one form with one seed and return its evaluation, number of parameters and training time."""
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            model = build_form(form, length, nearest, **fields)
            settings = {name: getattr(config, name) for name in ("steps", "lanes", "segment_length", "lr", "warmup")}
            seconds = fit(model, train, TrainConfig(**settings, carry=False, seed=seed))
        alone = evaluate_text(model, held_out, chunk=length, memory=False, segment_length=length).record()
        return {"alone": alone, "names": list(held_out.names), "parameters": model.num_parameters(), "seconds": seconds}

    for seed in range(seeds):
        for form in FORMS:
            file = folder / "forms" / f"{form.replace(' ', '-')}-{seed}.json"
            by_form[form].append(measure_once(file, partial(measured, form, seed)))
            say(f"{form}, seed {seed}: trained in {by_form[form][-1]['seconds']:.0f} s")
    return by_form
