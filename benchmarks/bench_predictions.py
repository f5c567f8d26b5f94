"""What `longspan cost` and `longspan plan` predict, against what is measured: FLOPs, states, memory and time.

    python benchmarks/bench_predictions.py [--only NAME ...] [--plans] [-o FILE]

Every model is that of a recipe lm/NAME, a hybrid, or a small Llama converted to a mechanism. Measured are, each in a
fresh process of one thread:

    FLOPs     counted by torch while a text of 1,024 tokens is read              within 2 %
    state     bytes of the state after it                                        exact
    tensors   peak of resident memory in training steps on rows of 3,072 tokens, above that after import and
              construction, where the allocator gives back what is freed; predicted by counting tensors of rows of
              1,024 and 2,048                                                    within 15 %
    process   the same with the allocator as it is; predicted by processes with rows of 1,024 and 2,048
                                                                                 within 15 %
    time      a training of 24 steps, by the rate of `cost --time`; and reading 8,192 tokens, by the rate at 2,048
                                                                                 within 2 times

For `tensors` MALLOC_MMAP_THRESHOLD_=65536 is set, as glibc otherwise keeps freed blocks. With --plans, what
`longspan plan` proposes for two needs is trained: memory inside its limit, time within 2 times.
"""

import argparse
import json
import os
import re
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent))
from tests.laws.checks.cost import COUNTED

from longspan import state as states
from longspan.config import read_toml
from longspan.cost import footprint
from longspan.models import build_model
from longspan.report import Table
from longspan.report.markdown import table_lines
from longspan.tasks.base import Documents
from longspan.tasks.text import TextDocument
from longspan.tasks.tokenizers import Bytes
from longspan.train import TrainConfig, evaluate_text
from longspan.train.distributed import Group
from longspan.train.document_source import DocumentSource
from longspan.train.planning import families
from longspan.train.process_memory import in_a_process, process_memory
from longspan.train.recipes import find_recipe
from longspan.train.speed import BASE, measure_speed
from longspan.train.step import Optimization
from longspan.train.training_memory import step_cost, text_training, training_memory

COUNT_LENGTH, ROW, READ, STEPS = 1_024, 3_072, 8_192, 24
CONVERSIONS = ("window", "infini", "window_linear", "associative", "gated_delta", "memorizing")
HYBRIDS: Mapping[str, list[dict[str, Any]]] = {
    "hybrid/window+full": [{"name": "window", "window": 128}] * 3 + [{"name": "full"}],
    "hybrid/delta+window": [{"name": "gated_delta"}, {"name": "window", "window": 128}] * 2,
    "hybrid/infini+linear": [{"name": "infini", "segment": 128}, {"name": "linear"}] * 2,
}
NEEDS = (
    (4_000_000, ("--length", "8k", "--memory", "1.5GB", "--time", "10min", "--mixers", "window,infini")),
    (200_000, ("--length", "64k", "--memory", "3GB", "--time", "5min", "--mixers", "transformer_xl,associative")),
)
"""bytes of the text to train on, and what is asked of a plan"""


def names() -> list[str]:
    """All models."""
    return [*(f"lm/{name}" for name in families()), *HYBRIDS, *(f"converted/{name}" for name in CONVERSIONS)]


def tables_of(name: str, folder: Path) -> tuple[dict[str, Any], TrainConfig]:
    """Return the table `[model]` of a model and the configuration of its training, one row per step.

    Args:
        name: of `names`.
        folder: for the files of a converted model.
    """
    if name.startswith("converted/"):
        from longspan.train import pretrained

        recipe = read_toml(find_recipe("pretrained.toml"))
        pretrained.register_kind()
        source = converted(name.removeprefix("converted/"), folder)
        table = {**recipe["model"], "source": str(source)}
    else:
        recipe = read_toml(find_recipe(f"{name if name.startswith('lm/') else 'lm/window'}.toml"))
        table = {**recipe["model"], "vocab_size": 256}
        if name in HYBRIDS:
            table["mixers"] = HYBRIDS[name]
    config = replace(text_training(recipe), lanes=1, accumulation=1, carry=False, bptt_segments=1)
    return table, config


def converted(mixer: str, folder: Path) -> Path:
    """Write a small Llama, converted to a mechanism, unless the folder has it."""
    import transformers

    from longspan import hf

    target = folder / mixer
    if not target.exists():
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=512,
            hidden_size=128,
            intermediate_size=352,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=4096,
        )
        model = transformers.LlamaForCausalLM(config)
        fields: dict[str, Any] = {"segment": 128} if mixer in ("infini", "associative") else {}
        fields = {"window": 128} if mixer in ("window", "window_linear") else fields
        hf.convert(model, mixer, **fields)
        model.save_pretrained(target)
    return target


