"""Draw the picture of the README: which keys each query reads, measured for eight mechanisms.

`python tools/draw_patterns.py docs/images/patterns.png`
"""

import sys
from pathlib import Path
from typing import Any

import torch

import longspan as ls
from longspan.mixers.probe import influence
from longspan.report.figures import Panel, pattern_figure, to_png

LENGTH, HEADS = 64, 2
FORMS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("window", {"window": 12, "sinks": 2}),
    ("sparse", {"pattern": "fixed", "stride": 8, "summary": 2}),
    ("adaptive_span", {"max_span": 32, "ramp": 8, "initial": 0.4}),
    ("bp", {"k": 2, "max_level": 4}),
    ("lsh", {"bucket_size": 8, "num_buckets": 4, "num_hashes": 1}),
    ("routing", {"num_clusters": 4, "window": 8}),
    ("infini", {"segment": 12}),
    ("memorizing", {"window": 12, "max_memories": 64, "k": 4}),
)


def panel(name: str, fields: dict[str, Any]) -> Panel:
    """Measure the pattern of one head of a mechanism."""
    torch.manual_seed(0)
    mixer = ls.mixers.build(name, dim=HEADS * 8, num_heads=HEADS, **fields)
    return Panel(name, influence(mixer, LENGTH, seed=0)[0].tolist())


def main() -> None:
    """Write the picture to the path of the command line."""
    path = Path(sys.argv[1])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(to_png(pattern_figure([panel(name, fields) for name, fields in FORMS])))


if __name__ == "__main__":
    main()
