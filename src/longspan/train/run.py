"""Runs: a recipe and a folder in, a trained model out.

FOLDER/recipe.json      the recipe with every default filled in
FOLDER/log.jsonl        one line per logged step and per evaluation
FOLDER/tokenizer.json   what text is cut into
FOLDER/digests.json     digests of the recipe and the tokenizer, so that damage is noticed
FOLDER/checkpoints/     see `longspan.train.checkpoint`
FOLDER/model/           the trained model, once the training is over

A folder belongs to one training at a time (`longspan.train.lock`), and holds nothing before task, tokenizer and model
fit.
"""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from longspan import renames, tasks
from longspan.config import from_dict, nearest, to_dict
from longspan.errors import CheckpointError, ConfigError
from longspan.files import write_json
from longspan.models import build_model, resolve_model
from longspan.train import checkpoint as checkpoints
from longspan.train import folders, pretrained
from longspan.train.config import TrainConfig
from longspan.train.copy_curriculum import CopyCurriculumConfig, CopyTrainer
from longspan.train.curriculum import CurriculumConfig, CurriculumTrainer
from longspan.train.distributed import Group, choose_device, join_group
from longspan.train.lock import Start, reserved
from longspan.train.loop import Result, TrainingLoop
from longspan.train.memory_curriculum import MemoryCurriculumConfig, MemoryTrainer
from longspan.train.opening import TABLES, newest_sound, stored_recipe
from longspan.train.passkey_curriculum import PasskeyCurriculumConfig, PasskeyTrainer
from longspan.train.progress import Display, make
from longspan.train.trainer import Trainer
from longspan.version import __version__

_CURRICULA: dict[str, tuple[type[CurriculumConfig], tuple[str, ...]]] = {
    "passkey": (PasskeyCurriculumConfig, ("passkey", "needle")),
    "copy": (CopyCurriculumConfig, ("copy",)),
}
"""What `train.curriculum` names, and the tasks that it is for."""
_TRAINERS: dict[type[CurriculumConfig], type[CurriculumTrainer]] = {
    MemoryCurriculumConfig: MemoryTrainer,
    PasskeyCurriculumConfig: PasskeyTrainer,
    CopyCurriculumConfig: CopyTrainer,
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.float32, "float64": torch.float64}
# what may change when a run goes on; the rest would make it another run
FREE = (
    *("steps", "minutes", "log_every", "eval_every", "eval_tokens", "final_eval_tokens", "checkpoint_every", "keep"),
    *("threads", "device", "accumulation"),
)