def text_of(count: int, length: int) -> Documents:
    """Random bytes: `count` documents of a length."""
    generator, tokenizer = torch.Generator().manual_seed(1), Bytes()
    drawn = [torch.randint(0, 256, (length,), generator=generator, dtype=torch.uint8).numpy() for _ in range(count)]
    return Documents([TextDocument(text, tokenizer) for text in drawn], [str(index) for index in range(count)])


def flops_and_state(model: Any) -> dict[str, list[float] | None]:
    """Predicted and measured FLOPs of a text, and bytes of the state after it."""
    model.eval()
    tokens = torch.randint(0, 256, (1, COUNT_LENGTH), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=COUNTED) as counter:
        _, state = model(tokens, None)
    predicted = footprint(model, COUNT_LENGTH)
    streams = model.traits.streams
    return {
        "flops": [predicted.forward_flops, counter.get_total_flops()],
        "state": [predicted.state_bytes or 0, states.nbytes(state)] if streams else None,
    }


def resident(which: str) -> int:
    """Bytes of this process: VmRSS now, or VmHWM, its peak."""
    return int(re.search(rf"{which}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024  # type: ignore[index]


def memory_taken(model: Any, config: TrainConfig) -> int:
    """Peak of resident memory in three training steps above that before them."""
    config = replace(config, segment_length=ROW)
    before = resident("VmRSS")
    # begins a new peak
    Path("/proc/self/clear_refs").write_text("5")
    optimization = Optimization(model, config, Group())
    source = DocumentSource(model, text_of(1, 5 * ROW), config, Group())
    for step in range(3):
        optimization.step(source, step, 1e-6)
    return resident("VmHWM") - before


def times(model: Any, config: TrainConfig) -> dict[str, list[float]]:
    """Predicted and measured seconds: of training steps, and of reading a longer text."""
    config = replace(config, segment_length=512, lanes=2)
    speed = measure_speed(model, config)
    assert speed.trained is not None, "there is a configuration"
    optimization = Optimization(model, config, Group())
    source = DocumentSource(model, text_of(2, (STEPS + 2) * 512), config, Group())
    model.train()
    began = time.perf_counter()
    for step in range(STEPS):
        optimization.step(source, step, 1e-6)
    trained = time.perf_counter() - began
    length = READ if model.traits.streams else BASE
    text = text_of(1, length)
    began = time.perf_counter()
    evaluate_text(model, text, chunk=512 if model.traits.streams else length, batch=1, memory=model.traits.streams)
    read = time.perf_counter() - began
    return {
        "training": [STEPS * 512 * 2 / speed.trained, trained],
        "reading": [speed.seconds_to_read(footprint(model, length)), read],
    }


def part(name: str, what: str, folder: Path) -> dict[str, Any]:
    """Measure a part of a model; called in a process of its own."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    table, config = tables_of(name, folder)
    if what == "process":
        # in further processes, with the allocator as it is
        predicted = process_memory(table, config).at(ROW)
        return {"process": [predicted, in_a_process(table, replace(config, segment_length=ROW))["taken"]]}
    model = build_model(table)
    if what == "count":
        return flops_and_state(model)
    if what == "predict":
        # construction is before the baseline of the measurement, so gradients, optimizer and activations count
        return {"memory": training_memory(model, config).at(ROW)}
    if what == "memory":
        step_cost_of_imports()
        return {"memory": memory_taken(model, config)}
    return times(model, config)


def step_cost_of_imports() -> None:
    """Make a step of a tiny model, so that what torch allocates once, such as its threads, is in the baseline."""
    recipe = read_toml(find_recipe("lm/window.toml"))
    table = {**recipe["model"], "vocab_size": 256, "dim": 16, "num_layers": 1, "num_heads": 2, "ffn_dim": 16}
    step_cost(build_model(table), replace(text_training(recipe), lanes=1, segment_length=32))


def in_process(name: str, what: str, folder: Path) -> dict[str, Any]:
    """Run `part` in a fresh process and return its result."""
    command = [sys.executable, __file__, "--part", name, what, "--folder", str(folder)]
    heap = {} if what == "process" else {"MALLOC_MMAP_THRESHOLD_": "65536"}
    environment = {**os.environ, **heap, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"{name}, {what}:\n{done.stderr}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


BARS: Mapping[str, tuple[str, Callable[[float], bool]]] = {
    "flops": ("within 2 %", lambda ratio: abs(ratio - 1) <= 0.02),
    "state": ("exact", lambda ratio: ratio == 1),
    "tensors": ("within 15 %", lambda ratio: abs(ratio - 1) <= 0.15),
    "process": ("within 15 %", lambda ratio: abs(ratio - 1) <= 0.15),
    "training": ("within 2 times", lambda ratio: 0.5 <= ratio <= 2),
    "reading": ("within 2 times", lambda ratio: 0.5 <= ratio <= 2),
}


PARTS = ("count", "tensors", "process", "times")


def measure(name: str, parts: Sequence[str], folder: Path) -> dict[str, Any]:
    """Return predicted and measured values of a model by what they are."""
    values: dict[str, Any] = {}
    for what in parts:
        if what == "tensors":
            values[what] = [in_process(name, half, folder)["memory"] for half in ("predict", "memory")]
        else:
            values |= in_process(name, what, folder)
    return values


def table_of(results: Mapping[str, Mapping[str, Any]]) -> Table:
    """Ratios of predicted to measured values; those beyond their bar are marked."""
    rows = []
    for name, values in results.items():
        cells = []
        for what, (_, passes) in BARS.items():
            pair = values.get(what)
            if pair is None:
                cells.append("")
                continue
            ratio = pair[0] / pair[1]
            cells.append(f"{ratio:.3f}{'' if passes(ratio) else ' (missed)'}")
        rows.append((name, *cells))
    bars = ", ".join(f"{what} {bar}" for what, (bar, _) in BARS.items())
    caption = f"Predicted divided by measured. Bars: {bars}."
    return Table(columns=("model", *BARS), rows=rows, right=tuple(range(1, 1 + len(BARS))), caption=caption)


def plans(folder: Path) -> Table:
    """Train what `longspan plan` proposes, and compare its memory and time with the plan."""
    rows = []
    longspan = [sys.executable, "-m", "longspan"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for size, needs in NEEDS:
        letters = torch.randint(97, 123, (size,), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
        (folder / "book.txt").write_bytes(letters.numpy().tobytes())
        done = subprocess.run(
            [*longspan, "plan", *needs, "--text", "book.txt", "--json"],
            capture_output=True,
            text=True,
            cwd=folder,
            env=environment,
            check=True,
        )
        fitting = [tried for tried in json.loads(done.stdout)["candidates"] if not tried["problem"]]
        if not fitting:
            raise SystemExit(f"plan {shlex.join(needs)}: nothing fits on this machine; give it more time in NEEDS")
        best = fitting[0]
        began = time.perf_counter()
        subprocess.run(
            [*longspan, *shlex.split(best["command"])[1:]], cwd=folder, env=environment, check=True, capture_output=True
        )
        seconds = time.perf_counter() - began
        # of the largest child so far, so that it is an upper bound of that of the training
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        limit = 1e9 * float(needs[3].removesuffix("GB"))
        ratio = best["training_seconds"] / seconds
        rows.append(
            (
                f"{best['recipe']}, {best['parameters']:,} parameters",
                f"{best['training_seconds']:.0f} s",
                f"{seconds:.0f} s",
                f"{ratio:.2f}{'' if BARS['training'][1](ratio) else ' (missed)'}",
                f"{best['training_bytes'] / 1e6:,.0f} MB",
                f"{peak / 1e6:,.0f} MB{'' if peak <= limit else ' (missed)'}",
                f"{limit / 1e6:,.0f} MB",
            )
        )
    columns = ("proposal", "planned", "took", "ratio", "planned memory", "took", "limit")
    return Table(columns=columns, rows=rows, right=tuple(range(1, len(columns))), caption="Proposals of longspan plan.")


def main() -> None:
    """Measure all models, print the table, and write all numbers."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="*", metavar="NAME", help="models, such as lm/window or converted/infini")
    parser.add_argument("--parts", nargs="*", default=PARTS, metavar="PART", help="of: " + ", ".join(PARTS))
    parser.add_argument("--plans", action="store_true", help="also train what plan proposes")
    parser.add_argument("-o", "--output", type=Path, help="JSON file of all numbers")
    parser.add_argument("--part", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        name, what = options.part
        print(json.dumps(part(name, what, options.folder)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder, results = Path(temporary), dict[str, Any]()
        for model in options.only if options.only is not None else names():
            results[model] = measure(model, options.parts, folder)
            print(
                model, {what: pair and round(pair[0] / pair[1], 3) for what, pair in results[model].items()}, flush=True
            )
            if options.output:
                options.output.write_text(json.dumps(results, indent=2) + "\n")
        if results:
            print("\n" + table_lines(table_of(results)))
        if options.plans:
            print("\n" + table_lines(plans(folder)))


if __name__ == "__main__":
    main()
