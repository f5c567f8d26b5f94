"""Losses of the library's own models, as transformers defines them, over one call or a whole optimizer step.

The Trainer passes `num_items_in_batch`, the number of labels in all calls of a step, and then does not divide by the
number of calls. So a loss must be the sum over its call divided by that number, and an auxiliary loss, which has no
labels, is weighted by the share of its call.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from longspan.errors import ConfigError, DataError

_IGNORED = -100
_PROBLEMS = ("regression", "single_label_classification", "multi_label_classification")


def with_auxiliary(loss: Tensor, aux_losses: list[Tensor] | None, share: Tensor | float) -> Tensor:
    """Return a loss plus the auxiliary losses of its call times `share`."""
    if not aux_losses:
        return loss
    auxiliary = torch.stack(aux_losses).sum()
    return loss + (auxiliary * (share.to(auxiliary.device) if isinstance(share, Tensor) else share)).to(loss.device)


def counting(keywords: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keywords of a call that say which labels count, if they are set: num_items_in_batch, ignore_index."""
    return {name: keywords[name] for name in ("num_items_in_batch", "ignore_index") if keywords.get(name) is not None}


def share_of_step(
    labels: Tensor, num_items_in_batch: Tensor | int | None = None, ignore_index: int = _IGNORED
) -> Tensor | float:
    """Return the fraction of a step's labels that belong to one call; 1 if the call is the whole step.

    Args:
        labels: of this call.
        num_items_in_batch: number of labels of the step; None = the call is the whole step.
        ignore_index: the label that does not count.
    """
    if num_items_in_batch is None:
        return 1.0
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(labels.device)
    return (labels != ignore_index).sum() / num_items_in_batch


def next_labels(labels: Tensor, shift_labels: Tensor | None) -> Tensor:
    """Return the labels that a causal model is scored on: all but the first, or `shift_labels` if given."""
    return labels[..., 1:] if shift_labels is None else shift_labels


def classification_loss(
    loss_function: Callable[..., Tensor],
    logits: Tensor,
    labels: Tensor,
    config: Any,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = _IGNORED,
) -> Tensor:
    """Return the loss of a classifier by `config.problem_type`.

    If that is None, the first labels decide: squared error for num_labels = 1, one binary decision per label for
    floats, bools or rows of `num_labels` labels, and otherwise cross entropy.

    Args:
        loss_function: `ForSequenceClassificationLoss` of transformers.
        logits: (batch, num_labels).
        labels: regression (batch,) or (batch, num_labels); single label (batch,) or (batch, 1), -100 is ignored;
            multi-label (batch, num_labels) of 0 and 1.
        config: its `problem_type` is set.
        num_items_in_batch: number of labels of the step.
        ignore_index: the label that is ignored instead of -100.

    Raises:
        ConfigError: an unknown `problem_type`.
        DataError: labels of a wrong shape, or class numbers that do not exist.
    """
    labels = labels.to(logits.device)
    problem = _problem(labels, config.num_labels) if config.problem_type is None else config.problem_type
    if problem not in _PROBLEMS:
        raise ConfigError(f"problem_type = {problem!r}: must be {', '.join(_PROBLEMS[:-1])} or {_PROBLEMS[-1]}")
    _check_labels(labels, logits, problem, ignore_index)
    # set only after the check, so that wrong labels do not decide it
    config.problem_type = problem
    wide = logits if logits.element_size() >= 4 else logits.float()
    if problem == "single_label_classification":
        counted = {"num_items_in_batch": num_items_in_batch, "ignore_index": ignore_index}
        return loss_function(labels=labels.long(), pooled_logits=wide, config=config, **counted)
    mean = loss_function(labels=labels.reshape(logits.shape).to(wide.dtype), pooled_logits=wide, config=config)
    return mean * share_of_step(labels, num_items_in_batch)


def _problem(labels: Tensor, num_labels: int) -> str:
    """Return the problem type for labels, as transformers infers it;
    integer rows of `num_labels` labels are multi-label too.
    """
    if num_labels == 1:
        return "regression"
    several = labels.ndim == 2 and labels.shape[1] == num_labels
    if labels.is_floating_point() or labels.dtype == torch.bool or several:
        return "multi_label_classification"
    return "single_label_classification"


def _check_labels(labels: Tensor, logits: Tensor, problem: str, ignore_index: int) -> None:
    """Raise a DataError if the labels do not fit the logits and the problem type."""
    rows, width = logits.shape
    single = problem == "single_label_classification"
    # one number per row may also have the shape (batch, 1)
    column = single or width == 1
    allowed = [(rows,), (rows, 1)] if column else [(rows, width)]
    if tuple(labels.shape) not in allowed:
        hint = "; set problem_type = 'multi_label_classification' for several labels per row" if single else ""
        raise DataError(f"labels have shape {tuple(labels.shape)}, expected {allowed[0]} for {problem}{hint}")
    if not single:
        return
    if labels.is_floating_point():
        raise DataError(f"labels are {labels.dtype}, expected integers for {problem}")
    if labels.device.type == "cpu" and labels.numel():
        # only on the CPU, because on another device the check would wait for it
        bad = (labels != ignore_index) & ((labels < 0) | (labels >= width))
        if bool(bad.any()):
            raise DataError(f"label {int(labels[bad][0])}: must be from 0 to {width - 1}, as num_labels is {width}")
