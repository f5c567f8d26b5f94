"""The peak of tensors in a step: against sums that are known, with freed and frozen tensors."""

import torch
from torch import nn

from longspan.train.training_memory import PeakBytes


def test_tensors_count_while_they_are_alive() -> None:
    kept = torch.zeros(100)
    with PeakBytes([kept]) as tracker:
        assert tracker.live == 400
        first = torch.zeros(1000)
        view = first[:10]
        # a view is no storage of its own
        assert tracker.live == 4400
        del first
        assert tracker.live == 4400
        del view
        assert tracker.live == 400
        second = torch.zeros(500)
    assert tracker.peak == 4400
    assert second.shape == (500,)


def test_the_same_storage_counts_once() -> None:
    weight = torch.zeros(100)
    with PeakBytes([weight, weight.view(10, 10)]) as tracker:
        weight.add_(1)
    assert tracker.peak == 400


def test_gradients_of_trained_parameters_alone() -> None:
    frozen, trained = nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)
    frozen.requires_grad_(False)
    model, row = nn.Sequential(frozen, trained), torch.zeros(1, 64)
    with PeakBytes(model.parameters()) as tracker:
        model(row).sum().backward()
        weight = 64 * 64 * 4
        # two weights and one gradient, and rows of 64 numbers
        assert 3 * weight <= tracker.live < 3 * weight + 4 * 64 * 4
