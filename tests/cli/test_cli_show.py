"""`longspan show`: pictures of patterns, spans and supports, and errors where there is nothing to show."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.cli.command import Command

import longspan as ls
from longspan.cli.app import run
from longspan.cli.show.heads import find_mechanisms
from longspan.cli.show.scaling import joint_law, read_run
from longspan.contract.registry import mechanism_class
from longspan.cost.scaling import Fit
from longspan.errors import ConfigError
from longspan.mechanisms.adaptive_span.layer import AdaptiveSpanMechanism
from longspan.mechanisms.entmax.layer import EntmaxMechanism
from longspan.mixers import BatchLayout
from longspan.mixers.probe import support_sizes
from longspan.renames import RenamedWarning
from longspan.train import load_run

MIXERS = """[
    {name = "adaptive_span", max_span = 20, ramp = 4, initial = 0.3},
    {name = "entmax", alpha_init = 1.7},
    {name = "mixed_heads", mixers = [
        {name = "adaptive_span", num_heads = 1, max_span = 12, dynamic = true, ramp = 3},
        {name = "entmax", num_heads = 1, window = 9},
    ]},
]"""


@pytest.fixture(scope="module")
def looking_run(folder: Path) -> Path:
    """A run with learned spans and alphas."""
    path = folder / "looking"
    settings = ["model.num_layers=3", "train.steps=3", f"model.mixers={' '.join(MIXERS.split())}"]
    options = [part for setting in settings for part in ("--set", setting)]
    assert run(["train", str(folder / "bytes.toml"), *options, "-o", str(path)]) == 0
    return path


@pytest.mark.parametrize("verb", ["text", "patterns", "spans", "support"])
def test_every_verb_has_an_example(longspan: Command, verb: str) -> None:
    outcome = longspan("show", verb, "--help")
    assert outcome.code == 0
    assert f"  longspan show {verb}" in outcome.out


def test_show_without_a_verb_prints_the_help(longspan: Command) -> None:
    outcome = longspan("show")
    assert outcome.code == 0
    assert all(verb in outcome.out for verb in ("text", "patterns", "spans", "support"))
    assert outcome.out == longspan("show", "--help").out


@pytest.mark.long
def test_all_patterns_are_drawn(longspan: Command, tmp_path: Path) -> None:
    outcome = longspan("show", "patterns", "--length", 20, "-o", tmp_path)
    assert outcome.code == 0, outcome
    report = json.loads((tmp_path / "report.json").read_text())
    forms = [(name, dict(fields)) for name in ls.mixers.names() for fields in ls.mixers.examples(name)]
    assert [pattern["name"] for pattern in report["patterns"]] == [name for name, _ in forms]
    for name in ls.mixers.names():
        assert (tmp_path / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert f"\n {name} " in outcome.out
    full, window = (
        next(pattern for pattern in report["patterns"] if pattern["name"] == name) for name in ("full", "window")
    )
    assert full["keys_per_query"] == [10.5] * 4
    assert window["keys_per_query"] == [(4 * 20 - 6) / 20] * 4
    assert window["heads_alike"] == [[1, 2, 3, 4]]
    parts = next(pattern for pattern in report["patterns"] if pattern["name"] == "mixed_heads")
    assert parts["heads_alike"] == [[1, 2], [3, 4]]
    assert "<img" in (tmp_path / "report.html").read_text()


def test_the_patterns_of_given_fields(longspan: Command, tmp_path: Path) -> None:
    fields = ("--set", "pattern=strided", "--set", "stride=5")
    assert longspan("show", "patterns", "sparse", *fields, "--length", 80, "-o", tmp_path).code == 0
    (only,) = json.loads((tmp_path / "report.json").read_text())["patterns"]
    assert only["fields"] == {"pattern": "strided", "stride": 5}
    expected = sum(len({j for j in range(i + 1) if i - j <= 5 or (i - j) % 5 == 0}) for i in range(80)) / 80
    assert only["keys_per_query"] == pytest.approx([expected] * 4)


def test_bidirectional_patterns(longspan: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longspan.contract.registry.names", lambda: ["full", "window", "bp", "infini"])
    assert longspan("show", "patterns", "--bidirectional", "--length", 8, "-o", tmp_path).code == 0
    names = {pattern["name"] for pattern in json.loads((tmp_path / "report.json").read_text())["patterns"]}
    assert names == {"full", "window", "bp"}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["spars"], "unknown mixer 'spars'; did you mean 'sparse'?"),
        (["sparse", "bp", "--set", "stride=3"], "applies to one mechanism; give exactly one NAME"),
        (["--set", "stride=3"], "applies to one mechanism; give exactly one NAME"),
        (["sparse", "--set", "strid=3"], "did you mean 'stride'?"),
        (["infini", "--bidirectional"], "leave --bidirectional out"),
        (["full", "--length", "100000"], "--length"),
    ],
)
def test_wrong_patterns(longspan: Command, tmp_path: Path, arguments: list[str], expected: str) -> None:
    assert expected in longspan("show", "patterns", *arguments, "-o", tmp_path / "out").error
    assert not (tmp_path / "out").exists()


def test_spans_of_a_run(longspan: Command, looking_run: Path, tmp_path: Path) -> None:
    outcome = longspan("show", "spans", looking_run, "--tokens", 300, "-o", tmp_path)
    assert outcome.code == 0, outcome
    first, second = json.loads((tmp_path / "report.json").read_text())["spans"]
    model, _ = load_run(looking_run)
    assert first["layer"] == 1
    assert first["spans"] == pytest.approx(model.layers[0].mixer.core.spans)
    assert second["layer"] == 3
    assert second["dynamic"]
    # sigmoid(-4) of 12 tokens, and not moved far by three steps
    assert 0.1 < second["spans"][0] < 0.5
    assert (tmp_path / "figures" / "spans.png").exists()


def test_support_of_a_run(longspan: Command, looking_run: Path, tmp_path: Path) -> None:
    outcome = longspan("show", "support", looking_run, "--tokens", 400, "--head", 200, "-o", tmp_path)
    assert outcome.code == 0, outcome
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["tokens"] == 400
    assert len(report["documents"]) == 2
    wide, narrow = report["heads"]
    model, _ = load_run(looking_run)
    assert wide["alpha"] == pytest.approx(model.layers[1].mixer.core.alpha.tolist())
    assert (narrow["layer"], narrow["first_head"]) == (3, 2)
    # every position of the first 200 could see all before it: 100.5 on average; in the window 8.8
    for group, most in ((wide, 100.5), (narrow, 8.82)):
        for size, share in zip(group["support"], group["share"], strict=True):
            assert 1 <= size <= most
            assert share == pytest.approx(size / most)


@pytest.mark.parametrize("verb", ["spans", "support"])
def test_a_run_without_such_layers(longspan: Command, byte_run: Path, tmp_path: Path, verb: str) -> None:
    error = longspan("show", verb, byte_run, "-o", tmp_path / "out").error
    assert f"this run has no layer of {'adaptive_span' if verb == 'spans' else 'entmax'}" in error
    assert "TransformerXL" in error
    assert not (tmp_path / "out").exists()
    assert "not a run" in longspan("show", verb, tmp_path).error


@pytest.mark.parametrize("fields", [{}, {"window": 5}])
@pytest.mark.parametrize("carried", [0, 7])
def test_supports_are_counted_correctly(fields: dict[str, Any], carried: int) -> None:
    torch.manual_seed(0)
    mixer = ls.mixers.build("entmax", dim=16, num_heads=4, num_kv_heads=2, alpha_init=1.8, **fields).double()
    x = torch.randn(2, carried + 20, 16, dtype=torch.float64) * 3
    expected = (mixer.attention_map(x) != 0).sum(-1)[:, :, carried:]
    state = mixer(x[:, :carried])[1] if carried else None
    q, k, v = mixer.projections(x[:, carried:])
    rows = BatchLayout(torch.full((2,), carried), 20)
    assert isinstance(mixer.core, EntmaxMechanism)
    with torch.no_grad():
        assert torch.equal(support_sizes(mixer.core, q, k, v, state, rows), expected)
    assert expected.max() > expected.min()


def test_layers_are_found_in_any_model() -> None:
    table: dict[str, Any] = {"vocab_size": 9, "dim": 16, "num_layers": 3, "num_heads": 2}
    parts = [{"name": "full", "num_heads": 1}, {"name": "entmax", "num_heads": 1}]
    config = ls.DecoderConfig(**table, mixers=({"name": "adaptive_span"}, {"name": "mixed_heads", "mixers": parts}))
    model = ls.RecurrentMemory(ls.Decoder(config), num_memory_tokens=2, segment_length=8)
    assert [(heads.layer, heads.first) for heads in find_mechanisms(model, AdaptiveSpanMechanism, "r", "a")] == [
        (1, 1),
        (3, 1),
    ]
    assert [(heads.layer, heads.first) for heads in find_mechanisms(model, EntmaxMechanism, "r", "e")] == [(2, 2)]
    with pytest.raises(ConfigError, match="r: this run has no layer of lsh, only of AdaptiveSpan, Entmax, Full"):
        find_mechanisms(model, mechanism_class("lsh"), "r", "lsh")


def test_scaling_laws_of_runs(longspan: Command, folder: Path, tmp_path: Path) -> None:
    runs = []
    for dim, steps in ((16, 4), (32, 8), (48, 16)):
        run = tmp_path / f"d{dim}"
        sizes = ["--set", f"model.dim={dim}", "--set", f"train.steps={steps}"]
        assert longspan("train", folder / "bytes.toml", *sizes, "-o", run).code == 0
        runs.append(run)
    outcome = longspan("show", "scaling", *runs, "-o", tmp_path / "laws")
    assert outcome.code == 0, outcome
    assert "3 runs cannot determine 5 parameters" in " ".join(outcome.out.split())
    assert outcome.out.count("exponent [") == 3
    record = json.loads((tmp_path / "laws" / "report.json").read_text())
    assert [row["D"] for row in record["runs"]] == sorted(row["D"] for row in record["runs"])
    assert record["runs"][0]["C"] > 6 * record["runs"][0]["N"] * record["runs"][0]["D"]
    assert set(record["laws"]) == {"compute", "size", "data"}
    assert (tmp_path / "laws" / "figures" / "scaling-compute.png").is_file()
    assert record["laws"]["compute"]["undetermined"] == []
    wrong = longspan("show", "scaling", *runs, "--form", "cubic")
    assert wrong.code == 2
    assert "chinchilla, kaplan or none" in wrong.err
    without_runs = longspan("show", "scaling", tmp_path)
    assert "not a run" in without_runs.err


@pytest.mark.long
def test_the_joint_law_is_reported_with_intervals_and_its_budget() -> None:
    law = Fit("chinchilla", {"E": 1.69, "A": 406.4, "a": 0.34, "B": 410.7, "b": 0.28}, {}, 0.0, 0)
    sizes = [(n, d) for n in (1e5, 1e6, 1e7) for d in (1e7, 1e8, 1e9)]
    random = np.random.default_rng(0)
    rows = [
        {
            "N": n,
            "D": d,
            "C": 6 * n * d * (1.1 if n > 1e6 else 1.5),
            "loss": law.predict(N=n, D=d) * random.normal(1, 0.003),
        }
        for n, d in sizes
    ]
    blocks: list[Any] = []
    data: dict[str, Any] = {"laws": {}}
    joint_law("chinchilla", rows, 1e18, blocks, data)
    (text,) = (block.text for block in blocks)
    for name, (low, high) in data["laws"]["chinchilla"]["intervals"].items():
        assert f" {name} = {data['laws']['chinchilla']['parameters'][name]:.4g} [{low:.4g}, {high:.4g}]" in text
    assert len(data["laws"]["chinchilla"]["intervals"]) == 5
    assert "counts 6 N D, without attention to the context, which is 9% to 33% of these runs' FLOPs" in text
    joint_law("chinchilla", [{**row, "N": 1e6} for row in rows], 1e18, blocks, data)
    assert "No joint law in parameters and tokens: runs with 1 distinct values of N cannot determine" in blocks[-1].text
    tied = [{**row, "N": row["D"] / 20 * (1 + index % 2 * 1e-9)} for index, row in enumerate(rows)]
    tied += [{**row, "N": row["N"] * 7, "D": row["D"] * 7} for row in tied]
    joint_law("chinchilla", tied, 1e18, blocks, data)
    assert "(not determined)" in blocks[-1].text
    assert "It cannot tell the best model for a budget" in blocks[-1].text


def test_a_loss_belongs_to_the_tokens_of_its_evaluation(longspan: Command, folder: Path, tmp_path: Path) -> None:
    sizes = ["train.steps=12", "train.eval_every=5", "train.log_every=2", "train.eval_tokens=500"]
    options = [part for size in sizes for part in ("--set", size)]
    assert longspan("train", folder / "bytes.toml", *options, "-o", tmp_path / "run").code == 0
    log = tmp_path / "run" / "log.jsonl"
    whole = read_run(str(tmp_path / "run"))
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert whole["D"] == lines[-1]["tokens"] == 12 * 4 * 16

    def cut(count: int, without: tuple[str, ...] = ()) -> None:
        first_lines = lines[:count]
        text = [
            json.dumps({name: value for name, value in line.items() if name not in without}) for line in first_lines
        ]
        log.write_text("\n".join(text) + "\n")

    # stopped after the evaluation of step 10: the last line is that of step 12
    cut(-1)
    assert "validation" not in lines[-2]
    row = read_run(str(tmp_path / "run"))
    at = next(line for line in reversed(lines[:-1]) if "validation" in line)
    assert (row["D"], row["loss"]) == (10 * 4 * 16, at["validation"]["loss"])
    assert row["C"] == pytest.approx(whole["C"] * 10 / 12)
    # logs without tokens beside a validation: the step line before it has them
    for line in lines:
        if "validation" in line:
            del line["tokens"]
    cut(next(index for index, line in enumerate(lines) if "validation" in line) + 2)
    assert read_run(str(tmp_path / "run"))["D"] == 4 * 4 * 16
    cut(-1, without=("tokens",))
    assert "has no step line before the evaluation" in longspan("show", "scaling", tmp_path / "run").error
    cut(2)
    assert "was never evaluated on held-out documents" in longspan("show", "scaling", tmp_path / "run").error


def test_a_run_in_stages_has_no_record_for_laws(longspan: Command, folder: Path, tmp_path: Path) -> None:
    stages = "train.stages=[{steps = 2, sampling = 'pieces'}, {steps = 1, segment_length = 32}]"
    options = ["--set", "train.steps=3", "--set", stages]
    assert longspan("train", folder / "bytes.toml", *options, "-o", tmp_path / "run").code == 0
    outcome = longspan("show", "scaling", tmp_path / "run")
    assert "scaling laws need runs without train.stages; leave it out" in outcome.error


def test_laws_are_fitted_to_one_text_and_one_tokenizer(
    longspan: Command, byte_run: Path, subword_run: Path, copied_run: Path
) -> None:
    outcome = longspan("show", "scaling", byte_run, copied_run, subword_run)
    assert "task.tokenizer = 'subword', but 'bytes' in" in outcome.error
    (copied_run / "tokenizer.json").write_text('{"longspan": "bytes" }')
    (copied_run / "digests.json").unlink()
    assert "its tokenizer differs from that of" in longspan("show", "scaling", byte_run, copied_run).error


def test_the_old_name_of_an_option_warns(longspan: Command, tmp_path: Path) -> None:
    with pytest.warns(RenamedWarning, match="--both-sides is now --bidirectional"):
        shown = longspan("show", "patterns", "window", "--both-sides", "--length", 8, "-o", tmp_path)
    assert shown.code == 0