def resolve(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe with every default filled in; `model.vocab_size` only where it is given, as it follows the task.

    Args:
        recipe: tables `model`, `task`, `train`, and an optional text `about`.

    Raises:
        ConfigError: an unknown table or field (with the nearest name), or a value that does not fit.
    """
    recipe = renames.recipe(recipe)
    for name in recipe:
        if name not in (*TABLES, "about", "longspan"):
            raise ConfigError(f"recipe: unknown table {name!r}{nearest(name, [*TABLES, 'about'])}")
    for name in TABLES:
        if not isinstance(recipe.get(name, {}), Mapping):
            raise ConfigError(f"recipe.{name}: expected a table of fields, got {recipe[name]!r}")
    if pretrained.is_pretrained(recipe):
        pretrained.make_known()
        recipe = pretrained.completed(recipe)
    return {
        "longspan": __version__,
        "about": recipe.get("about", ""),
        "model": resolve_model(_placed(recipe)),
        "task": tasks.resolve(recipe.get("task", {})),
        "train": to_dict(from_dict(_train_config(recipe), recipe.get("train", {}), "train")),
    }


def _placed(recipe: Mapping[str, Any]) -> Mapping[str, Any]:
    """The model's table; factorized positions without a shape take the coordinates of the task's documents."""
    model: Mapping[str, Any] = recipe.get("model", {})
    if model.get("positions") != "factorized" or model.get("position_shape"):
        return model
    shape = getattr(tasks.build(recipe.get("task", {})), "position_shape", None)
    return model if shape is None else {**model, "position_shape": list(shape)}


def _train_config(recipe: Mapping[str, Any]) -> type[Any]:
    """Of a classifier on a memory task its curriculum, of tasks that have one theirs where it is named, else usual."""
    name, table = recipe.get("task", {}).get("name"), recipe.get("train", {})
    if name == "memory" and "classes" in recipe.get("model", {}):
        return MemoryCurriculumConfig
    if "curriculum" in table:
        of_task = next((config for config, known in _CURRICULA.values() if name in known), None)
        config, known = _CURRICULA.get(table["curriculum"], (of_task, (name,)))
        if config is None or name not in known:
            words = {curriculum: " and ".join(tasks) for curriculum, (_, tasks) in _CURRICULA.items()}
            only = ", ".join(f"{curriculum!r} for {tasks} only" for curriculum, tasks in words.items())
            raise ConfigError(f"train.curriculum = {table['curriculum']!r}: {only}; the task is {name!r}")
        return config
    return TrainConfig


def run(
    recipe: Mapping[str, Any] | None,
    folder: str | Path,
    *,
    resume: bool = False,
    progress: str | Display = "auto",
) -> Result:
    """Train what a recipe says, in a folder; under torchrun every process calls it.

    Args:
        recipe: see `resolve`. With `resume`, None or any part of it, which must agree with the recipe that the run
            began with, but for its length, intervals, threads and device.
        folder: of the run; made where missing.
        resume: go on from the newest sound checkpoint, bit for bit.
        progress: `"auto"` (live on a terminal, else lines), `"live"`, `"plain"`, `"none"`, or a display of your own.

    Raises:
        ConfigError: a recipe that does not fit itself, its task, or the run that is resumed.
        DataError: text that is missing or cannot be read.
        CheckpointError: no run to resume, a run already there, nothing sound to go on from, or nowhere to save.
        DivergedError: the loss is not finite.
    """
    folder, display = Path(folder), make(progress)
    resolved = _resumed_recipe(folder, recipe or {}) if resume else resolve(recipe or {})
    config = from_dict(_train_config(resolved), resolved["train"], "train")
    staged = isinstance(config, CurriculumConfig)
    group = join_group("cpu" if staged else config.device)
    with _caller_undisturbed(group, config.threads):
        # a curriculum is trained in one process
        group = Group(device=choose_device(config.device)) if staged else group
        with _reserved(folder, resume, group) as start:
            return _train(resolved, config, folder, resume, group, display if group.main else Display(), start)


@contextlib.contextmanager
def _reserved(folder: Path, resume: bool, group: Group) -> Iterator[Start]:
    """The folder for this run alone; an error of the main process ends the others too."""
    with contextlib.ExitStack() as stack:
        start, problem = Start(), None
        if group.main:
            try:
                start = stack.enter_context(reserved(folder, resume=resume))
                if not resume and (checkpoints.found(folder / "checkpoints") or (folder / "model").is_dir()):
                    raise CheckpointError(f"{folder}: holds a run already; resume it, or choose another folder")
            except CheckpointError as error:
                problem = error
        if group.any(problem is not None):
            raise problem or CheckpointError(f"{folder}: the main process cannot begin here")
        yield start


def _train(
    resolved: dict[str, Any], config: Any, folder: Path, resume: bool, group: Group, display: Display, start: Start
) -> Result:
    if group.main and pretrained.is_pretrained(resolved):
        pretrained.write_tokenizer(resolved["model"], folder)
    task = tasks.build(resolved["task"])
    if group.main:
        task.prepare(folder)
    group.barrier()
    if not group.main:
        task.prepare(folder, main=False)
    known = resolved["model"].setdefault("vocab_size", task.vocab_size)
    if known < task.vocab_size:
        raise ConfigError(
            f"model.vocab_size = {known}, but the task has {task.vocab_size} token ids; leave it out to follow the task"
        )
    if isinstance(config, CurriculumConfig):
        _check_staged(resolved, config)
    checkpoint = newest_sound(folder / "checkpoints", display) if resume else None
    if resume and checkpoint is None:
        display.message(f"{folder}: no checkpoint to resume; training begins at step 0")
    torch.manual_seed(config.seed)
    model = build_model(resolved["model"]) if checkpoint is None else checkpoint.model
    trainer = _trainer(model, task, config, folder, group, display)
    if checkpoint is not None:
        trainer.restore(checkpoint)
    if isinstance(config, TrainConfig) and config.carry and model.traits.streams and not model.traits.bounded:
        display.message("this model's state grows with a document's length; train.carry = false cuts it at segments")
    if group.main:
        _begin(folder, resolved, start)

    def publish() -> None:
        try:
            folders.write_folder(folder / "model", lambda filled: pretrained.publish(model, filled), folders.seal)
        except CheckpointError as error:
            raise CheckpointError(
                f"{error}; {checkpoints.last_good(folder / 'checkpoints')} and holds the trained model; make room and "
                "resume"
            ) from None

    # adapters become part of the weights that are published, so models that have them are evaluated first
    early = not hasattr(model, "export")
    result = trainer.fit(publish if early else None)
    if not early and group.main and trainer.trained:
        publish()
    if result.interrupted and trainer.trained:
        display.message(f"trained to step {result.step}, saved in {folder}; resume it for the final evaluation")
    elif result.interrupted:
        display.message(f"stopped at step {result.step}, saved in {folder}; resume it to go on")
    group.barrier()
    return result


def _trainer(model: Any, task: Any, config: Any, folder: Path, group: Group, display: Display) -> TrainingLoop:
    """What trains by this configuration, its model on the device of the group."""
    if isinstance(config, TrainConfig):
        group.share_parameters(model.to(group.device, DTYPES[config.dtype]))
        return Trainer(model, task, config, folder, group=group, display=display)
    return _TRAINERS[type(config)](model.to(group.device), task, config, folder, display=display)


def _begin(folder: Path, resolved: dict[str, Any], start: Start) -> None:
    """Everything fits: from here on the folder is that of a run."""
    # deleted first, as a kill between the two files would leave digests of an earlier recipe
    (folder / folders.DIGESTS).unlink(missing_ok=True)
    write_json(folder / "recipe.json", resolved)
    start.begun = True
    folders.seal_files(folder, ("recipe.json", "tokenizer.json"))
    if (folder / "model").is_dir():
        # of an earlier end of this run; until the next end the newest checkpoint is the model
        folders.remove(folder / "model")


def _check_staged(resolved: dict[str, Any], config: CurriculumConfig) -> None:
    """What a recipe's tables must agree on."""
    if isinstance(config, (PasskeyCurriculumConfig, CopyCurriculumConfig)):
        if resolved["model"]["kind"] != "decoder" or "memory" in resolved["model"]:
            raise ConfigError(f"train.curriculum = {config.curriculum!r} trains a decoder without a table model.memory")
        return
    memory = resolved["model"]["memory"]
    if memory["segment_length"] != resolved["task"]["segment_length"]:
        raise ConfigError(
            f"model.memory.segment_length = {memory['segment_length']}, but task.segment_length = "
            f"{resolved['task']['segment_length']}: a question must end a segment; give both the same"
        )


def _resumed_recipe(folder: Path, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The stored recipe with what may change taken from `recipe`."""
    with renames.reading_saved():
        stored = renames.recipe(stored_recipe(folder))
    recipe = renames.recipe(recipe)
    merged = {**stored, **recipe, **{name: {**stored[name], **recipe.get(name, {})} for name in TABLES}}
    resolved = resolve(merged)
    for name in TABLES:
        for key, value in resolved[name].items():
            # what an older version did not know began as its default
            began = stored[name].get(key, value)
            if value != began and not (name == "train" and key in FREE) and (name, key) != ("task", "cache"):
                raise ConfigError(
                    f"{name}.{key} = {value!r}, but the run in {folder} began with {began!r}; "
                    "keep it, or start another run"
                )
    return resolved


@contextlib.contextmanager
def _caller_undisturbed(group: Group, threads: int) -> Iterator[None]:
    """Leave the caller's random numbers and threads as they were."""
    before = torch.get_num_threads()
    if threads:
        torch.set_num_threads(threads)
    try:
        with torch.random.fork_rng([group.device.index or 0] if group.device.type == "cuda" else []):
            yield
    finally:
        torch.set_num_threads(before)
