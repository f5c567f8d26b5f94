"""The table of what the conversion of each layer costs, for `convert` and `transfer` with `--layers auto:N`."""

from collections.abc import Collection, Mapping
from typing import Any

from longspan.cli.console import console, print_table


def print_ranking(ranking: Mapping[str, Any], softmax_layers: Collection[int]) -> None:
    """Print the layers by what their conversion costs.

    Args:
        ranking: plain data, see `longspan.hf.ranking.LayerRanking.to_dict`.
        softmax_layers: layers that keep softmax.
    """
    from longspan.report import Table

    console().print(f"nats per token when one layer alone is converted, before training, {ranking['tokens']:,} tokens:")
    rows = [
        [
            str(cost["layer"]),
            f"{cost['divergence']:.4g}",
            f"{cost['loss_increase']:+.4f}",
            "softmax kept" if cost["layer"] in softmax_layers else "",
        ]
        for cost in ranking["costs"]
    ]
    columns = ["layer", "divergence", "loss", ""]
    print_table(Table(columns=columns, rows=rows, right=(0, 1, 2)))
