"""Which convs are chosen, and the reasons that are given for the others."""

from __future__ import annotations

import pytest
import torch
from helpers import conv_norm_net
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from composer_se import SqueezeExcite2d, SqueezeExciteConv2d, SqueezeExciteOptions
from composer_se.selection import Selection, is_norm, is_se_block, select_convs


def select(model: nn.Module, *args, **options) -> Selection:
    return select_convs(model, SqueezeExciteOptions(*args, **options))


def chosen(model: nn.Module, *args, **options) -> list[str]:
    return [choice.name for choice in select(model, *args, **options).chosen]


def reasons(model: nn.Module, *args, **options) -> dict[str, str]:
    return {choice.name: choice.reason for choice in select(model, *args, **options).choices}


def test_output_channels_decide_by_default() -> None:
    net = nn.Sequential(nn.Conv2d(3, 16, 1), nn.Conv2d(16, 32, 1), nn.Conv2d(32, 16, 1))
    assert chosen(net, 4, 32) == ["1"]
    assert reasons(net, 4, 32)["0"] == "16 channels < 32"


def test_both_takes_the_smaller_side_as_composer_does() -> None:
    net = nn.Sequential(nn.Conv2d(16, 32, 1), nn.Conv2d(32, 32, 1), nn.Conv2d(32, 16, 1))
    assert chosen(net, 4, 32, min_channels_of="both") == ["1"]


@pytest.mark.parametrize(("widest", "threshold"), [(48, 48), (512, 512), (640, 512)])
def test_auto_is_the_largest_width_up_to_512(widest, threshold) -> None:
    net = nn.Sequential(nn.Conv2d(3, 16, 1), nn.Conv2d(16, widest, 1))
    selection = select(net, 4, "auto")
    assert selection.min_channels == threshold
    assert [choice.name for choice in selection.chosen] == ["1"]


def test_auto_looks_only_at_convs_that_may_be_chosen() -> None:
    net = nn.Sequential(nn.Conv2d(3, 16, 1), nn.Conv2d(16, 64, 1))
    assert chosen(net, 4, "auto", exclude="1") == ["0"]


def test_a_model_without_convs_has_nothing_to_choose() -> None:
    assert select(nn.Linear(2, 2), min_channels="auto").choices == ()


def test_widths_are_shares_of_the_output_channels() -> None:
    net = nn.Sequential(nn.Conv2d(3, 16, 1), nn.Conv2d(16, 64, 1))
    assert [choice.latent_channels for choice in select(net, 0.25, 1).chosen] == [4, 16]


@pytest.mark.parametrize("pattern", ["stage2", "stage2.*", "stage2.?", "*ge2*", "module.stage2"])
def test_include_names_convs_or_modules_around_them(pattern) -> None:
    net = nn.Sequential()
    net.add_module("stage1", conv_norm_net((16, 16)))
    net.add_module("stage2", conv_norm_net((16, 16)))
    assert chosen(net, 4, 16, include=pattern) == ["stage2.0", "stage2.3"]
    assert reasons(net, 4, 16, include=pattern)["stage1.0"] == "matches no include pattern"


def test_patterns_need_not_name_the_wrapper_of_the_trainer() -> None:
    wrapped = nn.ModuleDict({"module": nn.Sequential(nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 1))})
    assert chosen(wrapped, 4, 16, include="1") == ["module.1"]


def test_exclude_wins_over_include_and_is_named() -> None:
    net = nn.Sequential(nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 1))
    assert chosen(net, 4, 16, include=["0", "1"], exclude=["1"]) == ["0"]
    assert reasons(net, 4, 16, exclude="1")["1"] == "excluded by '1'"


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_pattern_that_matches_nothing_names_the_nearest_convs(option) -> None:
    net = nn.ModuleDict({"layer4": nn.Sequential(nn.Conv2d(3, 16, 1))})
    with pytest.raises(ValueError, match=rf"{option} has the pattern 'layer5\.0', which matches no Conv2d.*layer4\.0"):
        select(net, **{option: "layer5.0"})


def test_shared_conv_answers_to_all_its_names() -> None:
    conv = nn.Conv2d(16, 16, 1)
    net = nn.ModuleDict({"first": conv, "second": conv})
    assert chosen(net, 4, 16) == ["first"]
    assert chosen(net, 4, 16, include="second") == ["first"]


