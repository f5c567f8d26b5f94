"""Which models fit a length, a memory and a training time on this machine, by training steps that are measured here.

A step of models with one and with two layers gives the time and the memory of a layer and of the rest, so a deep model
need not be built. The steps are the calibration of this machine: they are saved, and a second plan reads them.
"""

import json
import math
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from longspan.config import read_toml
from longspan.cost import countable_model, footprint
from longspan.errors import CheckpointError, LongspanError
from longspan.files import read_json, write_json
from longspan.models import build_model
from longspan.train.config import TrainConfig
from longspan.train.recipes import find_recipe, recipe_names
from longspan.train.starts import cache_folder
from longspan.train.training_memory import LENGTHS, TrainingMemory, step_cost, text_training, weight_bytes
from longspan.version import __version__

TOKENS_PER_PARAMETER = 20
"""tokens that a model is trained on per parameter, near the optimum for a given amount of computation (Hoffmann et al.
2022, arXiv:2203.15556, table 3)"""
EPOCHS = 4
"""passes over a text that are worth nearly as much as new text (Muennighoff et al. 2023, arXiv:2305.16264, section 6)
"""
RESIDENT = 450_000_000
"""bytes of a process that has imported torch and longspan"""
HEAP = 2.2
"""a process takes up to so many times the bytes of its tensors (see `longspan.train.training_memory`)"""
MEASURED_BITS = {
    "window": 1.3868,
    "full": 1.3772,
    "window_linear": 1.4106,
    "linear": 3.5253,
    "gated_delta": 1.8444,
    "performer": 3.5151,
    "infini": 1.5922,
    "associative": 1.5905,
    "sparse": 1.5169,
    "adaptive_span": 1.4759,
    "entmax": 1.4233,
    "bp": 1.5637,
    "lsh": 2.0324,
    "routing": 1.7375,
    "memorizing": 1.4425,
    "transformer_xl": 1.3852,
    "compressive": 1.4119,
    "accumulate": 1.5736,
    "per_layer": 1.6285,
    "rmt": 1.5922,
    "rmt_overwrite": 1.5749,
    "segments": 1.5936,
    "segments_relative": 1.5698,
}
"""bits per byte of the recipes in docs/claims.md, language-modelling: 0.8 M parameters, continued on the same code"""
TIMED_STEPS = 5
OVERHEAD = 1.3
"""a training takes so many times its steps: reading the text, logging, checkpoints and the last evaluation (measured on
two cores with infini, width 64: 81 ms per step of 61 ms)"""
_BYTES = 256


class ModelSize(NamedTuple):
    """Width and depth of a model."""

    dim: int
    num_layers: int
    num_heads: int


