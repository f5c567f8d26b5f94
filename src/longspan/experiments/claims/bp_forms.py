"""BP-Transformer as its paper has it, beside the library's form: spans that persist through the layers, and spans made
anew in each. Both are trained alike on short texts, where the paper's graph is dense.
"""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longspan.experiments.claims.contest import Found
from longspan.experiments.claims.runs import kept
from longspan.mechanisms.bp.definition import paper_graph, paper_layer
from longspan.mixers import Traits
from longspan.models import Decoder, DecoderConfig
from longspan.tasks import Documents
from longspan.train import Lanes, TrainConfig, evaluate_text
from longspan.train.distributed import Group
from longspan.train.lm_evaluation import Window, cut, windowed
from longspan.train.step import Stepper

PERSIST, ANEW, DENSE = "spans that persist", "spans made anew", "dense"
FORMS = (DENSE, ANEW, PERSIST)
_STD = 0.02


class PersistentSpans(nn.Module):
    """A causal language model over the paper's graph, for one call of at most `length` tokens.

    Everything around the attention is that of a Decoder: embedding, norms in front (the paper: behind), projections,
    feed-forward, for tokens and spans alike. Spans begin as zero and go through the layers.
    """

    def __init__(self, decoder: Decoder, length: int, nearest: int) -> None:
        super().__init__()
        self.decoder, self.length = decoder, length
        self.graph = paper_graph(length, nearest)
        config = decoder.config
        shape = int(self.graph.place.max()) + 1, config.dim // config.num_heads
        self.relative = nn.ParameterList(torch.randn(shape) * _STD for _ in decoder.layers)

    @property
    def traits(self) -> Traits:
        """It reads a text as a whole."""
        return Traits(bidirectional=False, streams=False)

    def forward(
        self,
        tokens: Tensor,
        state: None = None,
        *,
        mask: Tensor | None = None,
        reset: Tensor | None = None,
        penalties: list[Tensor] | None = None,
    ) -> tuple[Tensor, None]:
        """Tokens (batch, length), one text a row, to logits; padding behind them is seen by no token."""
        count = tokens.shape[1]
        h = self.decoder.embedding(F.pad(tokens, (0, self.length - count)))
        nodes = torch.cat([h, h.new_zeros(len(h), len(self.graph.place) - self.length, h.shape[2])], 1)
        for block, relative in zip(self.decoder.layers, self.relative, strict=True):
            parts = block.mixer.projections
            assert parts.k_proj is not None
            q, k, v = (each.weight.mT for each in (parts.q_proj, parts.k_proj, parts.v_proj))
            heads = self.decoder.config.num_heads
            out = paper_layer(block.mixer_norm(nodes), q, k, v, relative, self.graph, heads=heads)
            nodes = nodes + parts.o_proj(out)
            nodes = nodes + block.feed(nodes)
        return self.decoder.logits(self.decoder.norm(nodes[:, :count])), None

    @property
    def draw(self) -> int:
        """Nothing is drawn."""
        return 0

    def after_step(self, step: int, generator: torch.Generator | None = None) -> None:
        """Nothing."""

    def num_parameters(self) -> int:
        """All of them."""
        return sum(parameter.numel() for parameter in self.parameters())

    def parameter_groups(self, *, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """The decoder's, and relative places without weight decay."""
        tree = {"name": "tree", "params": list(self.relative), "lr": lr, "weight_decay": 0.0}
        return [*self.decoder.parameter_groups(lr=lr, weight_decay=weight_decay), tree]


def make(form: str, length: int, nearest: int, **fields: Any) -> Any:
    """A model of a form; `fields` of its decoder.

    Positions come from the tree's places alone where there is a tree, from RoPE in the dense model.
    """
    levels = max(length - 1, 1).bit_length()
    mixer = {"name": "bp", "k": nearest, "max_level": levels} if form == ANEW else {"name": "full"}
    positions: Any = "rope" if form == DENSE else "none"
    decoder = Decoder(DecoderConfig(vocab_size=256, mixers=(mixer,), positions=positions, **fields))
    return PersistentSpans(decoder, length, nearest) if form == PERSIST else decoder


def fit(model: Any, documents: Documents, config: TrainConfig) -> float:
    """Train on texts of `segment_length` tokens, each alone in its row; how many seconds it took."""
    length = config.segment_length
    places = cut(documents.lengths, Window(length, length))
    texts = windowed(documents, places[places[:, 3] - places[:, 1] == length])
    stepper = Stepper(model, config, Group())
    lanes = Lanes(texts, lanes=config.lanes, segment_length=length, seed=config.seed)
    started = time.perf_counter()
    for step in range(config.step_limit or 0):
        stepper.step([next(lanes)], step=step, rate=config.rate(step, 0.0))
    return time.perf_counter() - started


def compare_forms(
    folder: Path,
    train: Documents,
    held: Documents,
    *,
    seeds: int,
    nearest: int,
    config: TrainConfig,
    fields: dict[str, Any],
    say: Callable[[str], None],
) -> Found:
    """Every form with every seed, on the same texts; a second call goes on from the trainings that are over."""
    found: Found = {form: [] for form in FORMS}
    length = config.segment_length

    def measured(form: str, seed: int) -> dict[str, Any]:
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            model = make(form, length, nearest, **fields)
            settings = {name: getattr(config, name) for name in ("steps", "lanes", "segment_length", "lr", "warmup")}
            seconds = fit(model, train, TrainConfig(**settings, carry=False, seed=seed))
        alone = evaluate_text(model, held, chunk=length, memory=False, segment_length=length).record()
        return {
            "alone": alone,
            "names": list(held.names),
            "parameters": model.num_parameters(),
            "seconds": seconds,
        }

    for seed in range(seeds):
        for form in FORMS:
            file = folder / "forms" / f"{form.replace(' ', '-')}-{seed}.json"
            found[form].append(kept(file, partial(measured, form, seed)))
            say(f"{form}, seed {seed}: trained in {found[form][-1]['seconds']:.0f} s")
    return found
