"""Routing as a layer: when and how its centroids learn, sessions that own their state, the size of a state."""

import functools
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import longspan as ls
from longspan.contract.registry import mechanism_class
from longspan.mechanisms.routing import kmeans
from longspan.mechanisms.routing.kmeans import SAMPLES

FIELDS: dict[str, Any] = {"num_clusters": 4, "window": 5}


def build(**fields: Any) -> Any:
    torch.manual_seed(0)
    return ls.mixers.build("routing", dim=16, num_heads=4, num_kv_heads=2, **{**FIELDS, **fields}).double()


def started(**fields: Any) -> Any:
    """A mixer whose first batch has set the centroids."""
    mixer = build(**fields)
    mixer(drawn(3, 40))
    mixer.after_step(1, torch.Generator().manual_seed(1))
    return mixer


def drawn(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randn(batch, length, 16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def centroids(mixer: Any) -> Tensor:
    means: Tensor = mixer.core.get_buffer("centroids")
    return means


def routed(mixer: Any, x: Tensor) -> list[Tensor]:
    """The routing vectors (tokens, head_dim) of every head with centroids."""
    q, k, _ = mixer.projections(x)
    core = mixer.core
    assert isinstance(core, mechanism_class("routing"))
    if core.shared:
        parts = q[:, :, None]
    else:
        parts = torch.cat([q.unflatten(1, (core.routed_heads, -1)), k[:, :, None]], 2)
    return list(F.normalize(parts, dim=-1).transpose(0, 1).flatten(1, 3).detach().unbind())


def moved_by_hand(mixer: Any, batches: list[Tensor]) -> Tensor:
    """s <- decay s + the members' sum, n <- decay n + their number, mu = s / |s|; without members it stays."""
    means = centroids(mixer).clone()
    sums, counts = (mixer.core.get_buffer(name).clone() for name in ("ema_sum", "ema_count"))
    decay = mixer.core.config.decay
    for head, mean in enumerate(centroids(mixer)):
        vectors = torch.cat([routed(mixer, x)[head] for x in batches])
        nearest = (vectors @ mean.mT).argmax(-1)
        for cluster in range(len(mean)):
            members = vectors[nearest == cluster]
            moved = decay * sums[head, cluster] + members.sum(0)
            assert (
                decay * counts[head, cluster] + len(members) >= 0.1 * (decay * counts[head] + len(vectors) / 4).mean()
            )
            if len(members):
                means[head, cluster] = moved / moved.norm()
    return means


# what the centroids learn ------------------------------------------------------------------------------------


@pytest.mark.parametrize("selection", ["strict", "balanced"])
@pytest.mark.parametrize("shared", [True, False])
def test_a_step_moves_the_centroids_as_by_hand(shared: bool, selection: str) -> None:
    mixer, x = started(shared_qk=shared, selection=selection, decay=0.8), drawn(2, 30, seed=4)
    expected = moved_by_hand(mixer, [x])
    before = centroids(mixer).clone()
    mixer(x)
    assert torch.equal(centroids(mixer), before), "a forward moved them"
    mixer.after_step(2)
    torch.testing.assert_close(centroids(mixer), expected, atol=1e-12, rtol=0)
    assert (expected - before).abs().max() > 1e-3
    mixer.after_step(3)
    torch.testing.assert_close(centroids(mixer), expected, atol=1e-12, rtol=0, msg="what a step has seen counts once")


def test_forwards_before_a_step_add_up_and_padding_counts_for_nothing() -> None:
    mixer = started(decay=0.5)
    batches = [drawn(2, 30, seed=4), drawn(1, 9, seed=5)]
    expected = moved_by_hand(mixer, batches)
    padded = torch.cat([100 * drawn(2, 7, seed=6), batches[0]], 1)
    mixer(padded, mask=(torch.arange(37) >= 7).expand(2, -1))
    mixer(batches[1])
    mixer.after_step(2)
    torch.testing.assert_close(centroids(mixer), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("selection", ["strict", "balanced"])
def test_evaluation_and_recomputation_add_nothing(selection: str) -> None:
    mixer, x = started(decay=0.5, selection=selection), drawn(2, 30, seed=4)
    before, expected = centroids(mixer).clone(), moved_by_hand(mixer, [x])
    mixer.eval()(x)
    with torch.no_grad():
        mixer.train()(x)
    mixer.after_step(2)
    assert torch.equal(centroids(mixer), before)

    def forward(x: Tensor) -> Tensor:
        aux_losses: list[Tensor] = []
        y: Tensor = mixer(x, aux_losses=aux_losses)[0]
        return y.sum() + sum(aux_losses)

    x = x.requires_grad_()
    (exact,) = torch.autograd.grad(forward(x), x)
    mixer.core.pending = None
    (again,) = torch.autograd.grad(torch.utils.checkpoint.checkpoint(forward, x, use_reentrant=False), x)
    assert torch.equal(again, exact)
    mixer.after_step(3)
    torch.testing.assert_close(centroids(mixer), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("shared", [True, False])
def test_the_first_batch_sets_the_centroids(shared: bool) -> None:
    mixer, x = build(shared_qk=shared), 0.5 * drawn(3, 40) + drawn(1, 1, seed=1)  # tokens have much in common
    generator = torch.Generator().manual_seed(0)
    random = F.normalize(torch.randn(centroids(mixer).shape, generator=generator), dim=-1).double()
    assert torch.equal(centroids(mixer), random)
    mixer.after_step(1)
    assert torch.equal(centroids(mixer), random), "nothing was seen yet"
    assert mixer.redraw_count == 0
    mixer(x)
    mixer.after_step(2, torch.Generator().manual_seed(1))
    assert mixer.redraw_count == 1
    first_means = centroids(mixer)
    torch.testing.assert_close(first_means.norm(dim=-1), torch.ones(first_means.shape[:2]).double())
    for vectors, mean, random_mean in zip(routed(mixer, x), first_means, random, strict=True):
        near, far = ((vectors @ means.mT).max(-1).values.mean() for means in (mean, random_mean))
        assert 1 - near < 0.7 * (1 - far)
        assert len((vectors @ mean.mT).argmax(-1).unique()) == 4
    again = build(shared_qk=shared)
    again(x)
    again.after_step(1, torch.Generator().manual_seed(1))
    assert torch.equal(centroids(again), first_means)


def test_the_first_sample_is_filled_over_several_forwards() -> None:
    mixer = build()
    for length in (5, 1, 300):
        mixer(drawn(1, length))
    pending = mixer.core.pending
    assert pending.filled.all()
    assert torch.equal(pending.sample[:, :5], torch.stack(routed(mixer, drawn(1, 5))))
    long = torch.stack(routed(mixer, drawn(1, 300)))
    torch.testing.assert_close(pending.sample[:, 6:], long[:, torch.arange(26) * 300 // 26])
    mixer.after_step(1, torch.Generator().manual_seed(1))
    assert mixer.core.pending is None


@pytest.mark.parametrize("shared", [True, False])
def test_a_sample_has_real_vectors_of_every_kind(shared: bool) -> None:
    mixer, x = build(shared_qk=shared), drawn(2, 30)
    mask = torch.arange(30) >= torch.tensor([[25], [28]])  # 7 tokens
    mixer(x, mask=mask)
    kinds = 1 if shared else 3  # two queries and a key share centroids
    pending = mixer.core.pending
    assert pending.filled.sum() == 7 * kinds
    for sample, vectors in zip(pending.sample[:, : 7 * kinds], routed(mixer, x), strict=True):
        real = vectors.unflatten(0, (2, kinds, 30)).transpose(1, 2)[mask].flatten(0, 1)
        torch.testing.assert_close(sample.sort(0).values, real.sort(0).values)


def test_more_processes_than_samples_share_one_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    filled = torch.zeros(SAMPLES * 4, dtype=torch.int64)
    for rank in range(50):
        monkeypatch.setattr(kmeans, "processes", lambda rank=rank: (rank, 50))
        mixer = build()
        mixer(drawn(1, 9))
        filled += mixer.core.pending.filled
    assert torch.equal(filled, torch.ones_like(filled))


def test_the_first_batch_voids_states_and_later_ones_do_not() -> None:
    mixer, x = build(), drawn(2, 30)
    _, state = mixer(x)
    _, empty = mixer(x[:, :0])
    mixer.after_step(1)
    with pytest.raises(ls.UnsupportedError, match=r"routing: .* another draw of the centroids"):
        mixer(x, state)
    mixer(x, empty)
    _, state = mixer(x)
    mixer.after_step(2)
    mixer(x, state)


@pytest.mark.parametrize("shared", [True, False])
def test_commitment_is_a_penalty_that_moves_queries_and_keys_and_no_centroid(shared: bool) -> None:
    mixer, x = started(shared_qk=shared, commitment=0.5), drawn(2, 30, seed=4)
    aux_losses: list[Tensor] = []
    mask = torch.arange(30) < torch.tensor([[30], [12]])
    mixer(x, mask=mask, aux_losses=aux_losses)
    (penalty,) = aux_losses
    expected = torch.zeros((), dtype=torch.float64)
    q, k, _ = mixer.projections(x)
    for part in (q,) if shared else (q, k):
        means = centroids(mixer).repeat_interleave(part.shape[1] // centroids(mixer).shape[0], 0)
        unit = F.normalize(part, dim=-1)
        square = torch.cdist(unit, means.expand(2, -1, -1, -1)).min(-1).values.square()
        expected = expected + 0.5 * square.transpose(1, 2)[mask].mean()
    torch.testing.assert_close(penalty, expected, atol=1e-10, rtol=0)
    penalty.backward()
    projections = dict(mixer.projections.named_parameters())
    assert projections["q_proj.weight"].grad.abs().max() > 0
    assert ("k_proj.weight" in projections) != shared
    assert shared or projections["k_proj.weight"].grad.abs().max() > 0
    assert projections["v_proj.weight"].grad is None
    assert not centroids(mixer).requires_grad
    aux_losses = []
    build(commitment=0.0)(x, aux_losses=aux_losses)
    assert aux_losses == []


def test_centroids_are_saved_with_a_model(tmp_path: Path) -> None:
    mixers = ({"name": "routing", **FIELDS},)
    model = ls.Decoder(ls.DecoderConfig(vocab_size=11, dim=16, num_layers=2, num_heads=2, mixers=mixers))
    for step in (1, 2, 3):
        model(torch.randint(11, (2, 40)))
        model.after_step(step, torch.Generator().manual_seed(step))
    ls.save_model(model, tmp_path)
    again, tokens = ls.load_model(tmp_path), torch.randint(11, (1, 40))
    assert torch.equal(again(tokens)[0], model.eval()(tokens)[0])
    for name, buffer in model.named_buffers():
        assert torch.equal(dict(again.named_buffers())[name], buffer), name
    assert again.redraw_count == model.redraw_count == 2
    twin = build()
    mixer = started()
    twin.load_state_dict(mixer.state_dict())
    assert torch.equal(twin.eval()(drawn(1, 20))[0], mixer.eval()(drawn(1, 20))[0])


TWO = """
import sys, torch, longspan as ls
import torch.distributed as dist
folder = sys.argv[1]
dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(0)
fields = dict(num_clusters=4, window=5, shared_qk=False, decay=0.1, reseed=0.7)
mixer = ls.mixers.build("routing", dim=16, num_heads=4, num_kv_heads=2, **fields).double()
wrapped = torch.nn.parallel.DistributedDataParallel(mixer)
for step in range(1, 5):
    for part in range(3):  # synchronised forwards: buffers are given to all before each
        generator = torch.Generator().manual_seed(3 * step + part)
        x = torch.randn(4, 30, 16, generator=generator, dtype=torch.float64)
        if step == 4:
            x = x + 3 * x[:1, :1]  # clusters lose their members
        wrapped(x[2 * rank : 2 * rank + 2])[0].sum().backward()
    mixer.after_step(step, torch.Generator().manual_seed(step if step == 1 else rank))
torch.save(mixer.core.state_dict(), f"{folder}/{rank}.pt")
dist.destroy_process_group()
"""


@pytest.mark.long
def test_two_processes_learn_the_centroids_of_one(tmp_path: Path) -> None:
    """Also inside DistributedDataParallel, several synchronised forwards a step."""
    script = tmp_path / "script.py"
    script.write_text(TWO)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    process = subprocess.Popen([*command, str(tmp_path)], stderr=subprocess.PIPE, text=True)
    try:
        _, shown = process.communicate(timeout=200)
    finally:
        process.terminate()  # torchrun ends its workers when it is asked to, not when it is killed
        process.wait()
    assert process.returncode == 0, shown
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    alone = build(shared_qk=False, decay=0.1, reseed=0.7)
    for step in range(1, 5):
        seen = centroids(alone).clone()
        for part in range(3):
            x = drawn(4, 30, seed=3 * step + part)
            alone(x + 3 * x[:1, :1] if step == 4 else x)
        alone.after_step(step, torch.Generator().manual_seed(step))
    assert (centroids(alone) - seen).abs().max() > 0.5, "one centroid restarted"
    for name, tensor in alone.core.state_dict().items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], tensor, atol=1e-9, rtol=0, msg=functools.partial("{}: {}".format, name))


# as a layer --------------------------------------------------------------------------------------------------


def test_with_room_for_all_it_is_the_full_mixer() -> None:
    torch.manual_seed(0)
    full = ls.mixers.build("full", dim=16, num_heads=4, num_kv_heads=2, rope=10000.0).double()
    x = drawn(2, 50)
    for fields in ({"selection": "strict", "num_clusters": 1}, {"selection": "balanced", "num_clusters": 3}):
        mixer = build(shared_qk=False, window=50, rope=10000.0, **{"num_clusters": 4} | fields)
        mixer.projections.load_state_dict(full.projections.state_dict())
        torch.testing.assert_close(mixer(x)[0], full(x)[0], atol=1e-10, rtol=0)


def test_half_window_half_routing() -> None:
    """The paper's configuration: equal to each part alone on its heads, and it streams."""
    parts: list[dict[str, Any]] = [
        {"name": "window", "num_heads": 2, "window": 8},
        {"name": "routing", "num_heads": 2, **FIELDS},
    ]
    torch.manual_seed(0)
    mixer: Any = ls.mixers.build("mixed_heads", dim=16, num_heads=4, mixers=parts).double().train()
    x = drawn(2, 60)
    aux_losses: list[Tensor] = []
    y, _ = mixer(x, aux_losses=aux_losses)
    assert len(aux_losses) == 1
    mixer.after_step(1, torch.Generator().manual_seed(0))
    assert mixer.redraw_count == 1
    mixer.eval()
    y, end = mixer(x)
    state: Any = None
    outs = []
    for part in x.split((31, 1, 28), 1):
        out, state = mixer(part, state)
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 1), y, atol=1e-9, rtol=0)
    torch.testing.assert_close(state.parts[1].k, end.parts[1].k, atol=1e-9, rtol=0)
    q, k, v = mixer.projections(x)
    near = ls.ops.window_attention(q[:, :2], k[:, :2], v[:, :2], window=8)
    means = mixer.core.cores[1].get_buffer("centroids")
    far = ls.reference.routing_attention(
        q[:, 2:], F.normalize(q[:, 2:], dim=-1), v[:, 2:], means, window=5, include_self=False, scale=1.0,
        clusters=(ls.reference.routing_clusters(q[:, 2:], means),) * 2,
    )  # fmt: skip
    torch.testing.assert_close(y, mixer.projections.output(torch.cat([near, far], 1)), atol=1e-9, rtol=0)
    assert mixer.traits.streams
    parts[1] |= {"selection": "balanced"}
    mixed = ls.mixers.build("mixed_heads", dim=16, num_heads=4, mixers=parts)
    assert (mixed.traits.causal, mixed.traits.value_causal, mixed.traits.streams) == (False, True, False)


def test_clusters_know_content_alone_and_weights_know_positions() -> None:
    rotary, plain, x = build(rope=10000.0).eval(), build().eval(), drawn(1, 40)
    maps = [mixer.attention_map(x) for mixer in (rotary, plain)]
    assert torch.equal(maps[0] != 0, maps[1] != 0)
    assert (maps[0] - maps[1]).abs().max() > 0.01


def test_balanced_does_not_stream_and_says_why() -> None:
    mixer, x = build(selection="balanced"), drawn(1, 30)
    traits = mixer.traits
    assert (traits.causal, traits.value_causal, traits.streams) == (False, True, False)
    y, state = mixer(x)
    assert state is None
    calls: list[Any] = [lambda: mixer.init_state(1), lambda: mixer(x, build().init_state(1))]
    for refused in calls:
        with pytest.raises(ls.UnsupportedError, match="selection='balanced' depends on later tokens"):
            refused()
    assert mixer.state_nbytes(1, 10) == 0
    assert build().core.strict, "the default where causal"
    assert build().core.shared, "the default where causal"
    both = build(causal=False)
    assert not both.core.strict, "the default where not"
    assert not both.core.shared, "the default where not"
    assert (both(x)[0] - y).abs().max() > 0.01


def test_a_state_is_smaller_than_a_cache_from_the_stated_length_on() -> None:
    """At the defaults, heads of 64, fp32; the docstring says 4,161."""
    routing = ls.mixers.build("routing", dim=128, num_heads=2)
    cache = ls.mixers.build("full", dim=128, num_heads=2)
    rings = routing.state_nbytes(1, 10**6)
    assert cache.state_nbytes(1, 4160) <= rings < cache.state_nbytes(1, 4161)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_clusters": 0}, "routing.num_clusters = 0: must be at least 1"),
        ({"window": 0}, "routing.window = 0: must be at least 1"),
        ({"decay": 1.5}, "routing.decay = 1.5: must be from 0 to 1"),
        ({"commitment": -1.0}, "routing.commitment = -1.0: must be at least 0"),
        ({"selection": "top"}, "routing.selection"),
        ({"clusters": 2}, "routing: unknown field 'clusters'; did you mean 'num_clusters'"),
    ],
)
def test_wrong_arguments_raise_one_clear_line(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ls.ConfigError, match=message):
        build(**fields)
