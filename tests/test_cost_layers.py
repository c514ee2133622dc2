"""The table by layer of `composer-se cost`."""

from __future__ import annotations

import pytest
import torch
from helpers import cost_settings
from torch import nn

from composer_se.cost.layers import BUILT_IN, NORM, NOTHING, OURS, LayerKind, LayerTimes, measure_layers
from composer_se.functional import apply_squeeze_excite


def kind(count: int, channels: int = 8) -> LayerKind:
    return LayerKind(channels, 4, 4, 2, "BatchNorm2d", count)


def test_sum_counts_each_layer_as_often_as_the_network_has_it() -> None:
    seconds = {
        NOTHING: [[0.001, 0.001], [0.002, 0.002]],
        NORM: [[0.003, 0.005], [0.004, 0.006]],
        OURS: [[0.004, 0.006], [0.006, 0.008]],
        BUILT_IN: [[0.013, 0.015], [0.014, 0.016]],
    }
    times = LayerTimes([kind(3), kind(2, 16)], {"training": seconds})
    assert times.milliseconds("training", NORM, 0) == pytest.approx(3)
    assert times.milliseconds("training", OURS, 1) == pytest.approx(2)
    assert times.added("training", OURS) == pytest.approx([0.007, 0.007])
    assert times.added("training", BUILT_IN) == pytest.approx([0.05, 0.05])
    assert times.share("training").value == pytest.approx(0.14)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "channels_last"])
def test_layers_of_one_shape_are_measured_once(memory_format) -> None:
    pytest.importorskip("composer")
    network = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)),
        *(nn.Conv2d(8, 16, 3), nn.ReLU(inplace=True), nn.Conv2d(16, 4, 1)),
    )
    assert len(apply_squeeze_excite(network, 2, 8)) == 3
    network = network.to(memory_format=memory_format)  # pyright: ignore[reportCallIssue]
    images = torch.randn(2, 3, 6, 6).contiguous(memory_format=memory_format)
    seen: list[tuple[str, int, int]] = []
    settings = cost_settings(against_composer=True, rounds=1)
    times = measure_layers(network, images, settings, lambda *state: seen.append(state))
    assert times.kinds == [LayerKind(8, 6, 6, 2, "BatchNorm2d", 2), LayerKind(16, 4, 4, 2, "none", 1)]
    assert list(times.seconds) == ["training", "inference, batch 1", "inference, batch 2"]
    for of_mode in times.seconds.values():
        assert list(of_mode) == [NOTHING, NORM, OURS, BUILT_IN]
        for of_variant in of_mode.values():
            assert [len(rounds) for rounds in of_variant] == [5, 5]
            assert all(time > 0 for rounds in of_variant for time in rounds)
    assert seen[-1] == ("layers, inference, batch 2", 120, 120)
