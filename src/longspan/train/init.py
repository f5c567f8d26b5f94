"""Warm starts: a new run takes its first weights from a run, a saved model, or a named start (`train.init`).

Only parameters are taken; statistics and random draws in buffers stay new. A parameter is taken if its name and shape
agree with one of the start. For that:

- the prefixes of wrappers are dropped, so a recurrent memory starts from a plain model, and a plain model from it;
- parameters inside a mechanism (`mixer.core`) are taken only from a mechanism of the same class, because the gates of
  two mechanisms may have one name and shape, but not one meaning. `transformer_xl` and `compressive` count as one
  class: their relative positions are the same;
- a mechanism whose queries also serve as keys (`lsh`, `routing`) has no `k_proj`: that of the start is left over. In
  the other direction `k_proj` is new.

Nothing but names and shapes is compared: another number of heads of the same total width, or another RoPE base, takes
the same weights.
"""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from longspan.contract.relative import RelativeMechanism
from longspan.errors import CheckpointError, ConfigError, LongspanError
from longspan.files import write_json
from longspan.mixers import Mechanism
from longspan.models import load_model
from longspan.tasks import Task
from longspan.train import folders, pretrained
from longspan.train.distributed import Group
from longspan.train.opening import is_pretrained_folder, load_run, stored_recipe
from longspan.train.starts import SHIPPED, start_folder

SUMMARY = "init.json"
_SHOWN = 4


@dataclass(frozen=True, kw_only=True)
class WarmStart:
    """What a new model took from its start; parameters shared between layers count once."""

    start: str
    """the folder, as `train.init` names it"""
    taken_parameters: int
    """number of parameters of the new model that were copied"""
    parameters: int
    """number of parameters of the new model"""
    taken: tuple[str, ...]
    """names in the new model"""
    new: tuple[str, ...]
    """names in the new model that keep their initialization"""
    left_over: tuple[str, ...]
    """names in the start that were not taken; a name that is also in `new` has another shape or meaning there"""
    tokenizer_compared: bool
    """False: the start is a saved model, which has no tokenizer"""

    def message(self) -> str:
        """Summarize the start in one line."""
        groups = (("new", self.new), ("left over", self.left_over))
        parts = "; ".join(f"{title}: {_shortened(names)}" for title, names in groups if names)
        line = f"started from {self.start}: {self.taken_parameters:,} of {self.parameters:,} parameters taken"
        line += f" ({parts})" if parts else ""
        if not self.tokenizer_compared:
            line += "; a saved model has no tokenizer to compare, so check that token ids mean the same"
        return line

    def save(self, folder: Path) -> None:
        """Write the start to `init.json` in the folder of the run."""
        write_json(folder / SUMMARY, asdict(self))


def start_from(model: nn.Module, init: str, task: Task, group: Group) -> WarmStart | None:
    """Copy weights into a new model, in place, in the main process; `Group.share_parameters` gives them to the others.

    Args:
        model: on the CPU, in the dtype in which it is trained.
        init: name of a start (`longspan.train.starts`), folder of a run, or of a model that `save_model` wrote.
        task: of the new run, prepared.
        group: the processes of the run.

    Returns:
        What was taken; None in processes other than the main one.

    Raises:
        CheckpointError: there is no such folder, it is damaged, or has neither a run nor a saved model.
        ConfigError: its tokens differ from those of the new run, or no weight fits.
    """
    outcome, problem = None, None
    if group.main:
        try:
            # building the start's model draws random numbers, which must not change the run
            with torch.random.fork_rng(devices=[]):
                start, start_task = _open_start(start_folder(init))
            _check_tokens(model, task, start, start_task, init)
            outcome = take_weights(model, start, init, tokenizer_compared=start_task is not None)
        except LongspanError as error:
            problem = error
    if group.any(problem is not None):
        raise problem or CheckpointError(f"train.init = {init!r}: the main process cannot use it; see its message")
    return outcome


