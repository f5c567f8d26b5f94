"""`longspan eval --task lm`: figures, table and page."""

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.cli.command import Command
from torch import Tensor

from longspan.cli.app import run
from longspan.cli.lm import figure, windows_of
from longspan.errors import ConfigError, DataError
from longspan.tasks import TextTask
from longspan.train.lm_evaluation import Window


def figures(longspan: Command, *arguments: object) -> Any:
    outcome = longspan("eval", *arguments, "--task", "lm", "--json")
    assert outcome.code == 0, outcome
    return json.loads(outcome.out)


def test_the_figures_agree_with_the_usual_ones(longspan: Command, byte_run: Path) -> None:
    usual = json.loads(longspan("eval", byte_run, "--json").out)
    evaluation = figures(longspan, byte_run, "--contexts", "64:16,512")
    readings = evaluation["readings"]
    assert list(readings) == ["carried", "segments of 16", "context 64:16", "context 512:256"]
    for name, usual_name in (("carried", "with_memory"), ("segments of 16", "without_memory")):
        bits = usual[usual_name]["bits_per_byte"]
        assert readings[name]["bits_per_byte"]["value"] == pytest.approx(bits, rel=1e-6)
        assert readings[name]["bits_per_byte"]["low"] == pytest.approx(usual[usual_name]["interval"]["low"], rel=1e-6)
    assert (readings["context 64:16"]["context"], readings["context 64:16"]["stride"]) == (64, 16)
    assert "the last 16 scored: a token sees 49 to 64 tokens" in readings["context 64:16"]["read"]
    assert evaluation["text"]["words_by"] == "separated by white space"
    assert sum(band["amount"] for band in evaluation["by_frequency"]) == evaluation["text"]["words"]
    assert sum(band["amount"] for band in evaluation["by_place"]) == evaluation["text"]["bytes"] == 3000
    # the state of this model reaches no further than its layers x memory, so a long window is as good as carrying
    assert readings["context 512:256"]["bits_per_byte"]["value"] == pytest.approx(
        readings["carried"]["bits_per_byte"]["value"], abs=0.01
    )


def test_a_longer_memory_at_evaluation_than_in_training(longspan: Command, byte_run: Path) -> None:
    evaluation = figures(longspan, byte_run, "--contexts", "", "--set", "model.mixers.0.mem_len=64")
    assert evaluation["settings"] == ["model.mixers.0.mem_len=64"]
    usual = figures(longspan, byte_run, "--contexts", "")
    assert evaluation["readings"]["carried"]["bits_per_byte"] != usual["readings"]["carried"]["bits_per_byte"]


def test_other_files_have_no_training_text(longspan: Command, byte_run: Path, folder: Path) -> None:
    evaluation = figures(longspan, byte_run, folder / "long.txt", "--contexts", "", "--head", 500)
    assert evaluation["by_frequency"] == []
    assert evaluation["text"]["split"] is None
    assert evaluation["readings"]["carried"]["bits_per_byte"]["low"] is None


