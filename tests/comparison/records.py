"""Hand-made measurements of runs."""

import math
from collections.abc import Sequence
from typing import Any

from longspan.tasks.base import Array

LOG2 = math.log(2)


def record(bits: Sequence[float] | Array, **fields: Any) -> dict[str, Any]:
    """A record of `measure_run` with a loss per document of 1,000 bytes, in bits per byte."""
    nats = [value * 1000 * LOG2 for value in bits]
    names = [f"{index}.txt" for index in range(len(bits))]
    training = {
        "steps": 80,
        "planned": 80,
        "tokens": 8000,
        "seconds": 60.0,
        "memory": 10**8,
        "text": "book.txt",
        "init": "code",
        "seed": 0,
        "curve": [[step, 100 * step, float(step), 2.0] for step in range(10, 81, 10)],
    }
    return {
        "key": "",
        "folder": "runs/x",
        "text": "same",
        "names": names,
        "bytes": [1000] * len(bits),
        "blocks": "documents",
        "nats": nats,
        "units": [1000] * len(bits),
        "positions": {"edges": [0, 500, 1000], "nats": [[loss / 2, loss / 2] for loss in nats]},
        "distances": {"edges": [1, 256], "nats": [[0.0, 0.0]] * len(bits), "units": [[0, 0]] * len(bits)},
        "byte_entropy": 5.0,
        "reading": "its state carried through every document",
        "bytes_per_second": 1000.0,
        "carries": True,
        "parameters": 800_000,
        "flops": 2e6,
        "state": {"2048": 100, "65536": 100, "1048576": 100},
        "bounded": True,
        "bytes_per_token": 1.0,
        "mechanism": "window",
        "made_of": "window(window=256)",
        "training": training,
        **fields,
    }
