"""What forwards count for later steps: beside the buffers, in fp32, over all processes (a report on `performer`)."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import longspan as ls

from .models import CONVERTIBLE, FIELDS, NAMES, converted, own, tokens

BOUNDED: dict[str, Any] = {"num_features": 8, "kind": "bounded"}
COUNTING: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, FIELDS[name]) for name in NAMES},
    "performer, bounded": ("performer", BOUNDED),
    "heads, bounded": (
        "mixed_heads",
        {"mixers": [{"name": "performer", "num_heads": 1, **BOUNDED}, {"name": "full", "num_heads": 1}]},
    ),
}


def buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def train(model: nn.Module, seed: int = 0) -> None:
    """One training forward and backward of two padded rows."""
    ids = tokens(2, 12, seed)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[0, 9:] = False
    if isinstance(model, ls.Decoder):
        out = model(ids, mask=mask)[0]
    else:
        out = model(input_ids=ids, attention_mask=mask.long()).logits
    out.float().logsumexp(-1).sum().backward()


def check_untouched(model: nn.Module) -> None:
    before = buffers(model)
    model.train()
    train(model)
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name]), name
    dtypes = {name: buffer.dtype for name, buffer in model.named_buffers() if "rotary_emb" not in name}
    model.bfloat16()
    for name, dtype in dtypes.items():
        assert model.get_buffer(name).dtype == dtype, f"{name} follows the model's type"


@pytest.mark.parametrize("case", COUNTING)
def test_a_training_forward_changes_no_buffer(case: str) -> None:
    name, fields = COUNTING[case]
    check_untouched(own(mixers=({"name": name, **fields},)))


@pytest.mark.parametrize("name", [*(name for name in CONVERTIBLE if name in ("lsh", "routing")), "performer, bounded"])
def test_a_training_forward_of_a_converted_model_changes_no_buffer(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "performer, bounded":
        monkeypatch.setitem(FIELDS, "performer", BOUNDED)
    check_untouched(converted(name.split(",")[0]))


def performer(dtype: torch.dtype = torch.float32, **fields: Any) -> Any:
    torch.manual_seed(0)
    return ls.mixers.build("performer", dim=16, num_heads=2, **BOUNDED, **fields).to(dtype)


def test_narrow_models_count_beyond_256_forwards() -> None:
    """299 steps of vectors of length zero and one of long ones, whose share of the mean is a 300th."""
    control = performer(torch.float64, redraw_every=300)
    narrow = [performer(dtype, redraw_every=300) for dtype in (torch.bfloat16, torch.float16)]
    for step in range(1, 301):
        x = torch.full((1, 1, 16), 8.0 if step == 300 else 0.0)
        for mixer in (control, *narrow):
            mixer(x.to(mixer.projections.q_proj.weight.dtype))
            mixer.after_step(step, torch.Generator().manual_seed(0))
    for mixer in narrow:
        torch.testing.assert_close(mixer.core.bound.double(), control.core.bound, rtol=2e-2, atol=0)
        assert torch.equal(mixer.core.projection.double(), control.core.projection), "redrawn, and not rounded"
        assert float(mixer.core.pending_square[1]) == 0


def test_forwards_of_a_step_count_as_one_of_all_their_rows() -> None:
    """Gradient accumulation: eight forwards of a row, padded differently, and one forward of eight rows."""
    parts, whole = performer(redraw_every=1), performer(redraw_every=1)
    x = torch.randn(8, 9, 16, generator=torch.Generator().manual_seed(1))
    mask = torch.arange(9) < torch.arange(1, 9)[:, None]
    whole(x, mask=mask)
    for row in range(8):
        parts(x[row : row + 1], mask=mask[row : row + 1])
    for mixer in (parts, whole):
        mixer.after_step(1, torch.Generator().manual_seed(0))
    torch.testing.assert_close(parts.core.bound, whole.core.bound)
    q, k, _ = (t.double() for t in parts.projections(x))
    real_q, real_k = (t.transpose(1, 2)[mask].flatten(0, 1) * 8**-0.25 for t in (q, k))
    pairs = (real_q[:, None] + real_k[None]).square().sum(-1).mean()
    expected_bound = ls.ops.bounded_constant(pairs, 8)
    torch.testing.assert_close(parts.core.bound.double(), expected_bound.detach(), rtol=1e-5, atol=0)


def test_an_overflow_is_no_measurement() -> None:
    """Loss scaling steps over a forward with infinities; the bound survives it."""
    mixer = performer(redraw_every=1)
    before = mixer.core.bound.clone()
    mixer(torch.full((1, 3, 16), torch.inf))
    mixer.after_step(1)
    assert torch.equal(mixer.core.bound, before)


def test_a_model_saved_with_the_statistics_in_its_type_loads() -> None:
    stored = performer(torch.bfloat16).state_dict()
    stored |= {"core.pending_square": torch.tensor([24.0, 8.0], dtype=torch.bfloat16)}
    mixer = performer(redraw_every=1)
    mixer.load_state_dict(stored)
    mixer.after_step(1)
    torch.testing.assert_close(mixer.core.bound, ls.ops.bounded_constant(torch.tensor(3.0), 8))


TWO = f"""
import sys, torch, longspan as ls
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

folder = sys.argv[1]
FIELDS = {{
    "performer": dict({BOUNDED!r}, redraw_every=2),
    "lsh": dict(bucket_size=2, num_hashes=2, num_buckets=4, redraw_every=2, shared_qk=False),
}}

def run(rank, world, name):
    torch.manual_seed(0)
    mixer = ls.mixers.build(name, dim=16, num_heads=2, **FIELDS[name])
    model = DistributedDataParallel(mixer) if world > 1 else mixer
    for step in range(1, 5):
        for part in range(2):  # synchronised forwards: buffers are given to all before each
            x = torch.randn(4, 9, 16, generator=torch.Generator().manual_seed(2 * step + part))
            if world > 1:
                x = x[2 * rank : 2 * rank + 2]
            model(x)[0].sum().backward()
        mixer.after_step(step, torch.Generator().manual_seed(step + 10 * rank))
    torch.save(mixer.core.state_dict(), f"{{folder}}/{{name}}-{{world}}-{{rank}}.pt")

def work(rank):
    dist.init_process_group("gloo", init_method=f"file://{{folder}}/store", rank=rank, world_size=2)
    for name in FIELDS:
        run(rank, 2, name)
    dist.destroy_process_group()

if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.multiprocessing.start_processes(work, nprocs=2, start_method="fork")
    for name in FIELDS:
        run(0, 1, name)
"""


@pytest.mark.long
def test_two_processes_measure_and_draw_what_one_does(tmp_path: Path) -> None:
    """Inside DistributedDataParallel, with generators that differ between the processes."""
    script = tmp_path / "script.py"
    script.write_text(TWO)
    done = subprocess.run([sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    for name in ("performer", "lsh"):
        first, second, alone = (torch.load(tmp_path / f"{name}-{which}.pt") for which in ("2-0", "2-1", "1-0"))
        for key, tensor in alone.items():
            assert torch.equal(first[key], second[key]), f"{name}: {key} differs between processes"
            torch.testing.assert_close(first[key], tensor, rtol=1e-5, atol=0)