def test_the_page(longspan: Command, byte_run: Path, tmp_path: Path) -> None:
    outcome = longspan("eval", byte_run, "--task", "lm", "--contexts", "64,256", "-o", tmp_path / "page")
    assert outcome.code == 0, outcome
    for words in ("perplexity", "carried", "segments of 16", "count in the training text", "report.html"):
        assert words in outcome.out
    assert {path.name for path in (tmp_path / "page/figures").iterdir()} == {
        "along.png",
        "along-gain.png",
        "contexts.png",
        "rare.png",
        "rare-gain.png",
    }
    assert json.loads((tmp_path / "page/report.json").read_text())["readings"]["carried"]["context"] is None
    html = (tmp_path / "page/report.html").read_text()
    assert re.findall(r"<h2[^>]*>([^<]+)", html)[0] == "What came out"
    assert "Loss by context length" in html
    assert "1,500 bytes" not in html


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small pretrained model with memory beyond 32 tokens, and without positions beyond 128."""
    pytest.importorskip("transformers")
    from tests.hf.conftest import save_llama

    base = tmp_path_factory.mktemp("converted")
    source = save_llama(base / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 128}))
    fields = ("--segment", "32", "--set", "gate_init=0.0")
    assert run(["convert", str(source), "--to", "infini", *fields, "-o", str(base / "infini")]) == 0
    return base


def test_a_converted_model_beside_simpler_attention(
    longspan: Command, converted: Path, folder: Path, tmp_path: Path
) -> None:
    options = ("--contexts", "", "--branches", "--beside", "original", "--beside", "sinks", "--beside")
    files = (folder / "long.txt", folder / "documents", "--head", 300)
    page = tmp_path / "page"
    evaluation = figures(
        longspan, converted / "infini", *files, *options, converted / "source", "--output", page, "--device", "cpu"
    )
    others = ["local attention alone", "memory alone", "original", "sinks", str(converted / "source")]
    assert list(evaluation["readings"]) == ["carried", "segments of 32", *others]
    first, second, *_, last = evaluation["by_place"]
    bits = {name: [band["bits"][name]["value"] for band in (first, second, last)] for name in first["bits"]}
    assert bits["original"] == bits[str(converted / "source")], "infini changes no weight of the model"
    assert bits["original"][1] != pytest.approx(bits["carried"][1], abs=1e-4)
    assert bits["original"][2] is None, "the original has no positions there"
    assert evaluation["readings"]["original"]["bits_per_byte"]["value"] is None
    assert len({bits[name][1] for name in ("carried", "local attention alone", "memory alone", "sinks")}) == 4
    gain = second["first_minus_this"]["sinks"]["value"]
    assert gain == pytest.approx(bits["carried"][1] - bits["sinks"][1], abs=1e-9)
    states = {name: list(cost["state_bytes"].values()) for name, cost in evaluation["costs"].items()}
    assert states["carried"][0] == states["carried"][-1]
    # keys and values of 2 layers of 2 heads of 4 in fp32, and counts
    assert states["original"] == [2 * 2 * 2 * 4 * 4 * length + 24 for length in (2048, 8192, 32768)]
    assert "Time and memory" in (page / "report.html").read_text()
    advice = json.loads((page / "report.json").read_text())["recommendation"]
    assert "Relative to original, which does not read these documents to their end, it " in advice["answer"]
    assert "nan" not in json.dumps(advice)


def test_other_models_that_do_not_fit_are_refused(longspan: Command, byte_run: Path, converted: Path) -> None:
    for arguments, expected in {
        (byte_run, "--beside", "window", "--task", "lm"): "is not a converted model; name the folder of another run",
        (byte_run, "--beside", "window"): "--beside: works with --task lm only",
        (byte_run, "--beside", converted / "infini", "--task", "lm"): "has another tokenizer than",
        (byte_run, "--branches", "--task", "lm"): "no layer of this model mixes local attention and a memory",
    }.items():
        outcome = longspan("eval", *arguments)
        assert outcome.code == 2
        assert expected in outcome.err.splitlines()[-1]


def test_numbers_are_asked_of_a_model_that_was_not_trained_for_them(
    longspan: Command, converted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from longspan.stream import StreamSession
    from longspan.tasks.synthetic import PasskeyConfig, PasskeyTask
    from longspan.train import open_run

    number = PasskeyTask(PasskeyConfig(length=400)).parts(np.random.default_rng([0, 0, 3]), "validation").number
    task: Any = open_run(converted / "infini").task
    right, wrong = (
        task.tokenizer.encode(b" " + text).tolist() for text in (number[:2] + b" " + number[2:], number[1:])
    )
    read: list[int] = []

    def answer(session: StreamSession, count: int, **_: Any) -> list[int]:
        read.append(session.position)
        return list(right if len(read) <= 3 else wrong)

    monkeypatch.setattr(StreamSession, "generate", answer)
    options = ("--task", "passkey", "--lengths", "400", "--count", 20, "--device", "cpu")
    (record,) = json.loads(longspan("eval", converted / "infini", *options, "--json").out)
    assert (record["length"], record["n"]) == (400, 21)
    # a token begins the text; the answer and the space before it are not read
    assert read[:21] == [395] * 21
    assert [depth for depth, (found, _) in record["by_depth"].items() if found] == ["0", "5", "10"]
    read.clear()
    table = longspan("eval", converted / "infini", *options).out
    assert "75-100 % deep" in table
    assert "3 of 21" in table
    assert "3 of 5" in table
    mistakes: dict[tuple[object, ...], str] = {
        ("--head", 9): "leave out --head",
        ("--beside", "sinks"): "--beside: works",
    }
    for extra, expected in mistakes.items():
        outcome = longspan("eval", converted / "infini", *options, *extra)
        assert outcome.code == 2
        assert expected in outcome.err


@pytest.fixture(scope="module")
def word_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on three books in the format of PG-19, by words."""
    base = tmp_path_factory.mktemp("pg19")
    for split, count in (("train", 3), ("validation", 1), ("test", 2)):
        (base / "books" / split).mkdir(parents=True)
        for number in range(count):
            (base / "books" / split / f"{number}.txt").write_text(f"the {split} of the book\n" * (20 + number))
    recipe = base / "pg19.toml"
    recipe.write_text(
        f"""
[model]
dim = 8
num_layers = 1
num_heads = 1
mixers = [{{ name = "window", window = 8 }}]
[task]
corpus = "pg19"
source = "{base / "books"}"
tokenizer = "word"
vocab_size = 0
cache = "{base / "cache"}"
[train]
steps = 2
lanes = 2
segment_length = 8
threads = 1
"""
    )
    assert run(["train", str(recipe), "-o", str(base / "run")]) == 0
    return base


