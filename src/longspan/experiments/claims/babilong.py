"""`babilong`: a fact hidden in real text, asked of a small recurrent memory and of converted pretrained models.

The recurrent memory is trained for the task on at most five segments. Pretrained models are not: they complete
"Mary is in the", and the likeliest of the six places is their answer. The converted ones are those of the claim
`transfer`, in the folder next to this claim's; those that it has not trained yet are left out.

BABILong (Kuratov et al. 2024) hides the facts of bAbI in PG-19. Here facts and questions are those of
`tasks/memory.py`, and the noise is held-out State of the Union speeches.
"""

import functools
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from longspan.experiments.claims import rmt
from longspan.experiments.claims.base import Claim, Figure, Outcome, Say
from longspan.experiments.claims.continued import Criterion, criteria_text, grade
from longspan.experiments.claims.runs import measure_once, trained_seconds
from longspan.experiments.claims.transfer.plan import ORIGINAL, Variant
from longspan.experiments.claims.transfer.plan import PLANS as TRANSFER_PLANS
from longspan.experiments.claims.transfer.plan import Plan as TransferPlan
from longspan.experiments.claims.transfer.reading import is_trained, open_variant, save_original
from longspan.report import Table
from longspan.report.tables import signed
from longspan.stream import StreamSession
from longspan.tasks import MemoryTask
from longspan.tasks.memory import PLACES, MemoryConfig
from longspan.train import Interval
from longspan.train.memory_evaluation import wilson
from longspan.train.statistics import share_bootstrap

RECURRENT, WINDOW = "trained recurrent memory", "window"
GOAL = 0.9
"""accuracy of the recurrent memory at every length"""
SEGMENT = 499
"""tokens per segment of the recurrent memory, where the recipe is not changed"""

Answers = dict[str, dict[int, str]]
"""By model and tokens per text: per text a 1 for the right answer, a 0 for a wrong one."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Sizes of the claim."""

    transfer: TransferPlan
    """of the claim whose models are asked"""
    lengths: tuple[int, ...]
    """tokens per text"""
    count: int
    """texts per length"""
    steps: int
    """of the training of the recurrent memory"""
    window: int
    """tokens that local attention sees; longer texts show what else a model retrieves"""
    segment: int = SEGMENT
    recipe: tuple[str, ...] = ()
    """further assignments of the training of the recurrent memory"""
    noise_documents: int = 12
    """speeches whose sentences are noise"""


PLANS: dict[str, Plan] = {
    "tiny": Plan(
        transfer=TRANSFER_PLANS["tiny"],
        lengths=(64, 192),
        count=2,
        steps=2,
        window=128,
        segment=96,
        recipe=rmt.TINY_RECIPE,
        noise_documents=2,
    ),
    "small": Plan(transfer=TRANSFER_PLANS["small"], lengths=(512, 1024, 2048), count=12, steps=450, window=512),
    "full": Plan(transfer=TRANSFER_PLANS["full"], lengths=(512, 2048, 8192, 16_384), count=24, steps=450, window=512),
}
"""At `full` a pretrained model reads 650,000 tokens in half an hour, the original 260,000; all variants of `transfer`
take five hours. The recurrent memory is trained in 7 minutes."""


# -- asking --------------------------------------------------------------------------------------------------------


def ask_recurrent(folder: Path, plan: Plan, length: int) -> dict[str, Any]:
    """Return the answers of the recurrent memory to texts of the whole segments nearest to `length` tokens."""
    record = rmt.ask_once(folder, "detect", max(round(length / plan.segment), 1), plan.count, 0)
    return {"answers": record["answers"], "seconds": record["seconds"]}


