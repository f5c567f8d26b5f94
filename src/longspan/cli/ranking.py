"""The table of what the conversion of each layer costs, for `convert` and `transfer` with `--layers auto:N`."""

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from longspan.cli.console import print_table

if TYPE_CHECKING:
    from longspan.report import Table


def print_ranking(ranking: Mapping[str, Any], softmax_layers: Collection[int]) -> None:
    """Print the layers by what their conversion costs; arguments as in `ranking_table`."""
    print_table(ranking_table(ranking, softmax_layers))


def ranking_table(ranking: Mapping[str, Any], softmax_layers: Collection[int]) -> "Table":
    """Return the table of layers by what their conversion costs.

    Args:
        ranking: plain data, see `longspan.hf.ranking.LayerRanking.to_dict`.
        softmax_layers: layers that keep softmax.
    """
    from longspan.report import Table

    rows = [
        (
            str(cost["layer"]),
            f"{cost['divergence']:.4g}",
            f"{cost['loss_increase']:+.4f}",
            "softmax kept" if cost["layer"] in softmax_layers else "",
        )
        for cost in ranking["costs"]
    ]
    caption = f"Nats per token when one layer alone is converted, before training, {ranking['tokens']:,} tokens"
    return Table(columns=("layer", "divergence", "loss", ""), rows=rows, right=(0, 1, 2), caption=caption)