class SqueezeExcitation(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(channels, channels // 4, 1), nn.Conv2d(channels // 4, channels, 1)


class SEBlock(nn.Module):
    """A residual block that happens to be called so."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3)
        self.se = SqueezeExcitation(channels)


class ChannelGate(nn.Module):
    """An SE block under a name of its own."""

    def __init__(self, channels: int, with_norm: bool = False) -> None:
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(channels, channels // 2, 1), nn.Conv2d(channels // 2, channels, 1)
        self.gate = nn.Sigmoid()
        if with_norm:
            self.norm = nn.BatchNorm2d(channels)


class SplitAttn(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3)
        self.fc1, self.fc2 = nn.Conv2d(channels, channels, 1), nn.Conv2d(channels, channels, 1)


def test_convs_of_existing_se_blocks_are_passed_over() -> None:
    net = nn.ModuleDict({"a": SEBlock(64), "b": ChannelGate(64), "c": SplitAttn(64)})
    assert chosen(net, 4, 16) == ["a.conv", "c.conv"]
    assert reasons(net, 4, 16)["a.se.fc1"] == "inside the SE block SqueezeExcitation a.se"


def test_gated_bottleneck_with_a_norm_is_no_se_block() -> None:
    assert is_se_block(ChannelGate(8))
    assert not is_se_block(ChannelGate(8, with_norm=True))


def test_convs_after_a_global_pool_are_passed_over() -> None:
    aspp_pooling = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(64, 64, 1), nn.ReLU())
    local = nn.Sequential(nn.AdaptiveAvgPool2d(7), nn.Conv2d(64, 64, 1))
    assert chosen(nn.ModuleList([aspp_pooling, local]), 4, 16) == ["1.1"]


def test_a_conv_called_by_its_full_name_is_chosen_even_there() -> None:
    net = nn.ModuleDict({"a": SqueezeExcitation(64)})
    assert chosen(net, 4, 16, include="a.*") == []
    assert chosen(net, 4, 16, include="a.fc2") == ["a.fc2"]


def test_convs_that_have_a_block_are_passed_over() -> None:
    net = nn.Sequential(SqueezeExciteConv2d(3, 64, 1, latent_channels=6), nn.Conv2d(64, 64, 1))
    selection = select(net, 4, 16)
    assert [(choice.reason, choice.latent_channels) for choice in selection.choices] == [
        ("has SE already", 6),
        ("chosen", 4),
    ]


def test_convs_with_composers_block_are_passed_over() -> None:
    algorithms = pytest.importorskip("composer.algorithms")
    net = nn.Sequential(nn.Conv2d(64, 64, 1), nn.Conv2d(64, 64, 1))
    algorithms.squeeze_excite.apply_squeeze_excite(net, 4, 16)
    assert chosen(net, 4, 16) == []


def test_model_that_is_a_conv_is_refused() -> None:
    with pytest.raises(ValueError, match=r"itself a Conv2d.*SqueezeExciteConv2d\(conv=model\)"):
        select(nn.Conv2d(3, 8, 1))


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2", "inner ddp"])
def test_model_that_is_wrapped_already_is_refused(wrapper) -> None:
    net = conv_norm_net()
    if wrapper == "fsdp2":
        from torch.distributed.fsdp import fully_shard

        fully_shard(net, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
    else:
        net = DistributedDataParallel(net)
    with pytest.raises(TypeError, match=r"wrapped in .* Give the bare model, then wrap it"):
        select(nn.ModuleDict({"net": net}) if wrapper == "inner ddp" else net, 4, 8)


def test_norms_are_known_by_class_or_name() -> None:
    frozen = pytest.importorskip("torchvision.ops").FrozenBatchNorm2d(4)
    norms = [nn.BatchNorm2d(4), nn.SyncBatchNorm(4), nn.GroupNorm(2, 4), nn.LayerNorm(4), nn.InstanceNorm2d(4), frozen]
    assert all(map(is_norm, norms))
    assert not any(map(is_norm, [nn.ReLU(), nn.Conv2d(3, 3, 1), SqueezeExcite2d(4)]))