def ask_pretrained(model: Any, task: MemoryTask, length: int, count: int) -> dict[str, Any]:
    """Return the answers of a pretrained model to texts that are the same for all models with its tokenizer.

    Args:
        model: that streams.
        task: with the tokenizer of the model.
        length: tokens of a text with its question.
        count: number of texts.
    """
    started, answers = time.process_time(), ""
    for index in range(count):
        sample = task.sample("test", 1, [index], kind="detect", size=length, negatives=False)
        name = sample.what.question.removeprefix("Where is ").removesuffix("?")
        text = np.concatenate([*(segment.tokens for segment in sample), task.encode(f" {name} is in the")])
        session = StreamSession(model, chunk=512)
        session.feed(text.tolist())
        nats = [float(session.fork().feed(task.encode(f" {place}").tolist(), losses=True).sum()) for place in PLACES]
        answers += "01"[int(np.argmin(nats)) == sample.answer]
    return {"answers": answers, "seconds": time.process_time() - started}


def _measure(folder: Path, plan: Plan, say: Say) -> Outcome:
    """Ask all models; a second call resumes from the folder."""
    # where the claim transfer of the same size works
    models = folder.with_name(folder.name.replace("babilong", "transfer"))
    own = not (models / "original.complete").is_file()
    original = save_original(folder, small=plan.transfer.small_model) if own else models / "original"
    run, answers, seconds = folder / "recurrent", Answers(), 0.0
    rmt.train_once(run, "detect", 0, plan.steps, *plan.recipe)
    answers[RECURRENT] = {}
    for length in plan.lengths:
        record = ask_recurrent(run, plan, length)
        answers[RECURRENT][length], seconds = record["answers"], seconds + record["seconds"]
    say(f"{RECURRENT}: {_counts(answers[RECURRENT])}")
    task = functools.cache(lambda: _task(original, plan))
    for variant in (None, *plan.transfer.variants):
        if variant is not None and not is_trained(variant, models):
            continue
        name = ORIGINAL if variant is None else variant.folder
        model = functools.cache(functools.partial(open_variant, variant, models, original))
        # the original no further than its positions
        lengths = [length for length in plan.lengths if variant is not None or length <= plan.transfer.tokens]
        answers[name] = {}
        for length in lengths:
            path = folder / "answers" / f"{name}-{length}x{plan.count}.json"
            record = measure_once(path, functools.partial(_ask_opened, model, task, length, plan.count))
            answers[name][length], seconds = record["answers"], seconds + record["seconds"]
        say(f"{name}: {_counts(answers[name])}")
    return outcome(answers, plan, trained_seconds([run]) + seconds)


def _ask_opened(model: Callable[[], Any], task: Callable[[], MemoryTask], length: int, count: int) -> dict[str, Any]:
    """Open a pretrained model and the task, and return its answers."""
    return ask_pretrained(model(), task(), length, count)


def _task(original: Path, plan: Plan) -> MemoryTask:
    """Return the memory task with the tokenizer of the pretrained model."""
    from longspan.hf.decoder import open_tokenizer
    from longspan.tasks.tokenizers import borrow

    return MemoryTask(MemoryConfig(noise_documents=plan.noise_documents), tokenizer=borrow(open_tokenizer(original)))


def _counts(answers: Mapping[int, str]) -> str:
    """Describe the answers of a model at all lengths."""
    return ", ".join(f"{right.count('1')} of {len(right)} at {length:,} tokens" for length, right in answers.items())


# -- judging -------------------------------------------------------------------------------------------------------


def gain(answers: Answers, name: str, base: str, lengths: Iterable[int]) -> Interval | None:
    """Return by how much more often a model is right than another, over the texts that both were asked, with a paired
    interval; None if there are none.
    """
    both = [at for at in lengths if at in answers.get(name, {}) and at in answers.get(base, {})]
    ours, theirs = ("".join(answers[model][at] for at in both) for model in (name, base))
    if not ours:
        return None
    more = np.array([int(one) - int(other) for one, other in zip(ours, theirs, strict=True)])
    return share_bootstrap(more, np.ones(len(more)))


