"""Make the variants of the claim `transfer`, and read the held-out documents with them; both are resumed."""

import functools
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from longspan.contract.branches import Branch, only_branch
from longspan.experiments.claims.runs import measure_once, read_recipe, train_or_resume, trained_seconds
from longspan.experiments.claims.transfer.plan import ORIGINAL, Plan, Variant
from longspan.experiments.claims.transfer.texts import KINDS, Kind, Texts
from longspan.stream import StreamSession

CHUNK = 512
"""tokens per call of a model"""
WHOLE, NO_MEMORY, NO_LOCAL = "whole", "no memory", "no local attention"
"""Readings of a model: as it is, and with one of its branches left out."""
_BRANCHES: dict[str, Branch | None] = {WHOLE: None, NO_MEMORY: "local", NO_LOCAL: "memory"}

DocumentRecord = dict[str, Any]
"""A reading of a document: `nats` and `tokens`, totals by range of positions; `state`, bytes; `seconds` of the CPU."""
Readings = dict[str, dict[Kind, list[DocumentRecord]]]
"""Records of a model by reading and kind of text, in the order of the documents."""


class Setting(NamedTuple):
    """What all variants share.

    Attributes:
        folder: of the claim.
        plan: its sizes.
        original: folder of the pretrained model.
        texts: to learn from and to read.
        documents: token ids (tokens,) of the held-out documents by kind.
    """

    folder: Path
    plan: Plan
    original: Path
    texts: Texts
    documents: Mapping[Kind, list[Tensor]]


def save_original(folder: Path, *, small: bool) -> Path:
    """Write the pretrained model and its tokenizer to `folder/original`, unless an earlier call did; return the path.

    Args:
        folder: of a claim.
        small: a model that is trained from nothing in a second, instead of SmolLM2-135M-Instruct.
    """
    from longspan.experiments.bundled_models import open_smollm
    from longspan.experiments.small_models import open_small_llama

    original, done = folder / "original", folder / "original.complete"
    if not done.is_file():
        opened = open_small_llama(folder / "small-llama") if small else open_smollm()
        opened.model.save_pretrained(original)
        opened.tokenizer.save_pretrained(original)
        done.touch()
    return original


# -- training ------------------------------------------------------------------------------------------------------


def train(variant: Variant, setting: Setting) -> dict[str, Any]:
    """Train a variant, or continue its training; return what is reported of it.

    Returns:
        `seconds` of training and, of a transfer, its report (`TransferReport.to_dict`).

    Raises:
        KeyboardInterrupt: the training was interrupted, and saved.
    """
    if variant.training == "none":
        return {"seconds": 0.0}
    run = setting.folder / variant.folder / "model"
    if variant.training == "tuning":
        train_or_resume(_tuning(variant, setting), run)
        return {"seconds": trained_seconds([run])}
    from longspan.hf.transfer_layer import TransferConfig
    from longspan.train.transfer import TransferSettings, run_transfer

    plan = setting.plan
    settings = TransferSettings(
        model=str(setting.original),
        text=str(setting.texts.training),
        to=variant.mixer,
        fields=dict(variant.fields),
        length=plan.length,
        batch=plan.batch,
        held_out=4 * plan.batch,
        keep_softmax=variant.softmax,
        distill=plan.distill,
        config=TransferConfig(loss=variant.loss, steps=plan.steps, lr=variant.lr or plan.lr, schedule="cosine", seed=0),
    )
    progress = "live" if sys.stderr.isatty() else "none"
    outcome = run_transfer(settings, run, checkpoint_every=25, eval_every=50, log_every=5, progress=progress)
    if outcome.report is None:
        raise KeyboardInterrupt
    return outcome.report