def test_the_test_split_and_the_official_count_of_words(
    longspan: Command, word_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from longspan.tasks.corpora import CORPORA, Official

    counts = CORPORA["pg19"].official
    assert counts is not None
    assert len(list((word_run / "cache").iterdir())) == 2
    evaluation = figures(longspan, word_run / "run", "--split", "test", "--contexts", "")
    assert (evaluation["text"]["documents"], evaluation["text"]["words"]) == (2, 5 * 41)
    assert evaluation["text"]["words_by"] == "separated by white space"
    assert [band["first"] for band in evaluation["by_frequency"]] == [0, 10, 100]
    assert len(list((word_run / "cache").iterdir())) == 3
    monkeypatch.setitem(counts, "test", Official(2, 206))
    official = figures(longspan, word_run / "run", "--split", "test", "--contexts", "")
    assert (official["text"]["words"], official["text"]["words_by"]) == (206, "official count")
    same = official["readings"]["carried"]["perplexity_per_word"]["value"] ** (206 / 205)
    assert same == pytest.approx(evaluation["readings"]["carried"]["perplexity_per_word"]["value"])
    assert official["notes"] == []
    # as many documents, but not those
    monkeypatch.setitem(counts, "test", Official(2, 210))
    recounted = figures(longspan, word_run / "run", "--split", "test", "--contexts", "")
    assert (recounted["text"]["words"], recounted["text"]["words_by"]) == (205, "separated by white space")
    assert "the official count of 210 words is not used: this text has 205" in recounted["notes"][0]
    # a part of the split is divided by its own words
    part = figures(longspan, word_run / "run", "--split", "test", "--head", 6, "--contexts", "")
    assert (part["text"]["words"], part["text"]["words_by"]) == (10, "separated by white space")


def test_windows_as_they_are_given() -> None:
    assert windows_of("256, 1024:128 ,4096") == [Window(256, 128), Window(1024, 128), Window(4096, 2048)]
    assert windows_of("") == []
    for wrong in ("x", "0", "8:9", "8:0", "8:", "8:x", "²", "8:²", "1 2"):
        with pytest.raises(ConfigError, match="expected N or N:STRIDE with a stride from 1 to N tokens"):
            windows_of(wrong)


def test_every_window_is_read_or_named(longspan: Command, byte_run: Path) -> None:
    outcome = longspan("eval", byte_run, "--task", "lm", "--json", "--contexts", "32:8,64,64:8,4096,1500")
    readings = json.loads(outcome.out)["readings"]
    assert list(readings)[2:] == ["context 32:8", "context 64:32", "context 64:8"]
    assert readings["context 64:32"]["bits_per_byte"] != readings["context 64:8"]["bits_per_byte"]
    (note,) = json.loads(outcome.out)["notes"]
    assert note == "contexts skipped: 1,500, 4,096; the longest document has only 1,500 tokens"
    assert outcome.err == note + "\n"


def test_long_segments_are_read_in_calls_of_bounded_size(
    longspan: Command, byte_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from longspan.models import Decoder

    sizes: list[int] = []
    call = Decoder.forward

    def counted(self: Decoder, tokens: Tensor, *arguments: Any, **keywords: Any) -> Any:
        sizes.append(tokens.numel())
        return call(self, tokens, *arguments, **keywords)

    expected = {segment: longspan("eval", byte_run, "--json", "--segment", segment).out for segment in (16, 1400)}
    monkeypatch.setattr(Decoder, "forward", counted)
    monkeypatch.setattr("longspan.cli.evaluate.CHUNK", 8)
    monkeypatch.setattr("longspan.cli.lm.CHUNK", 8)
    for segment, usual in expected.items():
        readings = json.loads(longspan("eval", byte_run, "--json", "--segment", segment).out)
        for name in ("with_memory", "without_memory"):
            assert readings[name]["loss"] == pytest.approx(json.loads(usual)[name]["loss"], rel=1e-5)
        figures(longspan, byte_run, "--segment", segment, "--contexts", "64")
    assert max(sizes) <= 8 * 16


def test_mistaken_arguments(longspan: Command, byte_run: Path) -> None:
    assert "--task 'copy': must be lm, passkey or needle" in longspan("eval", byte_run, "--task", "copy").error
    assert longspan("eval", byte_run, "-o", "out").error.startswith("-o: works with --task lm only")
    assert longspan("eval", byte_run, "--contexts", "64").error.startswith("--contexts: works with --task lm only")
    both = longspan("eval", byte_run, "kjv", "--split", "test").error
    assert both == "--split 'test': selects the run's own text; give a split or files, not both"
    assert longspan("eval", byte_run, "--split", "dev").error == "--split 'dev': must be train, validation or test"
    assert "has no test split; set task.test_source" in longspan("eval", byte_run, "--split", "test").error


def test_without_the_training_text_a_line_says_what_is_missing(
    longspan: Command, byte_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(task: Any, split: str) -> Any:
        raise DataError("books: no such file or folder")

    monkeypatch.setattr(TextTask, "texts", gone)
    outcome = longspan("eval", byte_run, "--task", "lm", "--contexts", "")
    assert outcome.code == 0
    assert "count in the training text" not in outcome.out
    line = "no figures by word frequency, because the training text cannot be read: books: no such file or folder\n"
    assert outcome.err == line


def test_perplexities_fit_into_their_column() -> None:
    from longspan.train import Interval

    assert figure("perplexity_per_word", Interval(1.23e9, 1.1e9, 2e10)) == "1.23e+09 [1.10e+09, 2.00e+10]"
    assert figure("perplexity_per_word", Interval(999_999.4, 5.0, 6.0)) == "999,999 [5, 6]"
    assert figure("perplexity_per_word", Interval(12.345, math.nan, math.nan)) == "12.35"
