"""The `[train]` table of a recipe: how a run is trained."""

import math
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, Literal, TypeAlias

from longspan.config import check_least, check_shares
from longspan.errors import ConfigError

DEFAULT_STEPS = 1000
Sampling: TypeAlias = Literal["lanes", "pieces"]
_NOT_NEGATIVE = (
    *("steps", "minutes", "lr", "warmup", "min_lr_ratio", "weight_decay", "eps", "clip"),
    *("checkpoint_every", "threads", "seed"),
)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Fields that the `[train]` tables of all kinds of training share."""

    steps: int | None = None
    """number of optimizer steps; None: 1000, or no limit if `minutes` is set"""
    minutes: float | None = None
    """training time, without evaluation and saving; the schedule follows steps or time, whichever is further along"""
    lr: float = 1e-3
    """largest learning rate"""
    warmup: int = 100
    """steps of linear warm-up"""
    min_lr_ratio: float = 0.1
    """learning rate at the end, as a fraction of `lr`"""
    constant: float | None = None
    """share of the run at the full learning rate, which then falls linearly; 0.9 lets losses at several lengths of
    training be read off one run; None: the rate falls along a cosine from the end of the warm-up"""
    betas: tuple[float, float] = (0.9, 0.95)
    """of AdamW"""
    weight_decay: float = 0.1
    """of AdamW"""
    eps: float = 1e-8
    """of AdamW"""
    clip: float = 1.0
    """largest norm of the gradient; larger gradients are scaled down to it; 0: no clipping"""
    seed: int = 0
    """of initialization, data order and dropout"""
    init: str = ""
    """start from which the weights are taken that fit by name and shape, before step 0: `"speeches"` or `"code"` (the
    trained models of the package), or the folder of a run or of a saved model; a resumed run no longer needs it; see
    `longspan.train.init`"""
    log_every: int = 10
    """steps between two lines of the log; a line has the means over these steps"""
    checkpoint_every: int = 500
    """steps between two checkpoints; 0: only at the end"""
    keep: int = 2
    """number of checkpoints to keep; older ones are deleted"""
    device: str = "auto"
    """`"auto"` (CUDA if available, else the CPU), `"cpu"`, `"cuda"`, `"cuda:1"`"""
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """float32 or float64: dtype of weights and computation; bfloat16: autocast with float32 weights"""
    accumulation: int = 1
    """number of parts into which each process splits its rows of a batch, run one after another: same result, less
    memory. Where the forward pass draws random numbers (`dropout`, `gate_noise`), each part and each process draws its
    own"""
    threads: int = 0
    """CPU threads; 0: chosen by torch. Losses are reproducible bit for bit with the same number of threads"""

    def __post_init__(self) -> None:
        check_least(self, "train", {"log_every": 1, "keep": 1, "accumulation": 1} | dict.fromkeys(_NOT_NEGATIVE, 0))
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"train.betas = {list(self.betas)}: must be two numbers from 0 to below 1")
        if self.constant is not None:
            check_shares(self, "train", ("constant",))

    @property
    def step_limit(self) -> int | None:
        """Number of optimizer steps after which the run ends; None if only `minutes` ends it."""
        return DEFAULT_STEPS if self.steps is None and self.minutes is None else self.steps

    @property
    def ends(self) -> str:
        """The length of the run in words, such as `1000 steps or 5 minutes`."""
        parts = [f"{self.step_limit} steps"] if self.step_limit is not None else []
        parts += [f"{self.minutes:g} minutes"] if self.minutes is not None else []
        return " or ".join(parts)

    def fraction_done(self, step: int, seconds: float) -> float:
        """Return the share of the run that is done, 0 to 1, by steps or by time, whichever is larger."""
        by_steps = step / max(self.step_limit, 1) if self.step_limit is not None else 0.0
        by_time = seconds / max(60 * self.minutes, 1e-9) if self.minutes is not None else 0.0
        return min(max(by_steps, by_time), 1.0)

    def is_done(self, step: int, seconds: float) -> bool:
        """Return whether the run has reached its number of steps or its time."""
        by_steps = self.step_limit is not None and step >= self.step_limit
        return by_steps or (self.minutes is not None and seconds >= 60 * self.minutes)

    def rate(self, step: int, seconds: float) -> float:
        """Return the factor of `lr` in step `step` (from 0): linear warm-up, then as `constant` says."""
        warm = min(1.0, (step + 1) / max(self.warmup, 1))
        if self.constant is not None:
            done = self.fraction_done(step, seconds)
            left = (1 - done) / max(1 - self.constant, 1e-9)
            return warm * (1.0 if done < self.constant else max(left, self.min_lr_ratio))
        if step < self.warmup:
            return warm
        by_time = 0.0 if self.minutes is None else seconds / max(60 * self.minutes, 1e-9)
        limit = self.step_limit
        by_steps = 0.0 if limit is None else (step - self.warmup) / max(limit - self.warmup, 1)
        progress = min(max(by_steps, by_time), 1.0)
        return self.min_lr_ratio + (1 - self.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """A table of `train.stages`: its number of steps, and the fields that differ; None: as in `[train]`."""

    steps: int | None = None
    """optimizer steps of the stage. Only the last stage may leave it out. It lasts until the run ends, and its `steps`
    set the length of a run without `train.steps` and `train.minutes`"""
    segment_length: int | None = None
    """see `TrainConfig`"""
    lanes: int | None = None
    """see `TrainConfig`"""
    sampling: Sampling | None = None
    """see `TrainConfig`"""
    bptt_segments: int | None = None
    """see `TrainConfig`"""


@dataclass(frozen=True, kw_only=True)
class TrainConfig(RunConfig):
    """Fields of `[train]` for language models."""

    lanes: int = 8
    """rows of the batch, over all processes together"""
    segment_length: int = 256
    """tokens per row in one call of the model"""
    sampling: Sampling = "lanes"
    """`"lanes"`: each row reads contiguous text, segment after segment; `"pieces"`: each row reads a random piece of a
    document, `segment_length` tokens long, and nothing is carried, also not in evaluations during training. Either way
    every token is read once per epoch"""
    stages: tuple[StageConfig, ...] | None = None
    """tables such as `[{ steps = 4000, segment_length = 256, lanes = 32 }, { segment_length = 2048, lanes = 4 }]`: the
    run goes through them in order. Each stage reads the text in a new random order, from an empty state; the learning
    rate follows the whole run. Evaluations, also the last, read with the fields of the stage whose step was the last"""
    bptt_segments: int = 1
    """segments per backward pass: gradients reach so far back through the carried state, as far as the mixers allow"""
    carry: bool = True
    """carry the state from call to call; False: every call starts from an empty state, for mixers whose state grows
    with the document (`full`); without effect on pieces"""
    loss_chunk: int = 0
    """number of tokens whose logits exist at once: with a large vocabulary logits are the largest tensors of a step;
    the loss is then computed in chunks, and logits are recomputed in the backward pass; 0: logits of whole calls"""
    eval_every: int = 500
    """steps between two evaluations on held-out documents; 0: only at the end"""
    eval_tokens: int = 200_000
    """held-out tokens per evaluation during training, from documents that the seed selects; 0: all"""
    final_eval_tokens: int = 0
    """held-out tokens of the evaluation at the end, from documents that the seed selects; 0: all"""

    def __post_init__(self) -> None:
        super().__post_init__()
        positive = ("lanes", "segment_length", "bptt_segments")
        others = ("eval_every", "eval_tokens", "final_eval_tokens", "loss_chunk")
        check_least(self, "train", dict.fromkeys(positive, 1) | dict.fromkeys(others, 0))
        self._check_stages()

    def _check_stages(self) -> None:
        """Raise ConfigError if a stage has a value that is not allowed, or lacks its `steps`."""
        if self.stages is None:
            _check_pieces("train", self.sampling, self.bptt_segments)
            return
        if not self.stages:
            raise ConfigError("train.stages = []: must have at least one stage; leave the field out to train without")
        for index, stage in enumerate(self.stages):
            where = f"train.stages[{index}]"
            check_least(stage, where, dict.fromkeys(("steps", "segment_length", "lanes", "bptt_segments"), 1))
            if stage.steps is None and index + 1 < len(self.stages):
                raise ConfigError(f"{where}.steps: missing; only the last stage may leave it out")
            _check_pieces(where, stage.sampling or self.sampling, stage.bptt_segments or self.bptt_segments)
        first_step = sum(stage.steps or 0 for stage in self.stages[:-1])
        if self.step_limit is not None and self.steps is None and self.step_limit <= first_step:
            raise ConfigError(
                f"train.stages: the last stage begins after {first_step} steps, but the run ends after "
                f"{self.step_limit}; set train.steps, or steps in the last stage"
            )

    @property
    def step_limit(self) -> int | None:
        """Number of optimizer steps after which the run ends; None if only `minutes` ends it."""
        steps = [stage.steps for stage in self.stages or ()]
        if self.steps is None and self.minutes is None and steps and steps[-1] is not None:
            return sum(count or 0 for count in steps)
        return super().step_limit

    @property
    def stage_configs(self) -> "tuple[TrainConfig, ...]":
        """This table with the fields of each stage, without `stages`; only this table itself if it has no stages."""
        if self.stages is None:
            return (self,)
        names = ("segment_length", "lanes", "sampling", "bptt_segments")
        configs = []
        for stage in self.stages:
            changes: dict[str, Any] = {name: getattr(stage, name) for name in names if getattr(stage, name) is not None}
            configs.append(replace(self, stages=None, steps=self.step_limit, **changes))
        return tuple(configs)

    @property
    def carries(self) -> bool:
        """Whether the state is carried from call to call, where the model can."""
        return self.carry and self.sampling == "lanes"

    def stage_at(self, step: int) -> int:
        """Return the index of the stage (from 0) in which step `step` (from 0) is made; 0 without stages."""
        ends = accumulate(stage.steps or 0 for stage in (self.stages or ())[:-1])
        return sum(step >= end for end in ends)


def _check_pieces(where: str, sampling: Sampling, bptt_segments: int) -> None:
    """Raise ConfigError if pieces are to be read with gradients through several segments."""
    if sampling == "pieces" and bptt_segments != 1:
        raise ConfigError(
            f"{where}.bptt_segments = {bptt_segments}: must be 1 with sampling = 'pieces', which carry no state"
        )
