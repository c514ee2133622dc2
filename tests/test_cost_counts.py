"""What `composer-se cost` counts exactly, against values worked out by hand."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from composer.algorithms.squeeze_excite.squeeze_excite import SqueezeExciteConv2d as ComposersConv2d
from helpers import cost_settings
from torch import nn

from composer_se import ops
from composer_se.cost.counts import count, saved_bytes
from composer_se.cost.passes import FullSizePasses, full_size_passes
from composer_se.cost.variants import Variant
from composer_se.modules import SqueezeExciteConv2d

FLOAT = 4
IMAGES = 2 * 2 * 25 * FLOAT  # kept by the conv
MAP = 2 * 4 * 25 * FLOAT
STATISTICS = 2 * 4 * FLOAT  # mean and inverse deviation, one each for 4 channels
POOLED = GATES = 2 * 4 * FLOAT
HIDDEN = 2 * 3 * FLOAT


def conv_norm(wrap=None) -> nn.Sequential:
    conv = nn.Conv2d(2, 4, 3, padding=1, bias=False)
    return nn.Sequential(conv if wrap is None else wrap(conv), nn.BatchNorm2d(4))


def saved_by(network: nn.Module) -> int:
    images = torch.randn(2, 2, 5, 5)
    return saved_bytes(lambda: network(images).sum(), (*network.parameters(), *network.buffers()))


def test_plain_conv_and_norm_keep_their_inputs_and_the_batch_statistics():
    assert saved_by(conv_norm()) == IMAGES + MAP + STATISTICS


def test_composers_se_keeps_a_second_copy_of_the_map():
    network = conv_norm(lambda conv: ComposersConv2d(conv=conv, latent_channels=3))
    assert saved_by(network) == IMAGES + 2 * MAP + STATISTICS + POOLED + HIDDEN + GATES


def test_ours_before_a_norm_keeps_one_map_and_numbers_per_map():
    network = conv_norm(lambda conv: SqueezeExciteConv2d(conv=conv, latent_channels=3, followed_by_norm=True))
    saved = saved_by(network)
    assert 0 < saved - (IMAGES + MAP) < MAP / 2  # a map has 25 numbers here; some ten are kept for each


def test_a_storage_saved_twice_or_through_a_view_counts_once():
    x = torch.randn(10, requires_grad=True)

    def forward() -> torch.Tensor:
        y = x.exp()  # saves y
        return (y * y).sum() + (y[:5] * y[5:]).sum()

    assert saved_bytes(forward) == 10 * FLOAT


def test_a_storage_dropped_during_the_forward_pass_is_not_mistaken_for_a_later_one():
    x = torch.randn(1000, requires_grad=True)

    def forward() -> torch.Tensor:
        for _ in range(5):
            x.exp()  # saved, and dropped before the next one takes its place
        return x.exp().sum()

    assert saved_bytes(forward) == 6 * 1000 * FLOAT


def added_passes(wrapper: nn.Module, memory_format=torch.contiguous_format, with_norm: bool = False) -> int:
    inputs = torch.randn(2, 2, 5, 5).contiguous(memory_format=memory_format)
    norm = [nn.BatchNorm2d(4)] if with_norm else []
    with_se, plain = nn.Sequential(wrapper, *norm), nn.Sequential(wrapper.get_submodule("conv"), *norm)
    return full_size_passes(with_se, plain, inputs, nullcontext)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_composers_se_takes_13_full_size_passes(memory_format):
    wrapper = ComposersConv2d(2, 4, 3, latent_channels=3)
    wrapper.conv.weight.data = wrapper.conv.weight.data.contiguous(memory_format=memory_format)
    assert added_passes(wrapper, memory_format) == 13


def test_ours_takes_6_full_size_passes_with_a_norm():
    wrapper = SqueezeExciteConv2d(2, 4, 3, latent_channels=3, followed_by_norm=True)
    # Forward: two reads for the moments; the norm's own kernel becomes the affine map. Backward: two reads for sums,
    # then the affine map and its sum with the scaled gradient, 2 + 3, in the place of the norm's 3.
    assert added_passes(wrapper, with_norm=True) == 2 + 2 + 5 - 3


def test_ours_takes_9_full_size_passes_where_the_norm_cannot_take_the_gates():
    wrapper = SqueezeExciteConv2d(2, 4, 3, latent_channels=3, followed_by_norm=True)
    wrapper.conv.weight.data = wrapper.conv.weight.data.contiguous(memory_format=torch.channels_last)
    # Forward: a read for the mean, the product in place. Backward: a product and its sum, 3 + 1, for the gradient of
    # the gates, then one pass that scales the gradient and adds the share of the mean, in the memory of the product.
    assert added_passes(wrapper, torch.channels_last, with_norm=True) == 1 + 2 + 4 + 2


def test_ours_takes_fewer_full_size_passes_than_the_built_in_without_a_norm():
    assert added_passes(SqueezeExciteConv2d(2, 4, 3, latent_channels=3)) < 13


@pytest.mark.parametrize(
    ("operation", "reads", "writes"),
    [
        (lambda a, b: a + b, 2, 1),
        (lambda a, b: a * a, 1, 1),
        (lambda a, b: a.add_(b), 2, 1),
        (lambda a, b: torch.mul(a, b, out=torch.empty_like(a)), 2, 1),
        (lambda a, b: a.copy_(b), 1, 1),
        (lambda a, b: a.zero_(), 0, 1),
        (lambda a, b: torch.zeros_like(a), 0, 1),
        (lambda a, b: torch.empty_like(a), 0, 0),
        (lambda a, b: a.resize_(6, 4), 0, 0),
        (lambda a, b: a.sum(), 1, 0),
        (lambda a, b: a.view(-1).unsqueeze(0), 0, 0),
        (lambda a, b: a + b[:, :1].expand_as(a), 1, 1),
        (lambda a, b: b[:, :1].expand_as(a) / 5, 0, 1),
        (lambda a, b: torch.stack([a, b]), 2, 0),  # the result is twice as large
    ],
)
def test_reads_and_writes_follow_the_convention(operation, reads, writes):
    a, b = torch.randn(4, 6), torch.randn(4, 6)
    with FullSizePasses(24) as counter:
        operation(a, b)
    assert (counter.reads, counter.writes) == (reads, writes)


def variant(build, *layers: str) -> Variant:
    return Variant("ours", "composer-se", "128", layers, build)


def test_counts_of_a_network_are_those_worked_out_by_hand():
    def build() -> nn.Module:
        body = conv_norm(lambda conv: SqueezeExciteConv2d(conv=conv, latent_channels=3, followed_by_norm=True))
        return nn.Sequential(body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 7))

    images, targets = torch.randn(2, 2, 5, 5), torch.tensor([0, 9])
    counts = count(variant(build, "0.0"), cost_settings(), images, targets)
    assert counts.parameters == 2 * 4 * 9 + 4 * 3 + 3 * 4 + 8 + 4 * 7 + 7
    assert counts.multiply_adds == 2 * 4 * 9 * 25 + 4 * 3 + 3 * 4 + 4 * 7
    assert counts.passes == (6,)
    assert counts.peak_bytes is None


def test_passes_are_those_of_the_studys_batch_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "MIN_NUMEL", 7 * 4 * 25)  # the norm takes the gates of seven images, not of fewer

    def build() -> nn.Module:
        body = conv_norm(lambda conv: SqueezeExciteConv2d(conv=conv, latent_channels=3, followed_by_norm=True))
        return nn.Sequential(body, nn.AdaptiveAvgPool2d(1), nn.Flatten())

    images, targets = torch.randn(7, 2, 5, 5), torch.zeros(7, dtype=torch.long)
    at_five, at_seven = (
        count(variant(build, "0.0"), cost_settings(batch_size=n), images[:n], targets[:n]).passes for n in (5, 7)
    )
    assert at_seven == (6,)
    assert at_five > at_seven


def test_passes_do_not_count_weights_that_happen_to_be_as_large_as_the_map():
    # One image's map of 4 x 2 x 2 has as many numbers as a 4 x 4 weight of the MLP.
    def build() -> nn.Module:
        conv = nn.Conv2d(2, 4, 1)
        return nn.Sequential(ComposersConv2d(conv=conv, latent_channels=4), nn.Flatten())

    images = torch.randn(1, 2, 2, 2)
    counts = count(variant(build, "0"), cost_settings(), images, torch.tensor([0]))
    assert counts.passes == (13,)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_peak_memory_on_a_gpu_covers_what_is_saved():
    images = torch.randn(8, 2, 64, 64, device="cuda")
    targets = torch.zeros(8, dtype=torch.long, device="cuda")

    def build() -> nn.Module:
        return nn.Sequential(conv_norm(), nn.AdaptiveAvgPool2d(1), nn.Flatten())

    counts = count(variant(build), cost_settings(device=torch.device("cuda")), images, targets)
    assert counts.peak_bytes is not None
    assert counts.peak_bytes >= counts.saved_bytes - images.nbytes