def take_weights(model: nn.Module, start: nn.Module, init: str, *, tokenizer_compared: bool = True) -> WarmStart:
    """Copy the parameters of `start` that fit into `model`, in place; the module's docstring says which fit.

    Raises:
        ConfigError: none fits.
    """
    parameters, start_parameters = dict(model.named_parameters()), dict(start.named_parameters())
    sources = {key: name for name, key in _keys(start).items()}
    pairs = {name: sources[key] for name, key in _keys(model).items() if key in sources}
    if not pairs:
        raise ConfigError(
            f"train.init = {init!r}: none of its weights has the name and shape of a weight of this model; set "
            "model.dim and the other sizes as they are in its recipe, or leave train.init out"
        )
    with torch.no_grad():
        for name, source in pairs.items():
            parameters[name].copy_(start_parameters[source])
    used = set(pairs.values())
    return WarmStart(
        start=init,
        taken_parameters=sum(parameters[name].numel() for name in pairs),
        parameters=sum(parameter.numel() for parameter in parameters.values()),
        taken=tuple(pairs),
        new=tuple(name for name in parameters if name not in pairs),
        left_over=tuple(name for name in start_parameters if name not in used),
        tokenizer_compared=tokenizer_compared,
    )


def _open_start(folder: Path) -> tuple[Any, Task | None]:
    """Return the model of a start and, if it is a run, its task."""
    where = f"train.init = {str(folder)!r}"
    if not (folder.is_dir() and any((folder / name).is_file() for name in ("recipe.json", "config.json"))):
        problem = "has neither a run nor a saved model" if folder.is_dir() else "there is no such folder"
        names = ", ".join(map(repr, SHIPPED))
        raise CheckpointError(f"{where}: {problem}; give the folder of a run or of a saved model, or {names}")
    is_run = (folder / "recipe.json").is_file()
    if is_pretrained_folder(folder) or (is_run and pretrained.is_pretrained(stored_recipe(folder))):
        raise ConfigError(
            f"{where}: is a pretrained model, whose weights have other names; to train it further, set "
            "model.kind = 'pretrained' and model.source to it"
        )
    if is_run:
        return load_run(folder)
    folders.check_sealed(folder)
    return load_model(folder), None


def _check_tokens(model: Any, task: Task, start: Any, start_task: Task | None, init: str) -> None:
    """Raise ConfigError if token ids of the start mean something else than in the new run."""
    if start_task is not None and _tokens(start_task) != _tokens(task):
        raise ConfigError(
            f"train.init = {init!r}: its tokenizer differs from that of this run, so its embeddings belong to other "
            "tokens; train on the same text with the same task.tokenizer, or leave train.init out"
        )
    if start.vocab_size != model.vocab_size:
        raise ConfigError(
            f"train.init = {init!r}: has {start.vocab_size} token ids, but this model {model.vocab_size}; give a run "
            "or model with the same vocabulary, or leave train.init out"
        )


def _tokens(task: Task) -> str:
    """Return a text that identifies what token ids mean: the tokenizer or, where there is none, the kind of task."""
    tokenizer = getattr(task, "tokenizer", None)
    return type(task).__name__ if tokenizer is None else str(tokenizer.text())


def _keys(model: nn.Module) -> dict[str, tuple[str, torch.Size, type | None]]:
    """Return by the name of each parameter what must agree: name without wrappers, shape, and class of mechanism."""
    # from the outermost to the innermost module, so that the parts of `mixed_heads` count, not the whole
    mechanisms: dict[str, type] = {}
    for prefix, module in model.named_modules():
        if isinstance(module, Mechanism):
            kind = RelativeMechanism if isinstance(module, RelativeMechanism) else type(module)
            mechanisms |= {f"{prefix}.{name}": kind for name, _ in module.named_parameters()}
    return {
        name: (name.removeprefix("recurrent.").removeprefix("backbone."), parameter.shape, mechanisms.get(name))
        for name, parameter in model.named_parameters()
    }


def _shortened(names: Sequence[str]) -> str:
    """List names, those of several layers as one (`blocks.0-3.mixer.core.gate`), and count those that are too many."""
    layers: dict[str, list[int]] = {}
    for name in names:
        number = re.search(r"(?<=blocks\.)\d+", name)
        layers.setdefault(re.sub(r"(?<=blocks\.)\d+", "{}", name), []).append(int(number[0]) if number else 0)
    texts = []
    for pattern, numbers in layers.items():
        is_range = len(numbers) > 1 and numbers[-1] - numbers[0] + 1 == len(numbers)
        texts.append(pattern.format(f"{numbers[0]}-{numbers[-1]}" if is_range else ",".join(map(str, numbers))))
    more = len(texts) - _SHOWN
    return ", ".join(texts[:_SHOWN]) + (f" and {more} more, see {SUMMARY}" if more > 0 else "")
