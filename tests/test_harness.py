"""lm-evaluation-harness over a run and over a converted model: its own tasks on local data, against plain forwards."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from longspan.errors import CheckpointError
from longspan.tasks.text import TextTask
from longspan.train import load_run, run

lm_eval = pytest.importorskip("lm_eval")

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
DOCUMENTS: list[dict[str, Any]] = [
    {"question": "The sky is", "choices": [" blue", " a long green sea"], "answer": 0},
    {"question": "The state of the union is", "choices": [" strong", " we", " w"], "answer": 1},
    {"question": "", "choices": ["The", "zq"], "answer": 0},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Transformer-XL over bytes."""
    where: Path = tmp_path_factory.mktemp("harness")
    (where / "book.txt").write_text("The state of the union is what we make of it. " * 60)
    mixer = {"name": "transformer_xl", "mem_len": 16, "segment": 8}
    recipe = {
        "model": {"dim": 32, "num_layers": 2, "mixers": [mixer]},
        "task": {"source": str(where / "book.txt")},
        "train": {"steps": 60, "lanes": 2, "segment_length": 32, "lr": 0.01, "warmup": 0},
    }
    run(recipe, where / "run", progress="none")
    return where / "run"


def evaluate(model: Any, **config: Any) -> dict[str, Any]:
    """One task of the harness over `DOCUMENTS`."""
    import datasets  # type: ignore[import-untyped]
    from lm_eval.api.task import ConfigurableTask  # type: ignore[import-untyped]
    from lm_eval.tasks import TaskManager  # type: ignore[import-untyped]

    def local(**_: Any) -> Any:
        return {"test": datasets.Dataset.from_list(DOCUMENTS)}

    task = ConfigurableTask(config={"task": "local", "test_split": "test", "custom_dataset": local, **config})
    # the manager of tasks would read the thousands of configurations that the harness ships
    options = {"task_manager": TaskManager(include_defaults=False), "log_samples": True, "bootstrap_iters": 0}
    report: dict[str, Any] = lm_eval.simple_evaluate(model=model, tasks=[task], **options)
    return report


@torch.no_grad()
def definition(folder: Path, context: str, text: str) -> tuple[float, bool]:
    """Log-likelihood of a text after a context, from one forward."""
    model, task = load_run(folder)
    assert isinstance(task, TextTask)
    ids = [task.tokenizer.begin, *context.encode(), *text.encode()]
    logits = model(torch.tensor([ids[:-1]]))[0][0, len(context.encode()) :].log_softmax(-1)
    targets = torch.tensor(list(text.encode()))
    return float(-F.nll_loss(logits, targets, reduction="sum")), bool((logits.argmax(-1) == targets).all())


def test_multiple_choice_equals_plain_forwards(folder: Path) -> None:
    from longspan.harness import LongspanLM

    report = evaluate(
        LongspanLM(folder),
        output_type="multiple_choice",
        doc_to_text="{{question}}",
        doc_to_choice="{{choices}}",
        doc_to_target="{{answer}}",
        target_delimiter="",
    )
    right = 0
    for document, sample in zip(DOCUMENTS, report["samples"]["local"], strict=True):
        expected = [definition(folder, document["question"], choice) for choice in document["choices"]]
        for (value, greedy), (score,) in zip(expected, sample["resps"], strict=True):
            assert score[0] == pytest.approx(value, abs=1e-4)
            assert bool(score[1]) == greedy
        right += max(range(len(expected)), key=lambda i: expected[i][0]) == document["answer"]
    assert report["results"]["local"]["acc,none"] == pytest.approx(right / 3)


@pytest.mark.long
def test_rolling_likelihood_reads_the_whole_text(folder: Path) -> None:
    from longspan.harness import LongspanLM

    report = evaluate(
        LongspanLM(folder),
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{question}} the state of the union",
        metric_list=[{"metric": "byte_perplexity"}],
    )
    texts = [f"{document['question']} the state of the union" for document in DOCUMENTS]
    total = sum(definition(folder, "", text)[0] for text in texts)
    size = sum(len(text.encode()) for text in texts)
    assert report["results"]["local"]["byte_perplexity,none"] == pytest.approx(math.exp(-total / size), rel=1e-4)