SIZES = (
    ModelSize(64, 2, 2),
    ModelSize(96, 3, 3),
    ModelSize(128, 4, 4),
    ModelSize(192, 5, 6),
    ModelSize(256, 6, 8),
    ModelSize(384, 6, 6),
    ModelSize(512, 8, 8),
    ModelSize(768, 12, 12),
)
"""Sizes that a plan considers, each with about two to three times the parameters of the one before."""


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a model has to fit.

    Attributes:
        length: tokens of the texts that it is to read.
        memory: bytes, for training and for reading.
        seconds: of training.
        text_tokens: tokens of the text to train on; None = as many as are needed.
    """

    length: int
    memory: int
    seconds: float
    text_tokens: int | None = None


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A model, what it costs on this machine, and why it does not fit.

    Attributes:
        recipe: its name, such as "lm/window".
        size: width and depth.
        parameters: their number.
        row: tokens per row and call in training; the whole length where the recipe carries no state.
        lanes: rows per step.
        tokens: of the training.
        training_seconds: time of the training.
        training_bytes: memory of a process that trains it.
        state_bytes: of a text of the length; None = it does not stream, and reads the text at once.
        reading_seconds: to read a text of the length.
        sees_start: whether the prediction after 2,048 tokens depends on the first 64.
        lr: learning rate: that of the recipe, divided by the width relative to 128 if it is larger.
        problem: why it does not fit; empty = it does.
    """

    recipe: str
    size: ModelSize
    parameters: int
    row: int
    lanes: int
    tokens: int
    training_seconds: float
    training_bytes: int
    state_bytes: int | None
    reading_seconds: float
    sees_start: bool
    lr: float
    problem: str = ""

    @property
    def steps(self) -> int:
        """Optimizer steps of the training."""
        return max(self.tokens // (self.row * self.lanes), 1)

    def command(self, *, source: str = "") -> str:
        """Return the command that trains it.

        Args:
            source: file to train on; empty = the text of the recipe.
        """
        values: dict[str, Any] = {
            "model.dim": self.size.dim,
            "model.num_layers": self.size.num_layers,
            "model.num_heads": self.size.num_heads,
            "model.ffn_dim": ffn_dim(self.size),
            "train.steps": self.steps,
            "train.segment_length": self.row,
            "train.lanes": self.lanes,
            "train.lr": f"{self.lr:g}",
            **({"task.source": source} if source else {}),
        }
        settings = " ".join(f"--set {field}={value}" for field, value in values.items())
        return f"longspan train {self.recipe} {settings} -o runs/{self.recipe.removeprefix('lm/')}"


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Measured steps of a model with one and with two layers: seconds and bytes of the first and of the second layer.

    Attributes:
        seconds: per token of a step, with one and with two layers.
        memory: of training, with one and with two layers.
        sees_start: see `Candidate`.
    """

    seconds: tuple[float, float]
    memory: tuple[TrainingMemory, TrainingMemory]
    sees_start: bool

    def seconds_of(self, num_layers: int) -> float:
        """Return seconds per token of a step with so many layers."""
        first, second = self.seconds
        return first + (num_layers - 1) * max(second - first, 0.0)

    def memory_at(self, num_layers: int, length: int) -> float:
        """Return the bytes of tensors of a step with so many layers on rows of a length, beyond the weights."""
        first, second = (memory.at(length) for memory in self.memory)
        return first + (num_layers - 1) * max(second - first, 0)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> "Calibration":
        """Return the calibration of `to_dict()`."""
        first, second = (TrainingMemory(**memory) for memory in data["memory"])
        return cls(seconds=tuple(data["seconds"]), memory=(first, second), sees_start=data["sees_start"])


def ffn_dim(size: ModelSize) -> int:
    """Return the width of the feed-forward layers: 2.75 times the model's, as in the recipes, a multiple of 8."""
    return 8 * round(2.75 * size.dim / 8)


def preference(tried: Candidate) -> tuple[Any, ...]:
    """Return a key that sorts candidates, the best first: fitting, back to the start, larger, lower measured loss."""
    bits = MEASURED_BITS.get(tried.recipe.removeprefix("lm/"), math.inf)
    return (bool(tried.problem), not tried.sees_start, -tried.size.dim, bits, tried.recipe)


def families() -> list[str]:
    """Return the recipes that a plan considers, without "lm/"."""
    return [name.removeprefix("lm/") for name in recipe_names() if name.startswith("lm/")]


def sized_table(recipe: Mapping[str, Any], size: ModelSize, num_layers: int = 0) -> dict[str, Any]:
    """Return the table `[model]` of a recipe at a size, for bytes; with another number of layers if one is given.

    A recipe with a mechanism per layer repeats them in their order.
    """
    count = num_layers or size.num_layers
    mixers = recipe["model"]["mixers"]
    if len(mixers) > 1:
        mixers = [mixers[layer % len(mixers)] for layer in range(count)]
    sizes = {"dim": size.dim, "num_layers": count, "num_heads": size.num_heads, "ffn_dim": ffn_dim(size)}
    return {**recipe["model"], **sizes, "mixers": mixers, "vocab_size": _BYTES}


class Planner:
    """Finds the largest size of a recipe that fits, by measured steps.

    Args:
        needs: what has to fit.
        say: prints a line before a measurement.
        file: of the calibration; None = in the cache of this user.
        sizes: to consider, the smallest first.
        again: measure again what the file has.
    """

    def __init__(
        self,
        needs: Needs,
        say: Callable[[str], None],
        *,
        file: Path | None = None,
        sizes: Sequence[ModelSize] = SIZES,
        again: bool = False,
    ) -> None:
        self.needs, self._say, self._sizes = needs, say, sizes
        self._file = file or cache_folder() / "calibration.json"
        self._saved = self._read()
        self._again, self._measured_now = again, set[str]()

    def candidate(self, family: str) -> Candidate:
        """Return the largest size of a recipe that fits, or the smallest size, which has a problem.

        Args:
            family: name of the recipe without "lm/".

        Raises:
            LongspanError: the recipe is not one of text, or none of its sizes can be built.
        """
        name = f"lm/{family}"
        recipe = read_toml(find_recipe(f"{name}.toml"))
        best: Candidate | None = None
        for size in self._sizes:
            if any("mixers" in mixer for mixer in recipe["model"]["mixers"]):
                # its heads are shared out among mechanisms
                size = size._replace(num_heads=recipe["model"]["num_heads"])
            tried = self._measured(name, recipe, size)
            if best is None or not tried.problem:
                best = tried
            # a larger one takes more of everything
            if tried.problem:
                break
        assert best is not None, "there are sizes"
        return best

    def _measured(self, name: str, recipe: Mapping[str, Any], size: ModelSize) -> Candidate:
        """Return the candidate of a size, with what it costs on this machine."""
        needs, config = self.needs, text_training(recipe)
        calibration = self._calibration(name, recipe, size, config)
        model = countable_model(sized_table(recipe, size))
        parameters, weights = model.num_parameters(), weight_bytes(model)
        # without a carried state only what is in the row can be learned
        row = config.segment_length if config.carry else max(needs.length, config.segment_length)
        lanes = config.lanes if config.carry else 1
        tokens = self._tokens(parameters, size)
        per_token = calibration.seconds_of(size.num_layers)
        if not config.carry:
            per_token *= _growth(model, row, LENGTHS[1])
        state = footprint(model, needs.length).state_bytes
        tensors = weights + calibration.memory_at(size.num_layers, row)
        tried = Candidate(
            recipe=name,
            size=size,
            parameters=parameters,
            row=row,
            lanes=lanes,
            tokens=tokens,
            training_seconds=OVERHEAD * tokens * per_token,
            training_bytes=RESIDENT + round(HEAP * tensors),
            state_bytes=state,
            # a backward pass takes about twice as long as a forward pass
            reading_seconds=needs.length * per_token / 3 * _growth(model, needs.length, row),
            sees_start=calibration.sees_start,
            lr=config.lr * min(1.0, 128 / size.dim),
        )
        return replace(tried, problem=self._problem(tried, weights))

    def _tokens(self, parameters: int, size: ModelSize) -> int:
        """Return the tokens to train on; of the smallest size as many as the text has."""
        tokens, limit = TOKENS_PER_PARAMETER * parameters, self.needs.text_tokens
        return tokens if limit is None or size.dim != self._sizes[0].dim else min(tokens, EPOCHS * limit)

    def _problem(self, tried: Candidate, weights: int) -> str:
        """Say why a candidate does not fit; empty if it does."""
        needs = self.needs
        state = tried.state_bytes or 0
        if RESIDENT + weights + state > needs.memory:
            return f"its state of {needs.length:,} tokens takes {decimal_bytes(state)}"
        if tried.training_bytes > needs.memory:
            return f"training on rows of {tried.row:,} tokens takes {decimal_bytes(tried.training_bytes)}"
        if needs.text_tokens is not None and tried.tokens > EPOCHS * needs.text_tokens:
            return f"needs {tried.tokens:,} tokens of training; {EPOCHS} passes over the text have fewer"
        if tried.training_seconds > needs.seconds:
            return f"its {tried.tokens:,} tokens of training take {duration(tried.training_seconds)}"
        return ""

    def _calibration(self, name: str, recipe: Mapping[str, Any], size: ModelSize, config: TrainConfig) -> Calibration:
        """Return the measured steps of a recipe at a width, from the file of an earlier plan if they are there."""
        tables = [sized_table(recipe, size, count) for count in (1, 2)]
        key = json.dumps([tables, asdict(config), _machine()], sort_keys=True, default=str)
        if key not in self._saved or (self._again and key not in self._measured_now):
            self._say(f"measuring steps of {name}, width {size.dim}")
            self._saved[key] = calibrate(tables, config).to_dict()
            self._measured_now.add(key)
            self._save()
        return Calibration.of(self._saved[key])

    def _save(self) -> None:
        """Save all measured steps; where that fails, say so: the plan does not need the file."""
        try:
            write_json(self._file, self._saved)
        except CheckpointError as error:
            self._say(f"the next plan measures again: {error}")

    def _read(self) -> dict[str, Any]:
        """Return the saved steps; empty if the file is missing or damaged. A damaged file is overwritten later."""
        try:
            saved = read_json(self._file) if self._file.is_file() else {}
        except LongspanError:
            return {}
        return saved if isinstance(saved, dict) else {}


def calibrate(tables: Sequence[Mapping[str, Any]], config: TrainConfig) -> Calibration:
    """Measure training steps of two models, which have one and two layers.

    Args:
        tables: `[model]` of both.
        config: `[train]`. With a carried state rows have its length. Without, one row of two lengths is measured, since
            the rows of a plan are as long as its texts.
    """
    rows = [config.segment_length] if config.carry else LENGTHS
    lanes = config.lanes if config.carry else 1
    seconds, memory = [], []
    for table in tables:
        costs = [
            step_cost(build_model(table), replace(config, segment_length=row, lanes=lanes), timed=TIMED_STEPS)
            for row in rows
        ]
        seconds.append(costs[-1].seconds / (rows[-1] * lanes * config.bptt_segments))
        slope = (costs[-1].peak - costs[0].peak) / (rows[-1] - rows[0]) if len(rows) > 1 else 0.0
        fixed = costs[0].peak - slope * rows[0]
        weights = weight_bytes(countable_model(table))
        memory.append(TrainingMemory(fixed=fixed, per_token=slope, rows=lanes, weights=weights))
    first, second = memory
    return Calibration(seconds=(seconds[0], seconds[1]), memory=(first, second), sees_start=_sees_start(tables[1]))


@torch.no_grad()
def _sees_start(table: Mapping[str, Any]) -> bool:
    """Return whether the last of 2,048 outputs depends on the first 64 tokens, with random weights."""
    model, generator = build_model(table).eval(), torch.Generator().manual_seed(0)
    # what is zero before training lets nothing through
    for parameter in model.parameters():
        parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    text = torch.randint(0, _BYTES, (1, 2048), generator=generator)
    other = torch.cat([(text[:, :64] + 1) % _BYTES, text[:, 64:]], dim=1)
    ends = [model(tokens)[0][:, -1] for tokens in (text, other)]
    return bool((ends[0] != ends[1]).any())


def _growth(model: Any, length: int, base: int) -> float:
    """Return the FLOPs per token of texts of a length, relative to those of texts of a base length."""
    return float(model.flops(length) / length / (model.flops(base) / base))


def _machine() -> list[str]:
    """Return what time and memory of a step depend on besides the model."""
    machine = [platform.processor() or platform.machine(), platform.node(), str(os.cpu_count())]
    return [*machine, torch.__version__, __version__, str(torch.get_num_threads())]


def decimal_bytes(count: float) -> str:
    """Format bytes with a decimal unit, the units in which a memory is given: "1.5 GB"."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB"


def duration(seconds: float) -> str:
    """Format seconds as text: "45 s", "12 min", "3.5 h", "2.1 days"."""
    for limit, unit, name in ((90, 1, "s"), (5400, 60, "min"), (172_800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / unit:.3g} {name}"
    days = seconds / 86_400
    return f"{days:.3g} days" if days < 100 else f"{days:,.0f} days"
