"""SE with default settings on the models that people bring: each trains a step and keeps the form of its outputs."""

from __future__ import annotations

import fnmatch
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cheap_models import (
    assert_identity_start_changes_no_bit,
    build,
    classifier_arguments,
    detection_arguments,
    detection_targets,
    tensors_of,
)
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import composer_se
from composer_se import SqueezeExciteConv2d

timm = pytest.importorskip("timm")
torchvision = pytest.importorskip("torchvision")

SE_BLOCKS = (
    "SqueezeExcitation",  # torchvision
    "SqueezeExcite",
    "SEModule",
    "EffectiveSEModule",
    "EseModule",
    "GlobalContext",
    "GatherExcite",
    "ChannelAttn",
    "SelectiveKernelAttn",
)


def form_of(output: Any) -> list[tuple[torch.Size, torch.dtype]]:
    return [(tensor.shape, tensor.dtype) for tensor in tensors_of(output)]


def loss_of(output: Any) -> Tensor:
    floating = [tensor for tensor in tensors_of(output) if tensor.is_floating_point()]
    return torch.stack([tensor.float().square().mean() for tensor in floating]).sum()


def layers_in_se_blocks(model: nn.Module) -> list[str]:
    blocks = [(name, block) for name, block in model.named_modules() if type(block).__name__ in SE_BLOCKS]
    return [name for name, block in blocks for layer in block.modules() if isinstance(layer, SqueezeExciteConv2d)]


def watch_for_single_pixels(model: nn.Module) -> Callable[[dict[str, Any]], None]:
    """Watches every conv; the function returned fails if one that got SE works on a 1×1 map."""
    on_single_pixels: set[nn.Module] = set()

    def watch(conv: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if inputs[0].shape[-2:] == (1, 1):
            on_single_pixels.add(conv)

    for conv in model.modules():
        if isinstance(conv, nn.Conv2d):
            conv.register_forward_pre_hook(watch)

    def check(added: dict[str, Any]) -> None:
        assert [name for name, layer in added.items() if layer.layer in on_single_pixels] == []

    return check


def train_step(
    model: nn.Module, *inputs: Any, loss: Callable[[Any], Tensor] = loss_of, unreached: str = "", **options: Any
) -> tuple[Any, dict[str, Any]]:
    """Applies SE, trains one step with the optimizer that was there before, and checks that every SE weight moved.

    Of those below ``unreached``, a glob pattern over module names, it asks nothing: the loss may not depend on them.
    """
    # Adam without its eps moves a weight whenever its gradient is not zero.
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=0.1, eps=1e-38)
    added = composer_se.apply_squeeze_excite(model, optimizers=optimizer, **options)
    se_weights = {
        f"{name}.{weight}": parameter
        for name, layer in added.items()
        for weight, parameter in layer.se.named_parameters()
    }
    ids_of_se_weights = {id(weight) for weight in se_weights.values()}
    assert ids_of_se_weights <= {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    before = {name: parameter.detach().clone() for name, parameter in se_weights.items()}
    output = model.train()(*inputs)
    loss(output).backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in se_weights.values())
    for group in optimizer.param_groups:  # the others' step would take longer than the rest of the test
        group["params"] = [parameter for parameter in group["params"] if id(parameter) in ids_of_se_weights]
    optimizer.step()
    unmoved = [name for name, parameter in se_weights.items() if torch.equal(parameter, before[name])]
    assert [name for name in unmoved if not fnmatch.fnmatch(name, unreached)] == []
    assert layers_in_se_blocks(model) == []
    return output, added


# --- torchvision ----------------------------------------------------------------------------------------------------

WITHOUT_A_WIDE_CONV = ("swin_t", "swin_s", "swin_v2_t", "swin_v2_s")
LARGE_PARAMETERS = 2**18


