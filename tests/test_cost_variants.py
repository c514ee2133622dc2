"""The variants that are measured side by side, and the steps that are timed."""

from __future__ import annotations

import pytest
import torch
from composer.algorithms.squeeze_excite.squeeze_excite import SqueezeExciteConv2d as ComposersConv2d
from torch import nn

from composer_se.cost.variants import make_variants
from composer_se.errors import UserError
from composer_se.measure.steps import image_batch, loss_of
from composer_se.modules import SqueezeExciteConv2d
from composer_se.options import SqueezeExciteOptions


class Shared(nn.Module):
    """A network in which one conv sits in two places."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8))
        self.again = nn.Sequential(self.body[0], nn.ReLU())
        self.head = nn.Conv2d(8, 16, 1)

    def forward(self, x):
        return self.head(self.again(self.body(self.stem(x)))).mean((2, 3))


OPTIONS = SqueezeExciteOptions(latent_channels=0.5, min_channels_of="both")


def test_all_variants_have_the_same_weights_and_ours_computes_what_composers_does():
    network = Shared()
    variants, notes = make_variants(network, (8,), OPTIONS, against_composer=True)
    assert [variant.name for variant in variants] == ["plain", "ours 8", "built-in 8"]
    assert not notes
    plain, ours, composers = (variant.build().eval() for variant in variants)
    for name, weight in network.state_dict().items():
        assert torch.equal(plain.state_dict()[name], weight)
    assert ours.state_dict().keys() == composers.state_dict().keys()
    x = torch.randn(2, 3, 6, 6)
    torch.testing.assert_close(ours(x), composers(x))
    assert not torch.allclose(ours(x), plain(x))


def test_composers_built_in_gets_the_convs_and_widths_that_ours_chose():
    variants, _ = make_variants(Shared(), (8,), OPTIONS, against_composer=True)
    ours, composers = variants[1].build(), variants[2].build()
    assert variants[1].layers == variants[2].layers == ("body.0", "head")
    for name, width in (("body.0", 4), ("head", 8)):
        wrapper, other = ours.get_submodule(name), composers.get_submodule(name)
        assert isinstance(wrapper, SqueezeExciteConv2d)
        assert isinstance(other, ComposersConv2d)
        assert wrapper.se.latent_channels == other.se.latent_channels == width
    assert composers.get_submodule("again.0") is composers.get_submodule("body.0")


def test_instances_of_a_variant_share_no_memory_with_each_other_or_the_network():
    network = Shared()
    variants, _ = make_variants(network, (8,), OPTIONS, against_composer=False)
    first, second = variants[1].build(), variants[1].build()
    weights = [n.get_parameter("stem.weight") for n in (network, first, second)]
    assert len({weight.data_ptr() for weight in weights}) == 3
    assert torch.equal(weights[1], weights[2])
    assert not any(isinstance(module, SqueezeExciteConv2d) for module in network.modules())


def test_auto_is_shown_with_the_threshold_it_stands_for_and_an_unfit_setting_is_left_out():
    variants, notes = make_variants(Shared(), ("auto", 1000), SqueezeExciteOptions(), against_composer=False)
    assert [variant.name for variant in variants] == ["plain", "ours auto (16)"]
    assert notes == ["min_channels=1000 fits no conv of this network: left out"]


@pytest.mark.parametrize(
    ("min_channels", "options", "message"),
    [
        ((1000,), SqueezeExciteOptions(), "min_channels=1000 fits no conv"),
        ((8,), SqueezeExciteOptions(include="nothing.*"), "matches no Conv2d"),
    ],
)
def test_options_that_cannot_be_measured_are_refused(min_channels, options, message):
    with pytest.raises(UserError, match=message):
        make_variants(Shared(), min_channels, options, against_composer=False)


def test_the_loss_is_cross_entropy_of_logits_and_the_sum_of_anything_else():
    logits, maps = torch.randn(4, 5), torch.randn(4, 2, 3, 3)
    targets = torch.tensor([0, 4, 7, 13])
    expected = nn.functional.cross_entropy(logits, torch.tensor([0, 4, 2, 3]))
    torch.testing.assert_close(loss_of(logits, targets), expected)
    torch.testing.assert_close(loss_of({"out": maps, "aux": logits}, targets), expected + maps.sum())


def test_outputs_without_a_tensor_are_named():
    with pytest.raises(TypeError, match="no floating-point tensor but a str"):
        loss_of("logits", torch.tensor([0]))


def test_the_batch_has_the_channels_of_the_first_conv_and_the_layout_asked_for():
    images, targets = image_batch(nn.Sequential(nn.Conv2d(1, 4, 3)), 3, 9, torch.device("cpu"), channels_last=False)
    assert images.shape == (3, 1, 9, 9)
    assert targets.shape == (3,)
    images, _ = image_batch(Shared(), 2, 9, torch.device("cpu"), channels_last=True)
    assert images.is_contiguous(memory_format=torch.channels_last)
