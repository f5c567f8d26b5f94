"""Conversion with `layers = "auto:N"`: the N layers whose conversion costs most keep softmax."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from longspan.hf.convert import Report, mechanisms, revert
from longspan.hf.converted_config import CORE
from longspan.hf.families import attention_modules
from longspan.hf.opening import convert_exactly
from longspan.hf.ranking import check_automatic, rank_layers
from longspan.hf.transfer import Batch, Transfer
from longspan.models.wrappers import unwrapped


def keep_costliest(model: Any, report: Report, count: int, data: Iterable[Batch]) -> Report:
    """Give the layers whose conversion costs most softmax again; undo the whole conversion if that fails.

    They become `full` (or `window` where they have a sliding window), which equals their attention and streams.

    Args:
        model: converted by `convert` in all layers.
        report: of this conversion.
        count: number of these layers.
        data: text to rank the layers on, see `rank_layers`.

    Returns:
        The report of the whole.

    Raises:
        ConfigError: no layer would be left.
        DataError: there is no text, or the conversion changes nothing on it.
        UnsupportedError: the model is bidirectional, has adapters, or no linear output layer.
    """
    try:
        check_automatic(count, len(report.layers))
        with Transfer(model, None, report.layers) as transfer:
            ranking = rank_layers(transfer, data)
    except BaseException:
        revert(model)
        raise
    softmax_layers = ranking.costliest(count)
    revert(model, softmax_layers)
    inner = unwrapped(model)
    convert_exactly(inner, softmax_layers)
    cores = mechanisms(inner)
    return replace(
        report,
        layers=tuple(layer for layer in report.layers if layer not in softmax_layers),
        new_parameters=tuple(name for name, _ in model.named_parameters() if f".{CORE}." in name),
        bounded=not attention_modules(inner).others and all(core.traits.bounded for core in cores.values()),
        softmax_layers=softmax_layers,
        ranking=ranking,
    )
