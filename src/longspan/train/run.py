"""Trains the model of a recipe in a folder, the run.

FOLDER/recipe.json      the recipe with every default filled in
FOLDER/log.jsonl        one line per logged step and per evaluation
FOLDER/tokenizer.json   the tokenizer of the text
FOLDER/digests.json     digests of the recipe and the tokenizer, to detect damage
FOLDER/init.json        with `train.init`: the weights that were taken from it, the new ones, and those left over
FOLDER/checkpoints/     see `longspan.train.checkpoint`
FOLDER/model/           the trained model, when the training is finished

Only one process trains in a folder at a time (`longspan.train.lock`). Nothing is written to it before the task, the
tokenizer and the model have been checked to fit together.
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
from longspan.train import folders, pretrained, transfer_store
from longspan.train.checkpoint import Checkpoint
from longspan.train.config import TrainConfig
from longspan.train.copy_curriculum import CopyCurriculumConfig
from longspan.train.curriculum import CurriculumConfig
from longspan.train.distributed import Group, join_group
from longspan.train.init import SUMMARY, WarmStart, start_from
from longspan.train.lock import Start, reserved
from longspan.train.memory_curriculum import MemoryCurriculumConfig
from longspan.train.opening import TABLES, newest_sound, stored_recipe
from longspan.train.passkey_curriculum import PasskeyCurriculumConfig
from longspan.train.progress import Display, make_display
from longspan.train.tracking import check_tracker, open_tracking
from longspan.train.trainer import Result, Trainer
from longspan.version import __version__

_CURRICULA: dict[str, tuple[type[CurriculumConfig], tuple[str, ...]]] = {
    "passkey": (PasskeyCurriculumConfig, ("passkey", "needle")),
    "copy": (CopyCurriculumConfig, ("copy",)),
}
"""Values of `train.curriculum`: the class of the table and the tasks that it supports."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.float32, "float64": torch.float64}
# fields of `[train]` that may change when a run is resumed
FREE = (
    *("steps", "minutes", "log_every", "eval_every", "eval_tokens", "final_eval_tokens", "checkpoint_every", "keep"),
    *("threads", "device", "accumulation"),
)