@pytest.mark.parametrize("name", torchvision.models.list_models(module=torchvision.models))
def test_torchvision_classification(
    name: str, caplog: pytest.LogCaptureFixture, record_property: Callable[[str, object], None]
) -> None:
    """torchvision: classification."""
    size, arguments = classifier_arguments(name)
    model = build(torchvision.models.get_model, name, **arguments)
    for parameter in model.parameters():  # a gradient less for what holds nearly all of the memory
        parameter.requires_grad = parameter.numel() < LARGE_PARAMETERS
    options: dict[str, Any] = {}
    if name in WITHOUT_A_WIDE_CONV:
        assert composer_se.apply_squeeze_excite(model) == {}
        assert "the widest has 96 output channels, and min_channels is 128" in caplog.text
        record_property("note", "`swin_t` and `swin_s` have one conv, of 96 channels: they need `min_channels` ≤ 96")
        options = {"min_channels": "auto"}
    images = torch.randn(2, 3, size, size)
    assert_identity_start_changes_no_bit(model, lambda model: model(images))
    check = watch_for_single_pixels(model)
    output, added = train_step(model, images, **options)
    assert added
    if size >= 64:
        check(added)
    assert form_of(output) == [((2, 1000), torch.float32)] * (
        3 if name == "googlenet" else 1 + (name == "inception_v3")
    )


@pytest.mark.parametrize("name", torchvision.models.list_models(module=torchvision.models.segmentation))
def test_torchvision_segmentation(name: str) -> None:
    """torchvision: segmentation."""
    model = build(torchvision.models.get_model, name, weights=None, weights_backbone=None)
    images = torch.randn(2, 3, 32, 32)
    assert_identity_start_changes_no_bit(model, lambda model: model(images))
    output, _ = train_step(model, images)
    assert form_of(output) == [((2, 21, 32, 32), torch.float32)]


@pytest.mark.parametrize("name", torchvision.models.list_models(module=torchvision.models.detection))
def test_torchvision_detection(name: str) -> None:
    """torchvision: detection."""
    model = build(torchvision.models.get_model, name, **detection_arguments(name))
    images = list(torch.rand(2, 3, 64, 64))
    targets = detection_targets()
    assert_identity_start_changes_no_bit(model, lambda model: model(images, targets if model.training else None))
    # SSD's loss takes some anchors of each image, and none of the coarsest maps may be among them.
    losses, _ = train_step(model, images, targets, unreached="head.*.module_list.*")
    assert all(loss.shape == () and loss.isfinite() for loss in losses.values())
    with torch.no_grad():
        detections = model.eval()(images)
    assert all({"boxes", "labels", "scores"} <= set(detection) for detection in detections)


@pytest.mark.parametrize("name", ["r3d_18", "mc3_18", "r2plus1d_18", "s3d"])
def test_torchvision_video(
    name: str, caplog: pytest.LogCaptureFixture, record_property: Callable[[str, object], None]
) -> None:
    """torchvision: video."""
    assert composer_se.apply_squeeze_excite(build(torchvision.models.get_model, name)) == {}
    assert "has no Conv2d, so nothing gets Squeeze-and-Excitation" in caplog.text
    record_property("note", "these hold `Conv3d` only: left as they are, with a warning")


class FrameByFrame(nn.Module):
    """A video classifier: a 2d network on every frame, then the mean over time."""

    def __init__(self) -> None:
        super().__init__()
        self.network = torchvision.models.resnet18(num_classes=7)

    def forward(self, video: Tensor) -> Tensor:
        return self.network(video.flatten(0, 1)).unflatten(0, video.shape[:2]).mean(1)


def test_video_with_2d_convs() -> None:
    """Video through a 2d network, frame by frame."""
    output, _ = train_step(build(FrameByFrame), torch.randn(2, 3, 3, 32, 32))
    assert form_of(output) == [((2, 7), torch.float32)]


def test_optical_flow() -> None:
    """torchvision: optical flow."""
    frames = torch.randn(2, 1, 3, 128, 128)
    model = build(torchvision.models.optical_flow.raft_small)
    output, added = train_step(model, *frames, 2, loss=lambda flows: flows[-1].square().mean())
    assert len(added) == 3
    assert form_of(output) == [((1, 2, 128, 128), torch.float32)] * 2