def criteria(answers: Answers, plan: Plan) -> list[Criterion]:
    """Return the criteria, which were written before any result."""
    recurrent = answers.get(RECURRENT, {})
    shares = {length: right.count("1") / len(right) for length, right in recurrent.items()}
    beyond = [length for length in plan.lengths if length > plan.window]
    converted = [variant for variant in plan.transfer.variants if variant.training == "transfer"]
    return [
        Criterion(
            what=f"The recurrent memory answers at least {GOAL:.0%} at every length",
            met=min(shares.values()) >= GOAL if {*shares} >= {*plan.lengths} else None,
            measured=_counts(recurrent) or "not measured",
        ),
        _better(answers, beyond, [variant for variant in converted if not variant.softmax], "in constant memory"),
        _better(answers, beyond, [variant for variant in converted if variant.softmax], "with softmax in some layers"),
    ]


def _better(answers: Answers, lengths: Iterable[int], variants: list[Variant], how: str) -> Criterion:
    """Ask whether a converted model is right more often than window and sinks in texts beyond the window; undecided
    while none is and one was not asked.
    """
    lengths = list(lengths)
    gains = {variant.name: gain(answers, variant.folder, WINDOW, lengths) for variant in variants}
    known = {name: interval for name, interval in gains.items() if interval is not None}
    met = True if any(interval.low > 0 for interval in known.values()) else False if len(known) == len(gains) else None
    measured = "; ".join(f"{name} {signed(interval)}" for name, interval in known.items())
    return Criterion(
        what=f"Beyond the window, a model converted {how} is right more often than window and sinks",
        met=met if gains else None,
        measured=measured or "not measured",
    )


def outcome(answers: Answers, plan: Plan, seconds: float) -> Outcome:
    """Judge the answers: verdict, and a table of all models by length."""
    from longspan.experiments.small_models import ABOUT

    conditions = criteria(answers, plan)
    names = {variant.folder: variant.name for variant in plan.transfer.variants}
    rows = [
        [names.get(name, name), *(_cell(by_length.get(length, "")) for length in plan.lengths)]
        for name, by_length in answers.items()
    ]
    missing = [name for folder, name in names.items() if folder not in answers]
    left_out = f"Not asked: {', '.join(missing)}; run `longspan reproduce transfer` first. " if missing else ""
    model = f"a Llama of {ABOUT}" if plan.transfer.small_model else "SmolLM2-135M-Instruct"
    return Outcome(
        verdict=grade(conditions),
        figures=[
            Figure(f"right answers, {names.get(name, name)}", "", _counts(by_length))
            for name, by_length in answers.items()
        ],
        size=f"{plan.count} texts per length, one fact at a random place, six possible answers; recurrent memory "
        f"trained for {plan.steps} steps on at most 5 segments of {plan.segment} tokens of its own; {model}, converted "
        "by the claim transfer, not trained for the task",
        note=left_out + criteria_text(conditions),
        data={"answers": {name: {str(at): right for at, right in by.items()} for name, by in answers.items()}},
        tables=[
            Table(
                columns=["model", *(f"{length:,} tokens" for length in plan.lengths)],
                rows=rows,
                right=list(range(1, len(plan.lengths) + 1)),
                caption="Right answers by length of the text, with 95 % Wilson intervals; chance is 1/6.",
            )
        ],
        seconds=seconds,
    )


def _cell(right: str) -> str:
    """Format the share of right answers; a dash if none were asked."""
    if not right:
        return "–"
    share = wilson(right.count("1"), len(right))
    return f"{share.value:.2f} [{share.low:.2f}, {share.high:.2f}]"


BABILONG = Claim(
    name="babilong",
    system="Recurrent memory and converted models",
    source="Kuratov et al. 2024 (BABILong), section 3; Bulatov et al. 2023",
    text="A fact hidden in a long text is found by a small recurrent memory that was trained for it, and, beyond the "
    "window, by a pretrained model after attention transfer.",
    measure=_measure,
    minutes={"tiny": 0.1, "small": 15, "full": 330},
    plans=PLANS,
)
