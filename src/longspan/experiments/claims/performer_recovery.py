"""`performer-recovery`: a pretrained encoder gets FAVOR+ instead of softmax and recovers in a short training."""

import copy
import itertools
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from longspan.experiments.claims.base import Claim, Figure, Outcome, Say, graded
from longspan.experiments.claims.runs import measure_once
from longspan.report import Picture
from longspan.report.figures import Mark, Series, line_figure, picture_of
from longspan.tasks.text import TextTask

GOAL = 0.95
DRAWS = 3


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Sizes: features to try untrained, steps, passages per step, tokens per passage, held-out passages."""

    features: tuple[int, ...]
    steps: int
    batch: int
    length: int
    held_out: int
    lr: float = 2e-4
    tuned: int = 512
    """features of the trained model"""
    speeches: int = 0
    """speeches of each split to cut passages from, the first ones; 0: all"""
    small_model: bool = False
    """use an encoder that is trained from nothing in a second instead of all-MiniLM-L6-v2"""


PLANS: dict[str, Plan] = {
    "tiny": Plan(
        features=(4, 32), steps=20, batch=4, length=24, held_out=12, lr=3e-3, tuned=16, speeches=2, small_model=True
    ),
    "small": Plan(features=(64, 256), steps=40, batch=8, length=32, held_out=32),
    "full": Plan(features=(64, 128, 256, 512, 1024, 2048), steps=450, batch=16, length=64, held_out=200),
}


def passages(tokenizer: Any, split: str, count: int, length: int, seed: int, speeches: int = 0) -> Tensor:
    """Return (count, length) token ids of passages of State of the Union speeches, drawn without replacement.

    `speeches` is the number of speeches to cut them from; 0: all.
    """
    cut: list[list[int]] = []
    texts = TextTask().texts("train" if split == "train" else "validation")
    for _, data in itertools.islice(texts, speeches or None):
        ids = tokenizer(bytes(data).decode(), add_special_tokens=False, verbose=False).input_ids
        cut += [ids[first : first + length - 2] for first in range(0, len(ids) - length, length - 2)]
    order = np.random.default_rng(seed).permutation(len(cut))[:count]
    begin, end = tokenizer.cls_token_id, tokenizer.sep_token_id
    return torch.tensor([[begin, *cut[index], end] for index in order])


def embed(model: Any, tokens: Tensor) -> Tensor:
    """Return embeddings (batch, dim) of unit norm of tokens (batch, length): means over tokens, as in its training."""
    return F.normalize(model(tokens).last_hidden_state.mean(1), dim=-1)


@torch.no_grad()
def embed_all(model: Any, tokens: Tensor, batch: int = 20) -> Tensor:
    """Return embeddings of unit norm, (passages, dim), of token ids (passages, length), without gradients."""
    return torch.cat([embed(model, part) for part in tokens.split(batch)])


def agreement(ours: Tensor, original: Tensor) -> dict[str, float]:
    """Return mean and least cosine to the original embeddings, and how many passages keep their nearest neighbor."""
    cosines = (ours * original).sum(-1)
    nearest = [(embeddings @ embeddings.T).fill_diagonal_(-2).argmax(1) for embeddings in (ours, original)]
    return {
        "cosine": float(cosines.mean()),
        "least": float(cosines.min()),
        "nearest": float((nearest[0] == nearest[1]).float().mean()),
    }


def converted(model: Any, features: int, seed: int) -> Any:
    """Return a copy of an encoder with FAVOR+ instead of softmax."""
    from longspan import hf

    twin = copy.deepcopy(model)
    hf.convert(twin, "performer", num_features=features, redraw_every=0, seed=seed)
    return twin


def distill(model: Any, teacher: Any, texts: Tensor, plan: Plan, say: Say) -> list[float]:
    """Distill embeddings and hidden states of all layers from the original; return the mean cosine of every step."""
    from longspan import hf

    model.eval()  # no dropout, like the teacher: noise would only hide the differences
    groups = hf.parameter_groups(model, lr=plan.lr, weight_decay=0.0)
    optimizer = torch.optim.AdamW(groups)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [group["lr"] for group in groups], total_steps=plan.steps, pct_start=0.1
    )
    curve = []
    for step in range(plan.steps):
        tokens = texts[step * plan.batch : (step + 1) * plan.batch]
        with torch.no_grad():
            teacher_hidden = teacher(tokens, output_hidden_states=True).hidden_states
        hidden = model(tokens, output_hidden_states=True).hidden_states
        cosines = F.cosine_similarity(hidden[-1].mean(1), teacher_hidden[-1].mean(1), dim=-1)
        # every layer has a target, so that late layers need not correct errors of early ones
        layers = [
            (1 - F.cosine_similarity(*pair, dim=-1)).mean() for pair in zip(hidden[1:], teacher_hidden[1:], strict=True)
        ]
        loss = (1 - cosines).mean() + torch.stack(layers).sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        curve.append(float(cosines.mean().detach()))
        if (step + 1) % 50 == 0:
            say(f"step {step + 1}: cosine {np.mean(curve[-20:]):.3f} in training")
    return curve


def recover(plan: Plan, teacher: Any, tokenizer: Any, say: Say) -> dict[str, Any]:
    """Convert the encoder, measure its agreement with the original, train it, and measure again."""
    torch.manual_seed(0)
    started = time.perf_counter()
    held_out = passages(tokenizer, "validation", plan.held_out, plan.length, 1, plan.speeches)
    original = embed_all(teacher, held_out)
    untrained: dict[str, list[dict[str, float]]] = {}
    for features in plan.features:
        for seed in range(DRAWS):
            scores = agreement(embed_all(converted(teacher, features, seed), held_out), original)
            untrained.setdefault(str(features), []).append(scores)
        mean = np.mean([scores["cosine"] for scores in untrained[str(features)]])
        say(f"{features} features, untrained: cosine {mean:.3f}")
    model = converted(teacher, plan.tuned, 0)
    texts = passages(tokenizer, "train", plan.steps * plan.batch, plan.length, 2, plan.speeches)
    curve = distill(model, teacher, texts, plan, say)
    return {
        "untrained": untrained,
        "curve": curve,
        "tuned": agreement(embed_all(model, held_out), original),
        "even": float((original @ original.T).fill_diagonal_(0).sum() / (len(original) * (len(original) - 1))),
        "other_draws": [other_draw(model, teacher, plan, seed, held_out, original) for seed in (1, 2)],
        "seconds": time.perf_counter() - started,
    }


def other_draw(tuned: Any, teacher: Any, plan: Plan, seed: int, held_out: Tensor, original: Tensor) -> dict[str, float]:
    """Return the agreement of the trained weights with the original under a random projection not used in training."""
    model = converted(teacher, plan.tuned, seed)
    model.load_state_dict(dict(tuned.named_parameters()), strict=False)
    return agreement(embed_all(model, held_out), original)


def _measure(folder: Path, plan: Plan, say: Say) -> Outcome:
    """Measure the claim with all-MiniLM-L6-v2 or a small encoder, or read the measurements of an earlier call."""
    from longspan.experiments.bundled_models import open_minilm
    from longspan.experiments.small_models import train_small_bert

    open_teacher = train_small_bert if plan.small_model else open_minilm
    return outcome(measure_once(folder / "found.json", lambda: recover(plan, *open_teacher(), say)), plan)


def outcome(measured: dict[str, Any], plan: Plan) -> Outcome:
    """Judge the claim by its measurements: return the verdict, the numbers next to the paper's, and plots."""
    figures = []
    for features, draws in measured["untrained"].items():
        cosines = [draw["cosine"] for draw in draws]
        nearest = np.mean([draw["nearest"] for draw in draws])
        figures.append(
            Figure(
                f"cosine to the original embeddings, {int(features):,} features, untrained",
                "accuracy 0.07 before training (of a language model)",
                f"{np.mean(cosines):.3f} ({min(cosines):.3f} to {max(cosines):.3f} over {len(draws)} draws); "
                f"same nearest passage for {nearest:.0%}",
            )
        )
    tuned, other_cosines = measured["tuned"], [draw["cosine"] for draw in measured["other_draws"]]
    figures.append(
        Figure(
            f"cosine to the original embeddings, {plan.tuned} features, after {plan.steps} steps",
            "recovered in few steps",
            f"{tuned['cosine']:.3f} (least {tuned['least']:.3f}); same nearest passage for {tuned['nearest']:.0%}",
        )
    )
    figures.append(
        Figure(
            "cosine with random projections not used in training",
            "",
            ", ".join(f"{draw:.3f}" for draw in other_cosines),
        )
    )
    figures.append(Figure("cosine between different passages, original", "", f"{measured['even']:.3f}"))
    before = np.mean([draw["cosine"] for draw in measured["untrained"].get(str(plan.tuned), [tuned])])
    return Outcome(
        verdict=graded(tuned["cosine"] >= GOAL, tuned["cosine"] > before),
        figures=figures,
        size=f"{_about(plan)}, passages of {plan.length} tokens of State of "
        f"the Union speeches, {plan.held_out} from held-out speeches; distilled on {plan.steps * plan.batch:,} "
        "passages, all weights, cosine of embeddings and of every layer's hidden states to the original's",
        note="The paper measures the accuracy of a pretrained language model; here the embeddings of an encoder are "
        "compared, for which a model of a few megabytes is enough.",
        data=measured,
        pictures=[_picture(measured, plan)],
        seconds=measured["seconds"],
    )