# --- timm -----------------------------------------------------------------------------------------------------------

TIMM_FAMILIES = [
    "resnet18",
    "resnet26d",
    "resnext26ts",
    "seresnet18",
    "legacy_seresnet18",
    "ecaresnet26t",
    "gcresnet33ts",
    "ese_vovnet19b_dw",
    "vovnet39a",
    "skresnet18",
    "resnest14d",
    "resnetv2_50",
    "resnetblur18",
    "resnetaa34d",
    "efficientnet_b0",
    "tf_efficientnet_b0",
    "tf_efficientnetv2_b0",
    "mixnet_s",
    "mobilenetv2_050",
    "mobilenetv3_small_050",
    "mobilenetv4_conv_small_035",
    "mnasnet_small",
    "fbnetc_100",
    "fbnetv3_b",
    "tinynet_e",
    "lcnet_050",
    "mobilevit_xxs",
    "mobilevitv2_050",
    "fastvit_t8",
    "repghostnet_050",
    "regnetx_002",
    "regnety_002",
    "regnetz_005",
    "regnetv_040",
    "convnext_atto",
    "convnextv2_atto",
    "densenet121",
    "dla34",
    "res2net50_14w_8s",
    "ghostnet_050",
    "hrnet_w18_small",
    "dm_nfnet_f0",
    "eca_nfnet_l0",
    "nf_resnet26",
    "nf_regnet_b0",
    "inception_v3",
    "inception_next_atto",
    "xception41",
    "legacy_xception",
    "rexnet_100",
    "repvgg_a0",
    "mobileone_s0",
    "repvit_m0_9",
    "gernet_s",
    "selecsls42",
    "dpn48b",
    "cspresnet50",
    "cspdarknet53",
    "cs3darknet_s",
    "darknet17",
    "edgenext_xx_small",
    "efficientvit_b0",
    "hgnet_tiny",
    "hgnetv2_b0",
    "vgg11_bn",
    "tresnet_m",
]
# What 64 pixels turn into a single one: strides of 64 and unpadded stems. VGG's first dense layer is a 7x7 conv, which
# no structure tells from one on maps.
SMALL_MAPS = ("inception_v3", "selecsls42", "vgg11_bn")


@pytest.mark.parametrize("name", TIMM_FAMILIES)
def test_timm(name: str, record_property: Callable[[str, object], None]) -> None:
    """timm: one member of each convolutional family."""
    model = build(timm.create_model, name, num_classes=10)
    for parameter in model.parameters():
        parameter.requires_grad = parameter.numel() < LARGE_PARAMETERS
    size = 96 if name == "inception_v3" else 64
    names_before = dict(model.named_modules())
    check = watch_for_single_pixels(model)
    output, added = train_step(model, torch.randn(2, 3, size, size))
    assert added
    assert set(added) <= set(names_before)
    assert form_of(output) == [((2, 10), torch.float32)]
    if name not in SMALL_MAPS:
        check(added)
    if name == "vgg11_bn":
        record_property("note", "timm's VGG writes its dense layers as convs; `exclude='pre_logits'` passes them over")


# --- networks that put convs to unusual use --------------------------------------------------------------------------

C = 128


