"""A model with SE out of training: compiled, exported, scripted, quantised, copied; each form computes the same."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import conv_norm_net
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import composer_se

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


class Residual(nn.Module):
    """A pre-activation block, so that both kinds of gate occur: before a norm, and before an in-place sum."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.relu = nn.BatchNorm2d(width), nn.ReLU()
        self.conv1, self.norm1 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.norm1(self.conv1(self.relu(self.norm(x)))))
        out = self.conv2(out)
        out += x
        return out


def network() -> nn.Sequential:
    """Plain convs and a residual block with SE on all five convs, with running statistics that are not trivial."""
    net = conv_norm_net((8, 16))
    net.insert(6, Residual(16))
    assert len(composer_se.apply_squeeze_excite(net, 4, 8)) == 4
    with torch.no_grad():
        net(torch.randn(8, 3, 12, 12))
    return net.eval()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 16, 16)


def gradients(net: nn.Module, images: Tensor) -> list[Tensor]:
    net.zero_grad()
    net(images).square().sum().backward()
    return [parameter.grad for parameter in net.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_torch_compile(mode: str, images: Tensor) -> None:
    """`torch.compile(fullgraph=True)`, train and eval."""
    net = network().train(mode == "train")
    compiled = torch.compile(copy.deepcopy(net), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images), net(images), **CLOSE)
    torch.testing.assert_close(gradients(compiled, images), gradients(net, images), **CLOSE)