@pytest.mark.long
def test_generation_stops_where_the_task_says(folder: Path) -> None:
    from longspan.harness import LongspanLM

    report = evaluate(
        LongspanLM(folder),
        output_type="generate_until",
        doc_to_text="The state of the union{{question}}",
        doc_to_target="",
        generation_kwargs={"until": ["we"], "max_gen_toks": 30, "do_sample": False},
        metric_list=[{"metric": "exact_match"}],
    )
    answers = [sample["resps"][0][0] for sample in report["samples"]["local"]]
    assert all("we" not in answer and len(answer) <= 30 for answer in answers)
    model, task = load_run(folder)
    assert isinstance(task, TextTask)
    ids = [task.tokenizer.begin, *b"The state of the union"]
    with torch.no_grad():
        for _ in range(len(answers[2])):
            ids.append(int(model(torch.tensor([ids]))[0][0, -1].argmax()))
    assert bytes(ids[23:]).decode(errors="replace") == answers[2]
    assert len(answers[2]) > 5


def test_a_converted_model_is_evaluated_too(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from lm_eval.api.instance import Instance  # type: ignore[import-untyped]
    from tests.hf.conftest import save_llama

    from longspan.cli.app import run as command
    from longspan.harness import LongspanLM

    plain, folder = save_llama(tmp_path / "llama"), tmp_path / "endless"
    assert command(["convert", str(plain), "--to", "window", "--set", "window=16", "-o", str(folder)]) == 0
    model = LongspanLM(folder)
    pairs = [("The state of", " the union"), ("", "of the union")]
    requests = [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)]
    (first, _), (second, _) = model.loglikelihood(requests, disable_tqdm=True)
    decoder, encode = model.model, model.tok_encode
    with torch.no_grad():
        for (context, text), value in zip(pairs, (first, second), strict=True):
            ids = torch.tensor([[model.eot_token_id, *encode(context), *encode(text)]])
            logits = decoder(ids[:, :-1])[0][0, len(encode(context)) :]
            assert value == pytest.approx(
                -float(F.cross_entropy(logits, ids[0, -len(encode(text)) :], reduction="sum")), abs=1e-4
            )


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    from longspan.harness import LongspanLM

    with pytest.raises(CheckpointError, match="not a run"):
        LongspanLM(tmp_path)


def test_a_preset_of_a_benchmark(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    from longspan.cli.app import run as command

    calls: list[dict[str, Any]] = []

    def evaluate_simply(**options: Any) -> dict[str, Any]:
        calls.append(options)
        length = options["metadata"]["max_seq_lengths"]
        figures = {"alias": "x", "acc,none": 0.25 if length == "0k" else 0.5, "acc_stderr,none": 0.125}
        return {"results": {task: figures | {"4096,none": -1.0} for task in options["tasks"]}}

    monkeypatch.setattr(lm_eval, "simple_evaluate", evaluate_simply)
    assert command(["eval", str(folder), "--benchmark", "babilong", "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert [(score["task"], score["length"], score["value"]) for score in scores] == [
        ("babilong_qa1", "0k", 0.25),
        ("babilong_qa2", "0k", 0.25),
        ("babilong_qa1", "4k", 0.5),
        ("babilong_qa2", "4k", 0.5),
    ]
    assert {score["error"] for score in scores} == {0.125}
    assert {call["limit"] for call in calls} == {50}
    assert calls[0]["metadata"]["tokenizer"] == str(folder)
    assert isinstance(calls[0]["model"], type(calls[1]["model"]))
    assert command(["eval", str(folder), "--benchmark", "ruler:full"]) == 0
    assert [call["metadata"]["max_seq_lengths"] for call in calls[2:]] == [
        [4096],
        [8192],
        [16384],
        [32768],
        [65536],
        [131072],
    ]
    assert "all documents" in capsys.readouterr().out

    def fail(**_: Any) -> Any:
        raise ConnectionError("no hub\nmore")

    monkeypatch.setattr(lm_eval, "simple_evaluate", fail)
    for arguments, expected in {
        ("--benchmark", "babilong"): "the harness cannot load this benchmark: no hub; it needs the hub",
        ("--benchmark", "ruller"): "'ruller': not a benchmark of long contexts",
        ("--benchmark", "ruler:small", "--head", "4"): "leave out --head",
    }.items():
        assert command(["eval", str(folder), *arguments]) == 2
        assert expected in capsys.readouterr().err


@pytest.mark.long
def test_tasks_of_the_presets_exist() -> None:
    from lm_eval.tasks import TaskManager

    from longspan.harness import PRESETS

    known = TaskManager()
    names = {task for sizes in PRESETS.values() for preset in sizes.values() for task in preset.tasks}
    assert names <= set(known.all_tasks)