class UNet(nn.Module):
    """Two levels, transposed convs on the way up, skip connections by concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.inc, self.down = self.convs(3, C), self.convs(C, 2 * C)
        self.up = nn.ConvTranspose2d(2 * C, C, 2, stride=2)
        self.merge, self.out = self.convs(2 * C, C), nn.Conv2d(C, 4, 1)

    @staticmethod
    def convs(c_in: int, c_out: int) -> nn.Sequential:
        layers = [[nn.Conv2d(i, c_out, 3, padding=1), nn.BatchNorm2d(c_out), nn.ReLU(True)] for i in (c_in, c_out)]
        return nn.Sequential(*itertools.chain(*layers))

    def forward(self, x: Tensor) -> Tensor:
        skip = self.inc(x)
        below = self.down(nn.functional.max_pool2d(skip, 2))
        return self.out(self.merge(torch.cat([skip, self.up(below)], 1)))


class PreActivation(nn.Module):
    """A pre-activation block, whose last conv is changed by an in-place sum right away."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, C, 3, padding=1)
        self.norm1, self.conv1 = nn.BatchNorm2d(C), nn.Conv2d(C, C, 3, padding=1)
        self.norm2, self.conv2 = nn.BatchNorm2d(C), nn.Conv2d(C, C, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = shortcut = self.stem(x)
        out = self.conv1(self.norm1(x).relu_())
        out = self.conv2(self.norm2(out).relu_())
        out += shortcut
        return out


class SharedConv(nn.Module):
    """One conv under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, C, 1)
        self.first = nn.Sequential(nn.Conv2d(C, C, 3, padding=1), nn.BatchNorm2d(C), nn.ReLU(True))
        self.second = nn.Sequential(self.first[0], nn.ReLU(True))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(self.stem(x)))


class ReusedBlock(nn.Module):
    """One block called three times."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, C, 1)
        self.block = nn.Sequential(nn.Conv2d(C, C, 3, padding=1), nn.GroupNorm(4, C), nn.ReLU(True))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for _ in range(3):
            x = self.block(x)
        return x


class SharedWeight(nn.Module):
    """Two convs that share one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first, self.second = (nn.Conv2d(i, C, 1) for i in (3, C, C))
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(self.stem(x)))


class ReadsAttributes(nn.Module):
    """Reads a conv's attributes and weights in forward, and calls the functional conv with them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, C, 3, stride=2, padding=1, groups=1)
        self.other = nn.Conv2d(C, C, 1)

    def forward(self, x: Tensor) -> Tensor:
        conv = self.conv
        x = nn.functional.conv2d(x, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)
        assert conv.in_channels == 3
        assert conv.kernel_size == (3, 3)
        return self.other(conv(torch.zeros(1, conv.in_channels, 8, 8)).mean() + x) + self.other.weight.norm()


class Containers(nn.Module):
    """Convs in a ModuleDict in a ModuleList, with scales in a ParameterList and a ParameterDict."""

    def __init__(self) -> None:
        super().__init__()
        widths = ((3, C), (C, C))
        self.levels = nn.ModuleList(
            nn.ModuleDict({"conv": nn.Conv2d(i, o, 3, padding=1), "norm": nn.BatchNorm2d(o)}) for i, o in widths
        )
        self.scales = nn.ParameterList([torch.ones(C, 1, 1) for _ in widths])
        self.shifts = nn.ParameterDict({"last": torch.zeros(C, 1, 1)})
        self.nothing = None

    def forward(self, x: Tensor) -> Tensor:
        for level, scale in zip(self.levels, self.scales, strict=True):
            assert isinstance(level, nn.ModuleDict)
            for layer in level.values():
                x = layer(x)
            x = x * scale
        return x + self.shifts["last"]


class KeepingConv(nn.Conv2d):
    """A subclass with a forward of its own that keeps what it returned."""

    def forward(self, input: Tensor) -> Tensor:
        self.last = super().forward(input)
        return self.last


def sequence(*middle: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, C, 3, padding=1), nn.BatchNorm2d(C), nn.ReLU(True), *middle)


def to_channels_last(module: nn.Module) -> None:
    for parameter in module.parameters(recurse=False):
        if parameter.dim() == 4:
            parameter.data = parameter.data.to(memory_format=torch.channels_last)


def old_weight_norm() -> nn.Module:
    with pytest.warns(FutureWarning):
        return sequence(torch.nn.utils.weight_norm(nn.Conv2d(C, C, 3)))