def _tuning(variant: Variant, setting: Setting) -> dict[str, Any]:
    """Return the recipe that tunes the pretrained model in segments of a recurrent memory."""
    plan, segment = setting.plan, variant.fields["segment_length"]
    parts = plan.length // segment
    train = {"segment_length": segment, "lanes": plan.batch, "accumulation": 1, "bptt_segments": parts}
    train |= {"steps": plan.steps + plan.distill, "final_eval_tokens": 1000, "checkpoint_every": 25}
    recipe = read_recipe("pretrained", **train)
    recipe["model"] |= {"source": str(setting.original), "memory": {**variant.fields, "bptt_segments": parts}}
    recipe["task"]["source"] = str(setting.texts.training)
    return recipe


# -- reading -------------------------------------------------------------------------------------------------------


def is_trained(variant: Variant, folder: Path) -> bool:
    """Return whether a variant is ready to be opened in the folder of the claim: its training is finished, if any."""
    run = folder / variant.folder / "model"
    # both are written last
    finished = run / "model" if variant.training == "tuning" else run / "config.json"
    return variant.training == "none" or finished.exists()


def open_variant(variant: Variant | None, folder: Path, original: Path) -> Any:
    """Open a variant, or the original (None), as a model that a `StreamSession` reads with.

    Args:
        variant: whose training is finished.
        folder: of the claim.
        original: folder of the pretrained model.
    """
    from longspan import hf
    from longspan.hf.decoder import ConvertedDecoder, load_converted, open_pretrained
    from longspan.hf.opening import convert_exactly
    from longspan.train import load_run

    if variant is not None and variant.training != "none":
        run = folder / variant.folder / "model"
        return load_run(run)[0] if variant.training == "tuning" else load_converted(run).model
    model: Any = open_pretrained(str(original)).model
    if variant is None:
        convert_exactly(model)
    else:
        hf.convert(model, variant.mixer, **variant.fields)
    return ConvertedDecoder(model.eval())


def readings(variant: Variant | None, setting: Setting) -> Readings:
    """Read the held-out documents with a variant, or with the original (None).

    Each document is read once: its record is a file of its own. With a branch left out, the first `long_documents` are
    read; local attention is left out over `tokens` tokens.
    """
    plan = setting.plan
    opened = functools.cache(lambda: open_variant(variant, setting.folder, setting.original))
    further = plan.long_tokens if variant is not None and variant.long else plan.tokens
    folder = setting.folder / (ORIGINAL if variant is None else variant.folder)
    measured: Readings = {}
    for reading in (WHOLE, NO_MEMORY, NO_LOCAL) if variant is not None and variant.branches else (WHOLE,):
        count = plan.documents if reading == WHOLE else plan.long_documents
        for kind in KINDS:
            for index, tokens in enumerate(setting.documents[kind][:count]):
                long = index < plan.long_documents and reading != NO_LOCAL
                text = tokens[: further if long else plan.tokens]
                path = folder / "readings" / f"{reading.replace(' ', '-')}-{kind}-{index}-{len(text)}.json"
                record = measure_once(path, functools.partial(_read, opened, text, plan.edges, _BRANCHES[reading]))
                measured.setdefault(reading, {}).setdefault(kind, []).append(record)
    return measured


def _read(opened: Callable[[], Any], tokens: Tensor, edges: tuple[int, ...], branch: Branch | None) -> DocumentRecord:
    """Read a document (tokens,) from its start, and return its record; `branch` is the only one that is used."""
    model, started = opened(), time.process_time()
    context: AbstractContextManager[None] = nullcontext() if branch is None else only_branch(model, branch)
    with context:
        session = StreamSession(model, chunk=CHUNK)
        # the first token of a stream has no context, so it does not count
        nats = session.feed(tokens, losses=True).double().cpu().numpy()[1:]
    bins = np.searchsorted(edges, np.arange(1, len(tokens)), side="right") - 1
    count = len(edges) - 1
    return {
        "nats": np.bincount(bins, weights=nats, minlength=count)[:count].tolist(),
        "tokens": np.bincount(bins, minlength=count)[:count].tolist(),
        "state": session.nbytes,
        "seconds": time.process_time() - started,
    }