def resolve(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Check a recipe and fill in every default, except for `model.vocab_size`, which follows from the task.

    Args:
        recipe: tables `model`, `task`, `train`, and an optional text `about`.

    Raises:
        ConfigError: an unknown table or field (with a suggestion), or an invalid value.
    """
    recipe = renames.recipe(recipe)
    if transfer_store.TABLE in recipe:
        raise ConfigError(
            "recipe: a table [transfer] is an attention transfer, which `longspan train` and "
            "longspan.train.transfer_recipe.train_transfer run"
        )
    for name in recipe:
        if name not in (*TABLES, "about", "longspan"):
            raise ConfigError(f"recipe: unknown table {name!r}{nearest(name, [*TABLES, 'about'])}")
    for name in TABLES:
        if not isinstance(recipe.get(name, {}), Mapping):
            raise ConfigError(f"recipe.{name}: expected a table of fields, got {recipe[name]!r}")
    if pretrained.is_pretrained(recipe):
        pretrained.register_kind()
        recipe = pretrained.complete_recipe(recipe)
        if recipe.get("train", {}).get("init"):
            raise ConfigError(
                "train.init: a model of kind = 'pretrained' starts from model.source; leave train.init out"
            )
    return {
        "longspan": __version__,
        "about": recipe.get("about", ""),
        "model": resolve_model(_with_position_shape(recipe)),
        "task": tasks.resolve(recipe.get("task", {})),
        "train": to_dict(from_dict(_train_config(recipe), recipe.get("train", {}), "train")),
    }


def _with_position_shape(recipe: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the model's table; factorized positions without a shape take the shape of the task's documents."""
    model: Mapping[str, Any] = recipe.get("model", {})
    if model.get("positions") != "factorized" or model.get("position_shape"):
        return model
    shape = getattr(tasks.build(recipe.get("task", {})), "position_shape", None)
    return model if shape is None else {**model, "position_shape": list(shape)}


def _train_config(recipe: Mapping[str, Any]) -> type[Any]:
    """Return the class of the `[train]` table of a recipe.

    Classifiers on a memory task have `MemoryCurriculumConfig`, tasks with `train.curriculum` the class that it names,
    all others `TrainConfig`.

    Raises:
        ConfigError: the curriculum is unknown, or does not support the task.
    """
    name, table = recipe.get("task", {}).get("name"), recipe.get("train", {})
    if name == "memory" and "classes" in recipe.get("model", {}):
        return MemoryCurriculumConfig
    if "curriculum" in table:
        of_task = next((config for config, known in _CURRICULA.values() if name in known), None)
        config, known = _CURRICULA.get(table["curriculum"], (of_task, (name,)))
        if config is None or name not in known:
            words = {curriculum: " and ".join(tasks) for curriculum, (_, tasks) in _CURRICULA.items()}
            choices = ", ".join(f"{curriculum!r} for {tasks}" for curriculum, tasks in words.items())
            raise ConfigError(
                f"train.curriculum = {table['curriculum']!r}: not available for task.name = {name!r}; known: {choices}"
            )
        return config
    return TrainConfig


def run(
    recipe: Mapping[str, Any] | None,
    folder: str | Path,
    *,
    resume: bool = False,
    progress: str | Display = "auto",
    until: int | None = None,
    track: str | None = None,
) -> Result:
    """Train the model of a recipe in a folder; with torchrun, every process calls this function.

    Args:
        recipe: see `resolve`. With `resume`, None or the fields to change: only length, intervals, threads, device and
            accumulation may differ from the recipe with which the run began.
        folder: of the run; created if it does not exist.
        resume: continue from the newest undamaged checkpoint, with results identical bit for bit.
        progress: `"auto"` (live on a terminal, else plain lines), `"live"`, `"plain"`, `"none"`, or your own display.
        until: stop after this step as after an interrupt, with a checkpoint, if the run has more steps; None: make all.
        track: tracker to which the lines of the log are sent as well: `"tensorboard"`, `"trackio"`, `"wandb"` or
            `"mlflow"`, see `longspan.train.tracking`; None: none.

    Raises:
        ConfigError: the recipe is invalid, differs from that of the resumed run, or does not fit `train.init`; or the
            tracker is unknown or not installed.
        DataError: the text is missing or cannot be read.
        CheckpointError: there is no run to resume, the folder has a run already, all checkpoints are damaged, or the
            disk cannot be written.
        DivergedError: the loss is not finite.
    """
    folder, display = Path(folder), make_display(progress)
    check_tracker(track)
    resolved = _resumed_recipe(folder, recipe or {}) if resume else resolve(recipe or {})
    config = from_dict(_train_config(resolved), resolved["train"], "train")
    group = join_group(config.device)
    with _caller_undisturbed(group, config.threads), _reserved(folder, resume, group) as start:
        display = display if group.main else Display()
        return _train(
            resolved, config, folder, resume, group=group, display=display, start=start, until=until, track=track
        )


@contextlib.contextmanager
def _reserved(folder: Path, resume: bool, group: Group) -> Iterator[Start]:
    """Lock the folder for this run; an error in the main process is raised in all processes."""
    with contextlib.ExitStack() as stack:
        start, problem = Start(), None
        if group.main:
            try:
                start = stack.enter_context(reserved(folder, resume=resume))
                if not resume and (checkpoints.list_checkpoints(folder / "checkpoints") or (folder / "model").is_dir()):
                    raise CheckpointError(f"{folder}: contains a run already; resume it, or choose another folder")
            except CheckpointError as error:
                problem = error
        if group.any(problem is not None):
            raise problem or CheckpointError(f"{folder}: the main process cannot train here; see its error message")
        yield start


def _train(
    resolved: dict[str, Any],
    config: Any,
    folder: Path,
    resume: bool,
    *,
    group: Group,
    display: Display,
    start: Start,
    until: int | None,
    track: str | None,
) -> Result:
    """Prepare task and model in the locked folder, train, and publish the model.

    Args:
        resolved: recipe with all defaults.
        config: its `[train]` table.
        folder: of the run.
        resume: continue from the newest checkpoint.
        group: processes of the run.
        display: progress display.
        start: marked as begun when everything has been checked.
        until: see `run`.
        track: name of a tracker, or None.
    """
    task = _prepared_task(resolved, folder, group)
    known = resolved["model"].setdefault("vocab_size", task.vocab_size)
    if known < task.vocab_size:
        raise ConfigError(
            f"model.vocab_size = {known}: the task has {task.vocab_size} token ids; leave it out to use that number"
        )
    if isinstance(config, CurriculumConfig):
        _check_staged(resolved, config)
    checkpoint = newest_sound(folder / "checkpoints", display) if resume else None
    if resume and checkpoint is None:
        display.message(f"{folder}: there is no checkpoint to resume from; training starts at step 0")
    model, warm_start = _initial_model(resolved, config, task, checkpoint, group)
    trainer = Trainer(model, task, config, folder, group=group, display=display)
    if checkpoint is not None:
        trainer.restore(checkpoint)
    carries = isinstance(config, TrainConfig) and any(stage.carries for stage in config.stage_configs)
    if carries and model.traits.streams and not model.traits.bounded:
        display.message(
            "the state of this model grows with the length of documents; set train.carry = false to start each segment "
            "from an empty state"
        )
    tracking = None
    if group.main:
        _begin(folder, resolved, start)
        tracking = open_tracking(track, folder, resolved, step=trainer.position.step, warn=display.message)
        if checkpoint is None:  # there may be one of an earlier start, which was killed before its first checkpoint
            (folder / SUMMARY).unlink(missing_ok=True)
        if warm_start is not None:
            warm_start.save(folder)
            display.message(warm_start.message())

    def publish() -> None:
        """Write the trained model to the folder `model`."""
        try:
            folders.write_folder(folder / "model", lambda filled: pretrained.publish(model, filled), folders.seal)
        except CheckpointError as error:
            raise CheckpointError(
                f"{error}; {checkpoints.last_good(folder / 'checkpoints')} and has the trained model; free disk space "
                "and resume"
            ) from None

    # publishing merges adapters into the weights, so models with adapters are evaluated first
    early = not hasattr(model, "export")
    result = trainer.fit(publish if early else None, until=until, tracking=tracking)
    if not early and group.main and trainer.trained:
        publish()
    if result.interrupted and trainer.trained:
        display.message(f"trained to step {result.step}, saved in {folder}; resume the run for the final evaluation")
    elif result.interrupted:
        display.message(f"stopped at step {result.step}, saved in {folder}; resume the run to continue")
    group.barrier()
    return result


def _prepared_task(resolved: dict[str, Any], folder: Path, group: Group) -> Any:
    """Build the task; the main process writes its files to the folder first."""
    if group.main and pretrained.is_pretrained(resolved):
        pretrained.write_tokenizer(resolved["model"], folder)
    task = tasks.build(resolved["task"])
    if group.main:
        task.prepare(folder)
    group.barrier()
    if not group.main:
        task.prepare(folder, main=False)
    return task


def _initial_model(
    resolved: dict[str, Any], config: Any, task: Any, checkpoint: Checkpoint | None, group: Group
) -> tuple[Any, WarmStart | None]:
    """Return the model of the checkpoint or a new one, on the device of the group, and what a new one took from
    `train.init`; None without one.
    """
    torch.manual_seed(config.seed)
    model = build_model(resolved["model"]) if checkpoint is None else checkpoint.model
    warm_start = None
    if config.init and checkpoint is None:
        model.to(DTYPES[config.dtype])
        warm_start = start_from(model, config.init, task, group)
    group.share_parameters(model.to(group.device, DTYPES[config.dtype]))
    return model, warm_start


def _begin(folder: Path, resolved: dict[str, Any], start: Start) -> None:
    """Write the recipe and the digests to the folder, when everything has been checked, and mark the run as begun."""
    # deleted first: a kill between writing the two files would leave the digests of an earlier recipe
    (folder / folders.DIGESTS).unlink(missing_ok=True)
    write_json(folder / "recipe.json", resolved)
    start.begun = True
    folders.seal_files(folder, ("recipe.json", "tokenizer.json"))
    if (folder / "model").is_dir():
        # left by an earlier end of this run; until it ends again, the newest checkpoint has the model
        folders.remove(folder / "model")


def _check_staged(resolved: dict[str, Any], config: CurriculumConfig) -> None:
    """Raise ConfigError if the model, task and curriculum of a recipe do not fit together."""
    if isinstance(config, (PasskeyCurriculumConfig, CopyCurriculumConfig)):
        if resolved["model"]["kind"] != "decoder" or "memory" in resolved["model"]:
            raise ConfigError(
                f"train.curriculum = {config.curriculum!r}: needs model.kind = 'decoder' without a table model.memory"
            )
        return
    memory = resolved["model"]["memory"]
    if memory["segment_length"] != resolved["task"]["segment_length"]:
        raise ConfigError(
            f"model.memory.segment_length = {memory['segment_length']}, but task.segment_length = "
            f"{resolved['task']['segment_length']}; set both to the same number, because a question must end a segment"
        )


def _resumed_recipe(folder: Path, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return the stored recipe of a run with the changed fields of `recipe`.

    Raises:
        ConfigError: a field differs that may not change when a run is resumed.
    """
    with renames.reading_saved():
        # a field that an older version did not have began with its default
        stored = resolve(stored_recipe(folder))
    recipe = renames.recipe(recipe)
    merged = {**stored, **recipe, **{name: {**stored[name], **recipe.get(name, {})} for name in TABLES}}
    resolved = resolve(merged)
    for name in TABLES:
        for key, value in resolved[name].items():
            began = stored[name].get(key, value)
            if value != began and not (name == "train" and key in FREE) and (name, key) != ("task", "cache"):
                raise ConfigError(
                    f"{name}.{key} = {value!r}, but the run in {folder} began with {began!r}; "
                    "resume with that value, or start a new run"
                )
    return resolved


@contextlib.contextmanager
def _caller_undisturbed(group: Group, threads: int) -> Iterator[None]:
    """Set the number of threads inside the context; restore it and the caller's random generators on exit."""
    before = torch.get_num_threads()
    if threads:
        torch.set_num_threads(threads)
    try:
        with torch.random.fork_rng([group.device.index or 0] if group.device.type == "cuda" else []):
            yield
    finally:
        torch.set_num_threads(before)