UNUSUAL: dict[str, Callable[[], nn.Module]] = {
    "U-Net": UNet,
    "pre-activation, `out += shortcut`": PreActivation,
    "conv then `ReLU(inplace=True)`": lambda: nn.Sequential(
        nn.Conv2d(3, C, 3), nn.ReLU(True), nn.Conv2d(C, C, 3), nn.ReLU(True)
    ),
    "conv under two names": SharedConv,
    "block called several times": ReusedBlock,
    "convs that share a weight": SharedWeight,
    "transposed convs (left plain)": lambda: sequence(nn.ConvTranspose2d(C, C, 2, 2), nn.Conv2d(C, C, 3)),
    "depthwise convs": lambda: sequence(nn.Conv2d(C, C, 3, groups=C), nn.BatchNorm2d(C)),
    "dilated, strided convs": lambda: sequence(nn.Conv2d(C, C, 3, dilation=2, stride=2)),
    "reflect padding": lambda: sequence(nn.Conv2d(C, C, 3, padding=1, padding_mode="reflect"), nn.InstanceNorm2d(C)),
    "padding='same'": lambda: sequence(nn.Conv2d(C, C, 4, padding="same")),
    "weight norm, parametrised": lambda: sequence(parametrizations.weight_norm(nn.Conv2d(C, C, 3))),
    "weight norm, old style": old_weight_norm,
    "spectral norm, parametrised": lambda: sequence(parametrizations.spectral_norm(nn.Conv2d(C, C, 3))),
    "spectral norm, old style": lambda: sequence(torch.nn.utils.spectral_norm(nn.Conv2d(C, C, 3))),
    "conv attributes read in `forward`": ReadsAttributes,
    "ModuleDict, ModuleList, ParameterList": Containers,
    "conv subclass that keeps its output": lambda: sequence(KeepingConv(C, C, 3), nn.BatchNorm2d(C)),
    "float64": lambda: sequence(nn.Conv2d(C, C, 3)).double(),
    "bfloat16": lambda: sequence(nn.Conv2d(C, C, 3)).bfloat16(),
    "channels_last": lambda: sequence(nn.Conv2d(C, C, 3), nn.BatchNorm2d(C)).apply(to_channels_last),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_networks(name: str) -> None:
    """Networks that put convs to unusual use."""
    model = UNUSUAL[name]()
    images = torch.randn(2, 3, 16, 16, dtype=next(model.parameters()).dtype)
    with torch.no_grad():
        expected = form_of(model(images))
    output, added = train_step(model, images)
    assert added
    assert form_of(output) == expected
    for _ in range(2):  # parametrisations and hooks survive further steps, in both modes
        loss_of(model.train()(images)).backward()
        model.eval()(images)


def test_lazy_convs_before_their_first_call() -> None:
    """`LazyConv2d` before its first call."""
    model = nn.Sequential(nn.LazyConv2d(C, 3), nn.BatchNorm2d(C), nn.ReLU(True), nn.LazyConv2d(C, 1))
    added = composer_se.apply_squeeze_excite(model)
    assert list(added) == ["0", "3"]
    output = model(torch.randn(2, 3, 8, 8))
    loss_of(output).backward()
    assert output.shape == (2, C, 6, 6)
    assert all(p.grad is not None for layer in added.values() for p in layer.se.parameters())


def test_lazy_convs_after_their_first_call() -> None:
    """`LazyConv2d` after its first call."""
    model = nn.Sequential(nn.LazyConv2d(C, 3), nn.BatchNorm2d(C), nn.ReLU(True), nn.LazyConv2d(C, 1))
    images = torch.randn(2, 3, 8, 8)
    model(images)
    output, added = train_step(model, images)
    assert len(added) == 2
    assert output.shape == (2, C, 6, 6)


def test_quantizable_models() -> None:
    """torchvision: quantizable models."""
    output, added = train_step(build(torchvision.models.quantization.resnet18), torch.randn(2, 3, 32, 32))
    assert len(added) == 15
    assert form_of(output) == [((2, 1000), torch.float32)]
