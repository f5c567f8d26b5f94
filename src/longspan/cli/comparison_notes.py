"""Describes in words how a comparison was made, for the terminal before it begins and for its report."""

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from longspan.comparison import Compared
    from longspan.comparison.report import Setting
    from longspan.comparison.training import Plan
    from longspan.train.workers import Workers


def differences_of(compared: "Compared") -> list[str]:
    """Name what differs between the trainings of runs, beside the models: then their order is that of runs."""
    from longspan.comparison.advice import UNEQUAL

    names = {"text": "texts", "init": "starts", "tokens": "numbers of tokens"}
    trainings = [compared.record(name)["training"] for name in compared.names]
    different = [words for key, words in names.items() if len({str(training[key]) for training in trainings}) > 1]
    seconds = [training["seconds"] for training in trainings]
    # measured times are never equal
    if max(seconds) > UNEQUAL * min(seconds):
        different.append("times")
    if not different or len(trainings) < 2:
        return []
    return [f"The runs were trained with different {', '.join(different)}, so this is an order of runs, not of models."]


def plan_lines(plan: "Plan", workers: "Workers") -> list[str]:
    """Say what will be trained, before it begins."""
    from longspan.cli.console import clock

    lines, training = [], plan.training
    unit = "bytes" if training.is_text else "tokens"
    for job in plan.jobs:
        if job.seed:
            continue
        cost, rows = plan.costs[job.name], job.recipe["train"]
        tokens = rows["lanes"] * rows["segment_length"]
        lines.append(
            f"  {job.name}: {job.steps:,} steps of {tokens:,} {unit}, {clock(job.steps * cost.seconds)}, "
            f"from {job.recipe['train']['init'] or 'random weights'}"
        )
    total = plan.seconds / min(workers.count, len(plan.jobs))
    seeds = f" with {training.seeds} seeds" if training.seeds > 1 else ""
    head = f"{len(plan.jobs)} runs{seeds}, {workers.count} at a time: about {clock(total)} of training, then evaluation"
    failed = [f"  {name}: left out: {why}" for name, why in plan.failures.items()]
    return [head, *lines, *failed]


def setting_of(compared: "Compared", plan: "Plan", workers: "Workers", *, data: str, command: str) -> "Setting":
    """Describe how models were trained.

    Args:
        compared: the measured models.
        plan: of their trainings.
        workers: that trained them.
        data: the text or the task, as the user named it.
        command: command line of this comparison.
    """
    from longspan.comparison.report import Setting

    training, model = plan.training, plan.jobs[0].recipe["model"]
    begin = "from random weights"
    if training.init:
        begin = f"continued from the start {training.init} (the weights of a small model that was trained before)"
    sizes = f"Models of {model['num_layers']} layers of {model['dim']}, {begin}, were trained on"
    how = [_of_text(plan, data, sizes), *_exceptions(plan)] if training.is_text else [_of_task(plan, data, sizes)]
    return Setting(
        title=f"Which model for {data}?",
        lead=f"{len(compared.runs)} of {len(training.models)} models, {text_of(compared)}.",
        how=[*how, machine(workers)],
        commands=[command],
        peaks={name: cost.peak for name, cost in plan.costs.items()},
        planned={job.name: job.steps * plan.costs[job.name].seconds for job in plan.jobs},
    )


def _duration(plan: "Plan") -> str:
    """Say how long every run was trained."""
    from longspan.train.planning import duration

    if plan.training.seconds is None:
        return f"Every run had {plan.jobs[0].steps:,} steps."
    return (
        f"Every run had about {duration(plan.training.seconds)} of training on one thread, as many steps as this time "
        "allows by steps measured before."
    )


def _of_text(plan: "Plan", data: str, sizes: str) -> str:
    """Say how models were trained on a text."""
    from longspan import tasks

    training = plan.training
    documents = tasks.build(plan.jobs[0].recipe["task"]).documents("train")
    return (
        f"{sizes} {data}: {documents.lengths.sum():,} bytes of {len(documents):,} documents, besides every tenth "
        f"document, which is held out (or the last tenth, if there is one document). {_duration(plan)} A step reads "
        f"{training.length:,} bytes: one piece, or {training.lanes} documents side by side if the state is carried. "
        "The learning rate is constant and falls to zero in the last tenth."
    )


def _of_task(plan: "Plan", data: str, sizes: str) -> str:
    """Say how models were trained on a task."""
    recipe = plan.jobs[0].recipe
    rows, length = recipe["train"]["lanes"], recipe["train"]["segment_length"]
    fields = ", ".join(f"{name} = {value}" for name, value in recipe["task"].items())
    return (
        f"{sizes} samples of the task {data} ({fields}), {rows} of {length:,} tokens per step, each from its first to "
        f"its last token with gradients through the whole sample. {_duration(plan)} The learning rate is constant and "
        "falls to zero in the last tenth. Tests are other samples of the same task, of this length and longer."
    )


def _exceptions(plan: "Plan") -> list[str]:
    """Name the models with another start, and the rule by which runs were stopped early."""
    from longspan.comparison.results import EQUAL
    from longspan.comparison.training import RELATIVE, RELATIVE_OF

    lines = []
    if RELATIVE in {job.recipe["train"]["init"] for job in plan.jobs}:
        lines.append(
            f"Models with relative positions continue from the start {RELATIVE}, which is the start {RELATIVE_OF} "
            "after further training with them; from rotary positions they would lose several bits first."
        )
    if plan.training.stop_hopeless:
        lines.append(
            "A model was stopped at half of its steps if twice the fall of its last quarter would leave its loss "
            f"{EQUAL} bits above that of the best one at that time."
        )
    return lines


def text_of(compared: "Compared") -> str:
    """Describe what all models read."""
    from longspan.comparison.answers import ComparedAnswers

    record = compared.record(compared.best)
    count = len(record["names"])
    if isinstance(compared, ComparedAnswers):
        lengths = f"{compared.lengths[0]:,} to {compared.lengths[-1]:,} tokens"
        return f"tested on {count:,} samples of each length, {lengths}"
    return f"read on {sum(record['bytes']):,} held-out bytes of {count:,} document{'s' if count > 1 else ''}"


def machine(workers: "Workers | None" = None) -> str:
    """Describe the machine, the versions, and the workers that trained, if any."""
    import platform

    import torch

    from longspan.version import __version__

    at_once = ""
    if workers is not None and workers.executor is not None:
        at_once = "; runs were spread over a cluster, and times are those of the machines that they ran on"
    elif workers is not None and workers.count > 1:
        at_once = f"; {workers.count} runs at a time, so times are longer than those of one alone"
    return (
        f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, torch "
        f"{torch.__version__}, longspan {__version__}{at_once}."
    )
