"""The matrix: every mechanism, own and converted, through what users do to a Llama, and out again as it went in.

Each cell compares logits before and after (saving, copying, offloading, merging), or a step of training with the same
step done by hand.
"""

import copy
import io
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.field.models import CONVERTIBLE, NAMES, converted, labeled, own, tokens

transformers = pytest.importorskip("transformers")
hf = pytest.importorskip("longspan.hf")

# every cell is long; a few mechanisms stand for the others where tests are quick
QUICK = [
    ("own", "window"),
    ("own", "infini"),
    ("own", "routing"),
    ("converted", "infini"),
    ("converted", "adaptive_span"),
]
ALL = [*(("own", name) for name in NAMES), *(("converted", name) for name in CONVERTIBLE)]
KINDS = [pytest.param(*pair, marks=() if pair in QUICK else pytest.mark.long) for pair in ALL]
pytestmark = [
    pytest.mark.parametrize(("kind", "name"), KINDS),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning"),
]


def make(kind: str, name: str) -> Any:
    """A small model whose parameters have moved, as training would move them."""
    model = converted(name, layers=2) if kind == "converted" else hf.LongspanForCausalLM.wrap(own(name, layers=2))
    noise = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=noise)
    return model


def same(left: Any, right: Any, exact: bool = False) -> None:
    """Two models say the same of a text."""
    text = tokens(2, 13)
    with torch.no_grad():
        ours, theirs = left.eval()(text).logits, right.eval()(text).logits
    torch.testing.assert_close(ours, theirs, rtol=0 if exact else 1e-5, atol=0 if exact else 1e-5)


def loss_of(model: Any, text: torch.Tensor, **keywords: Any) -> torch.Tensor:
    """A loss to train by, without what draws random numbers."""
    loss: torch.Tensor = model(input_ids=text, labels=text, **keywords).loss
    return loss


def test_pickle_and_deepcopy(kind: str, name: str) -> None:
    model = make(kind, name)
    loss_of(model.train(), tokens(2, 11)).backward()
    same(copy.deepcopy(model), model, exact=True)
    same(pickle.loads(pickle.dumps(model)), model, exact=True)


def test_torch_save_and_load(kind: str, name: str) -> None:
    model, file = make(kind, name), io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    same(torch.load(file, weights_only=False), model, exact=True)


def test_state_dict_round_trip(kind: str, name: str) -> None:
    model, file = make(kind, name), io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    fresh = converted(name, layers=2) if kind == "converted" else hf.LongspanForCausalLM.wrap(own(name, layers=2))
    fresh.load_state_dict(torch.load(file, weights_only=True))
    same(fresh, model, exact=True)


def test_save_pretrained_and_auto_classes(kind: str, name: str, tmp_path: Path) -> None:
    model = make(kind, name)
    model.save_pretrained(tmp_path)
    same(transformers.AutoModelForCausalLM.from_pretrained(tmp_path), model)


def test_trainer_step(kind: str, name: str, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    text = tokens(4, 13)
    data = [{"input_ids": row, "labels": row} for row in text]
    options = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=1,
        learning_rate=0.1,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0.0,
        per_device_train_batch_size=4,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        logging_strategy="no",
    )
    model = make(kind, name)
    byhand, called = copy.deepcopy(model), dict[str, Any]()
    model.register_forward_pre_hook(lambda _, args, keywords: called.update(keywords), with_kwargs=True)
    transformers.Trainer(model=model, args=options, train_dataset=data).train()
    optimizer = torch.optim.SGD(byhand.parameters(), lr=0.1)
    torch.manual_seed(options.seed)
    items = called["num_items_in_batch"]
    assert int(items) in (4 * 12, 4 * 13)  # transformers 5.6 counts the first label of a row, which nothing predicts
    loss_of(byhand.train(), text, num_items_in_batch=items).backward()
    optimizer.step()
    for (key, ours), theirs in zip(model.named_parameters(), byhand.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, msg=labeled(key))


def test_adapters_train_save_load_and_merge(kind: str, name: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model, text = make(kind, name), tokens(2, 13)
    base = copy.deepcopy(model)
    settings = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    tuned = peft.get_peft_model(model, settings)
    optimizer = torch.optim.SGD([parameter for parameter in tuned.parameters() if parameter.requires_grad], lr=0.1)
    loss_of(tuned.train(), text).backward()
    optimizer.step()
    tuned.save_pretrained(tmp_path)
    with tuned.disable_adapter():
        same(tuned, base)
    same(peft.PeftModel.from_pretrained(base, tmp_path), tuned, exact=True)
    same(copy.deepcopy(tuned).merge_and_unload(), tuned)


def test_offloaded(kind: str, name: str, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = make(kind, name)
    plain = copy.deepcopy(model)
    same(accelerate.cpu_offload(copy.deepcopy(model), execution_device=torch.device("cpu")), plain)
    same(accelerate.disk_offload(model, tmp_path, execution_device=torch.device("cpu")), plain)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One process of data parallelism."""
    if not torch.distributed.is_available():
        pytest.skip("torch without distributed")
    store = tmp_path_factory.mktemp("store") / "file"
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(os.name == "nt", reason="gloo of one process by a file")
def test_distributed_data_parallel(kind: str, name: str, world: None) -> None:
    model = make(kind, name).train()
    alone = copy.deepcopy(model)
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    # a second call fails where a parameter of the first got no gradient; short rows have no second segment
    for length in (3, 13, 13):
        text = tokens(2, length)
        for replica in (parallel, alone):
            torch.manual_seed(0)
            replica.zero_grad()
            loss_of(replica, text).backward()
    for (key, ours), theirs in zip(model.named_parameters(), alone.parameters(), strict=True):
        if ours.requires_grad:
            assert ours.grad is not None, key
            expected = torch.zeros_like(ours) if theirs.grad is None else theirs.grad
            torch.testing.assert_close(ours.grad, expected, msg=labeled(key))