def _about(plan: Plan) -> str:
    """Describe the original encoder."""
    from longspan.experiments.small_models import ABOUT

    return f"a BERT of {ABOUT}" if plan.small_model else "all-MiniLM-L6-v2 (BERT, 6 layers of 384, 12 heads of 32)"


def _picture(measured: dict[str, Any], plan: Plan) -> Picture:
    """Plot the cosine to the original embeddings against the number of features, untrained and distilled."""
    features = [int(count) for count in measured["untrained"]]
    draws = [[draw["cosine"] for draw in measured["untrained"][str(count)]] for count in features]
    series = [
        Series(
            x=features,
            y=[float(np.mean(cosines)) for cosines in draws],
            low=[min(cosines) for cosines in draws],
            high=[max(cosines) for cosines in draws],
            label="untrained",
            kind="marked",
        ),
        Series(x=[plan.tuned], y=[measured["tuned"]["cosine"]], label=f"after {plan.steps} steps", kind="marked"),
    ]
    return picture_of(
        line_figure,
        "performer-recovery",
        series,
        xlabel="random features",
        ylabel="cosine to the original embeddings",
        marks=[Mark(GOAL, "goal", horizontal=True), Mark(measured["even"], "another passage", horizontal=True)],
        xscale="log2",
        xticks=features,
        ylim=(0, 1.08),
        alt="Cosine to the original embeddings against the number of random features, untrained and distilled.",
    )


PERFORMER_RECOVERY = Claim(
    name="performer-recovery",
    system="Performer",
    source="Choromanski et al. 2021, section 4.3 and figure 5",
    text="A Performer with the weights of a pretrained Transformer recovers after a short training.",
    measure=_measure,
    minutes={"tiny": 0.1, "small": 2, "full": 35},
    plans=PLANS,
)
