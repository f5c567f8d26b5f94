"""`longspan eval --benchmark`: benchmarks of long contexts by lm-evaluation-harness."""

import json

from longspan.cli.console import console, print_table
from longspan.cli.evaluate import EvaluateOptions


def evaluate_benchmark(options: EvaluateOptions) -> None:
    """Evaluate a run by a benchmark of long contexts, and print its figures.

    Raises:
        ConfigError: an unknown benchmark.
        DataError: its texts cannot be loaded.
        UnsupportedError: lm-eval is not installed, or the model does not stream.
    """
    from longspan.harness import find_preset, run_preset
    from longspan.report import Table

    preset = find_preset(options.benchmark)
    scores = run_preset(options.run, preset)
    if options.as_json:
        print(json.dumps([score._asdict() for score in scores], indent=2))
        return
    rows = [
        (
            score.task,
            score.length,
            score.metric,
            f"{score.value:.3f}",
            "" if score.error is None else f"{score.error:.3f}",
        )
        for score in scores
    ]
    out = console()
    limit = "all documents" if preset.limit is None else f"{preset.limit} documents per task"
    out.print(f"{options.run}: {options.benchmark}, {limit}", markup=False)
    print_table(Table(columns=("task", "length", "metric", "value", "standard error"), rows=rows, right=(3, 4)), out)