def test_torch_compile_inductor(images: Tensor) -> None:
    """`torch.compile(fullgraph=True)` with generated kernels."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3))
    composer_se.apply_squeeze_excite(net, 4, 8)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(net, fullgraph=True)(images), net(images), **CLOSE)


def test_torch_export() -> None:
    """`torch.export` with dynamic batch and size."""
    net = network()
    batch, height, width = (torch.export.Dim(name, min=2, max=64) for name in ("batch", "height", "width"))
    exported = torch.export.export(
        net, (torch.randn(3, 3, 16, 20),), dynamic_shapes=({0: batch, 2: height, 3: width},)
    ).module()
    for shape in ((3, 3, 16, 20), (5, 3, 9, 31)):
        images = torch.randn(shape)
        torch.testing.assert_close(exported(images), net(images), **CLOSE)


def test_torchscript_script(images: Tensor) -> None:
    """TorchScript: `torch.jit.script`, saved and loaded."""
    net = network()
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(net), file)
    file.seek(0)
    scripted = torch.jit.load(file)
    torch.testing.assert_close(scripted(images), net(images), **CLOSE)
    torch.testing.assert_close(gradients(scripted, images), gradients(net, images), **CLOSE)


def test_torchscript_trace(images: Tensor) -> None:
    """TorchScript: `torch.jit.trace`, on other shapes too."""
    net = network()
    traced = torch.jit.trace(net, images)
    for size in (16, 21):
        images = torch.randn(4, 3, size, size)
        torch.testing.assert_close(traced(images), net(images), **CLOSE)
    torch.testing.assert_close(torch.jit.freeze(traced)(images), net(images), **CLOSE)


def test_fx(images: Tensor) -> None:
    """`torch.fx`: traced, transformed back to code, trained."""
    net = network()
    traced = torch.fx.symbolic_trace(net)
    torch.testing.assert_close(traced(images), net(images), **CLOSE)
    torch.testing.assert_close(gradients(traced, images), gradients(net, images), **CLOSE)


def test_fx_fusion_keeps_the_gates(images: Tensor) -> None:
    """`torch.fx.experimental.optimization.fuse`."""
    from torch.fx.experimental.optimization import fuse

    net = network()
    torch.testing.assert_close(fuse(net)(images), net(images), **CLOSE)


def test_folding_a_norm_into_a_conv_with_se(record_property: Callable[[str, object], None]) -> None:
    """`fuse_conv_bn_eval` on a conv with SE."""
    record_property("note", "refused: the gate stands between conv and norm")
    net = network()
    with pytest.raises(TypeError, match=r"a norm that follows the gate can't be folded into the conv"):
        fuse_conv_bn_eval(net[0], net[1])


def test_attributes_set_on_the_layer_reach_the_conv(images: Tensor) -> None:
    """Attributes of the conv set through the layer."""
    net = network()
    net[0].stride = (2, 2)
    assert net[0].conv.stride == (2, 2)
    assert net[:3](images).shape == (2, 8, 8, 8)


@pytest.mark.parametrize("dynamo", [False, True], ids=["torchscript exporter", "torch.export exporter"])
def test_onnx(dynamo: bool, images: Tensor, tmp_path: Path) -> None:
    """ONNX, run in onnxruntime."""
    runtime = pytest.importorskip("onnxruntime")
    if dynamo:
        pytest.importorskip("onnxscript")
    net = network()
    file = str(tmp_path / "net.onnx")
    axes = {0: "batch", 2: "height", 3: "width"}
    torch.onnx.export(net, (images,), file, input_names=["images"], dynamic_axes={"images": axes}, dynamo=dynamo)
    session = runtime.InferenceSession(file)
    for shape in ((2, 3, 16, 16), (5, 3, 9, 31)):
        images = torch.randn(shape)
        (output,) = session.run(None, {"images": images.numpy()})
        torch.testing.assert_close(torch.from_numpy(output), net(images), **CLOSE)


def test_composer_export_for_inference(images: Tensor, tmp_path: Path) -> None:
    """Composer's `export_for_inference`, TorchScript and ONNX."""
    inference = pytest.importorskip("composer.utils.inference")
    runtime = pytest.importorskip("onnxruntime")
    net = network()
    scripted, onnx = str(tmp_path / "net.pt"), str(tmp_path / "net.onnx")
    inference.export_for_inference(net, "torchscript", scripted)
    torch.testing.assert_close(torch.jit.load(scripted)(images), net(images), **CLOSE)
    inference.export_for_inference(net, "onnx", onnx, sample_input=(images, {}))
    session = runtime.InferenceSession(onnx)
    (output,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    torch.testing.assert_close(torch.from_numpy(output), net(images), **CLOSE)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


def test_dynamic_quantisation(images: Tensor) -> None:
    """`torch.ao` dynamic quantisation: the MLPs of the blocks too."""
    net = network()
    quantised = torch.ao.quantization.quantize_dynamic(net, {nn.Linear}, dtype=torch.qint8)
    assert "DynamicQuantizedLinear" in repr(quantised[0].se)
    assert relative_error(quantised(images), net(images)) < 0.05


def test_fx_quantisation(images: Tensor) -> None:
    """`torch.ao` FX quantisation: convs and MLPs in int8."""
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    net = network()
    prepared = prepare_fx(copy.deepcopy(net), get_default_qconfig_mapping("x86"), (images,))
    for _ in range(4):
        prepared(torch.randn(8, 3, 16, 16))
    quantised = convert_fx(prepared)
    assert "QuantizedConv2d" in repr(quantised)
    assert relative_error(quantised(images), net(images)) < 0.2


def test_state_dict_round_trip(images: Tensor) -> None:
    """`state_dict` to a file and back."""
    net, other = network(), network()
    file = io.BytesIO()
    torch.save(net.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(images), net(images))


def test_state_dict_from_before_the_surgery() -> None:
    """`state_dict` of the plain model into the model with SE."""
    plain = conv_norm_net((8, 16))
    other = copy.deepcopy(plain)
    for parameter in other.parameters():
        nn.init.normal_(parameter)
    composer_se.apply_squeeze_excite(other, 4, 8)
    missing, unexpected = other.load_state_dict(plain.state_dict(), strict=False)
    assert unexpected == []
    assert sorted(missing) == [f"{i}.se.pool_and_mlp.{j}.weight" for i in (0, 3) for j in (2, 4)]
    composer_se.remove_squeeze_excite(other)
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), plain.parameters(), strict=True))


def saved_and_loaded(net: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("make", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net)), saved_and_loaded])
def test_copies(make: Callable[[nn.Module], nn.Module], images: Tensor) -> None:
    """deepcopy, pickle, `torch.save` of the whole model."""
    net = network()
    copied = make(net)
    assert torch.equal(copied(images), net(images))
    assert not {id(parameter) for parameter in copied.parameters()} & {id(parameter) for parameter in net.parameters()}
    assert [type(module) for module in copied.modules()] == [type(module) for module in net.modules()]
    assert composer_se.apply_squeeze_excite(copied, 4, 8) == {}
    assert list(composer_se.remove_squeeze_excite(copied)) == ["0", "3", "6.conv1", "6.conv2"]
    gradients(net.train(), images)
