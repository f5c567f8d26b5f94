"""Routing's clusters: k-means, clusters that lose their members and come back, statistics in narrow models."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.mixers.test_routing_mixer import FIELDS, build, centroids, drawn, started
from torch import Tensor

import longspan as ls
from longspan.mechanisms.routing.kmeans import STATISTICS, seeded, spherical_kmeans


def test_kmeans_finds_what_is_there_and_keeps_what_it_cannot_replace() -> None:
    generator = torch.Generator().manual_seed(0)
    centers = F.normalize(torch.randn(2, 5, 16, generator=generator), dim=-1)
    vectors = F.normalize(centers[:, :, None] + 0.02 * torch.randn(2, 5, 12, 16, generator=generator), dim=-1)
    random = F.normalize(torch.randn(2, 5, 16, generator=generator), dim=-1)
    means = spherical_kmeans(vectors.flatten(1, 2), random, generator)
    assert (centers @ means.mT).max(-1).values.min() > 0.99
    equal = centers[:, :2].repeat_interleave(6, 1)  # two vectors, many times: three clusters stay without members
    means = spherical_kmeans(equal, random, generator)
    torch.testing.assert_close(means[:, 2:], random[:, 2:])
    assert ((centers[:, :2] @ means[:, :2].mT).max(-1).values > 0.999).all()


def test_seeds_are_drawn_where_no_centroid_is() -> None:
    generator = torch.Generator().manual_seed(0)
    axes = torch.eye(5)[None].repeat_interleave(2, 0)
    means, dead = axes[:, [0, 1, 2, 0]], torch.tensor([[False, False, True, True], [False, False, False, True]])
    vectors = torch.cat([axes[:, [0, 1, 1, 3, 4]], torch.zeros(2, 3, 5)], 1)
    seeds = seeded(vectors, means, dead, generator)
    assert torch.equal(seeds[~dead], means[~dead])
    assert sorted(seeds[0, 2:].argmax(-1).tolist()) == [3, 4]
    assert int(seeds[1, 3].argmax()) in (3, 4)
    assert torch.equal(seeded(vectors[:, :3], means, dead, generator), means), "every vector has a centroid"


# clusters that lose their members ----------------------------------------------------------------------------


def modes(step: int, count: int = 4, copies: int = 20) -> tuple[Tensor, Tensor]:
    """Unit vectors (1, 4 heads, count * copies, 4) around `count` directions, and the direction of each."""
    number = torch.arange(count).repeat(copies)
    generator = torch.Generator().manual_seed(step)
    noise = 0.05 * torch.randn(1, 4, len(number), 4, generator=generator, dtype=torch.float64)
    return F.normalize(torch.eye(4, dtype=torch.float64)[number] + noise, dim=-1), number


def learn(mixer: Any, steps: int) -> list[int]:
    """Clusters with members, over all heads, at each step."""
    busy = []
    for step in range(1, steps + 1):
        x, _ = modes(step)
        chosen = ls.ops.routing_clusters(x, centroids(mixer))
        busy.append(sum(len(head.unique()) for head in chosen[0]))
        mixer.core.see([(x, chosen)], torch.ones(1, x.shape[2], dtype=torch.bool))
        mixer.after_step(step)
    return busy


def collapsed(**fields: Any) -> Any:
    """Every centroid but one lies far from all vectors."""
    mixer = build(**fields)
    core = mixer.core
    core.draws += 1
    core.centroids.copy_(-torch.eye(4, dtype=torch.float64) - 2)
    core.centroids[:, 0] = 0.5
    core.centroids.copy_(F.normalize(core.centroids, dim=-1))
    core.ema_sum.copy_(80 * core.centroids)
    core.ema_count.fill_(80)
    return mixer


def test_clusters_without_members_come_back_where_members_are() -> None:
    never = learn(collapsed(decay=0.9, reseed=0.0), 60)
    assert never == [4] * 60
    mixer = collapsed(decay=0.9)
    busy = learn(mixer, 60)
    assert busy[0] == 4
    assert busy[-1] == 16, "every cluster of every head has members"
    clusters = ls.ops.routing_clusters(modes(99)[0], centroids(mixer))
    for head in clusters[0]:
        assert len({(int(c), int(m)) for c, m in zip(head, modes(99)[1], strict=True)}) == 4, "one cluster a direction"
    assert mixer.redraw_count == 1, "no draw: states stay valid"
    again = collapsed(decay=0.9)
    torch.manual_seed(5)
    assert learn(again, 60) == busy
    for name in STATISTICS:
        assert torch.equal(again.core.get_buffer(name), mixer.core.get_buffer(name)), name


def test_a_cluster_restarts_at_a_vector_of_the_step_with_an_even_share() -> None:
    mixer = collapsed(decay=0.5, reseed=0.3)
    core = mixer.core
    core.ema_count[:, 2] = 1
    x, _ = modes(1)
    chosen = ls.ops.routing_clusters(x, centroids(mixer))
    core.see([(x, chosen)], torch.ones(1, 80, dtype=torch.bool))
    mixer.after_step(2)
    counts = torch.tensor([120.0, 40, 0.5, 40]).double()
    counts[2] = counts.mean()
    torch.testing.assert_close(core.ema_count, counts.expand(4, -1))
    near = (x[0] @ centroids(mixer)[:, 2, :, None])[..., 0].amax(-1)
    torch.testing.assert_close(near, torch.ones_like(near))
    torch.testing.assert_close(core.ema_sum[:, 2], counts[2] * centroids(mixer)[:, 2])


def test_steps_without_vectors_and_zero_vectors_move_no_centroid() -> None:
    mixer = started(decay=0.5)
    before = {name: mixer.core.get_buffer(name).clone() for name in STATISTICS}
    mixer(drawn(2, 6), mask=torch.zeros(2, 6, dtype=torch.bool))
    mixer.after_step(2)
    for name, buffer in before.items():
        assert torch.equal(mixer.core.get_buffer(name), buffer), name
    with torch.no_grad():
        mixer.projections.q_proj.weight.zero_()
    for step in range(3, 60):
        mixer(drawn(2, 6))
        mixer.after_step(step)
    norms = centroids(mixer).norm(dim=-1)
    torch.testing.assert_close(norms, torch.ones_like(norms))


# precision ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_statistics_stay_wide_whatever_the_model_is(dtype: torch.dtype) -> None:
    mixer = started(decay=0.999, reseed=0.0).float()
    exact = centroids(mixer).clone()
    mixer.to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    assert {name: mixer.core.get_buffer(name).dtype for name in STATISTICS} == dict.fromkeys(STATISTICS, wide)
    assert torch.equal(centroids(mixer).float(), exact), "no bit is lost on the way"
    twin = started(decay=0.999, reseed=0.0).float()
    x, _ = modes(1)
    for step in range(2, 40):
        for model in (mixer, twin):
            vectors = x.to(model.core.ema_sum.dtype)
            chosen = ls.ops.routing_clusters(vectors, centroids(model))
            model.core.see([(vectors, chosen)], torch.ones(1, x.shape[2], dtype=torch.bool))
            model.after_step(step)
    torch.testing.assert_close(centroids(mixer).float(), centroids(twin), atol=1e-5, rtol=0)
    assert (centroids(twin) - exact).abs().max() > 0.01
    y, _ = mixer(drawn(1, 9).to(dtype))
    assert y.dtype == dtype
    mixer.after_step(40)


def test_statistics_are_wide_where_the_default_is_narrow() -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        mixer = ls.mixers.build("routing", dim=16, num_heads=4, **FIELDS)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {mixer.core.get_buffer(name).dtype for name in STATISTICS} == {torch.float32}
    with torch.device("meta"):
        bare = ls.mixers.build("routing", dim=16, num_heads=4, **FIELDS)
    bare.to(torch.bfloat16).to_empty(device="cpu")
    bare.load_state_dict(mixer.state_dict())
    assert torch.equal(centroids(bare), centroids(mixer))


def test_a_narrow_model_is_saved_and_loaded_as_it_is(tmp_path: Path) -> None:
    mixers = ({"name": "routing", **FIELDS},)
    model = ls.Decoder(ls.DecoderConfig(vocab_size=11, dim=16, num_layers=1, num_heads=2, mixers=mixers))
    model.bfloat16()
    model(torch.randint(11, (2, 40)))
    model.after_step(1, torch.Generator().manual_seed(1))
    ls.save_model(model, tmp_path)
    again = ls.load_model(tmp_path)
    for name, tensor in model.state_dict().items():
        assert again.state_dict()[name].dtype == tensor.dtype, name
        assert torch.equal(again.state_dict()[name], tensor), name
