from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from composer_se import ops

HAS_TRITON = importlib.util.find_spec("triton") is not None
TESTS = Path(__file__).parent
# A process that interprets kernels can't compile them.
compiles = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="kernels are interpreted here")


def run_python(*args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "COMPOSER_SE_TRITON")}
    inherited["PYTHONPATH"] = os.pathsep.join(filter(None, [str(TESTS.parent), inherited.get("PYTHONPATH")]))
    return subprocess.run([sys.executable, *args], env=inherited | environment, capture_output=True, text=True)


@pytest.mark.parametrize("interpret", ["1", pytest.param("0", marks=pytest.mark.gpu)], ids=["interpreted", "cuda"])
def test_the_kernels_agree_with_the_plain_formula(interpret):
    pytest.importorskip("triton")
    if interpret == "0" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    checks = str(TESTS / "triton_kernel_checks.py")
    run = run_python(
        *("-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore::DeprecationWarning:triton", checks),
        TRITON_INTERPRET=interpret,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed is not None, run.stdout
    assert int(passed.group(1)) > 200, run.stdout


LAYOUTS = {
    "contiguous": {"pixel_stride": 1, "BLOCK_C": 2, "BLOCK_I": 1024},
    "channels_last": {"channel_stride": 1, "BLOCK_C": 128, "BLOCK_I": 16},
}
SPECIAL_SIZES = {
    "1x1 maps": ("i32", {"pixels": 1, "channel_stride": 1, "pixel_stride": 1, "BLOCK_C": 2048, "BLOCK_I": 1}),
    "one map": ("i32", {"channels": 1, "pixel_stride": 1, "BLOCK_C": 1, "BLOCK_I": 64}),
    "odd maps": ("i32", {"pixel_stride": 1, "BLOCK_C": 32, "BLOCK_I": 64}),
    "more than 2**31 maps or pixels": ("i64", {"BLOCK_C": 2, "BLOCK_I": 1024}),
}


@pytest.fixture
def compiled(tmp_path, monkeypatch):
    """Compiles a kernel for an A100, as a launch would. Needs no GPU.

    Arguments that a launch finds to be None or 1 are constants; `multiple` of 16 is a property of sizes and pointers.
    """
    triton = pytest.importorskip("triton", minversion="3.2")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from composer_se import triton_kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))

    def compile(kernel: str, dtype: str, constants: dict[str, object], sizes: str = "i32", multiple: bool = True):
        function = getattr(triton_kernels, kernel)
        names = function.arg_names
        signature = {
            name: "constexpr" if name in constants else f"*{dtype}" if name.endswith("_ptr") else sizes
            for name in names
        }
        unaligned = ("out_stride", "tiles_per_split", "divisor", *constants)
        aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in names if name not in unaligned}
        source = ASTSource(function, signature, constants, aligned if multiple else {})
        return triton.compile(source, target=GPUTarget("cuda", 80, 32)).asm

    return compile


KERNELS = {
    "squeeze": ("_sum_kernel", {"b_ptr": None, "z_ptr": None, "KEPT_IS_PRODUCT": False}),
    "gradient of the logits": ("_sum_kernel", {"KEPT_IS_PRODUCT": True}),
    "gradient of the logits, out of place": ("_sum_kernel", {"KEPT_IS_PRODUCT": False}),
    "second stage": ("_sum_kernel", {"b_ptr": None, "KEPT_IS_PRODUCT": True}),
    "product": ("_scale_kernel", {"added_ptr": None}),
    "gradient of the map": ("_scale_kernel", {}),
}


@compiles
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", KERNELS)
def test_the_kernels_compile_to_wide_loads_and_wide_offsets(name, dtype, layout, compiled):
    kernel, constants = KERNELS[name]
    asm = compiled(kernel, dtype, constants | LAYOUTS[layout])
    assert asm["cubin"]
    # 16 bytes at a time, for as many operands as are maps.
    maps_read = 2 if "b_ptr" not in constants and kernel == "_sum_kernel" else 1
    assert len(set(re.findall(r"ld\.global\.v4\.b32.*?\[ *(%\w+)", asm["ptx"]))) >= maps_read
    if kernel == "_scale_kernel":
        assert "st.global.v4.b32" in asm["ptx"]
    # 32-bit products overflow beyond 2**31 elements.
    products = re.findall(r"arith\.muli .* : (.*?)(?: loc.*)?$", asm["ttir"], re.MULTILINE)
    assert products
    assert all("i64" in product for product in products), products
    assert "atom" not in asm["ptx"]
    assert "red.global" not in asm["ptx"]


@compiles
@pytest.mark.parametrize("sizes", SPECIAL_SIZES)
@pytest.mark.parametrize("name", KERNELS)
def test_the_kernels_compile_for_special_sizes(name, sizes, compiled):
    kernel, constants = KERNELS[name]
    integer, special = SPECIAL_SIZES[sizes]
    assert compiled(kernel, "bf16", constants | special, integer, multiple=False)["cubin"]


@pytest.mark.parametrize(("setting", "wanted"), [(None, False), ("", False), ("0", False), ("1", HAS_TRITON)])
def test_the_kernels_are_off_unless_asked_for(setting, wanted, monkeypatch):
    monkeypatch.delenv("COMPOSER_SE_TRITON", raising=False)
    if setting is not None:
        monkeypatch.setenv("COMPOSER_SE_TRITON", setting)
    assert ops._kernels_are_wanted() == wanted


def test_a_setting_that_means_nothing_is_refused(monkeypatch):
    monkeypatch.setenv("COMPOSER_SE_TRITON", "yes")
    with pytest.raises(ValueError, match="COMPOSER_SE_TRITON is 'yes'"):
        ops._kernels_are_wanted()


def test_cpu_maps_neither_take_the_kernels_nor_import_them():
    code = """if True:
        import sys, torch
        before = "triton" in sys.modules
        import composer_se
        conv = composer_se.SqueezeExciteConv2d(3, 8, 3, followed_by_norm=True)
        conv(torch.randn(1, 3, 8, 8)).sum().backward()
        print(before == ("triton" in sys.modules), "composer_se.triton_gate" in sys.modules)
    """
    run = run_python("-c", code, COMPOSER_SE_TRITON="1")
    assert run.stdout.split() == ["True", "False"], run.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_maps_take_the_kernels_when_asked_to(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(ops, "_KERNELS_ARE_WANTED", True)
    u = torch.randn(2, 4, 3, 3, device="cuda")
    assert ops.takes_kernels(u)
    assert ops.takes_kernels(u.contiguous(memory_format=torch.channels_last))
    assert not ops.takes_kernels(u.double())
    assert not ops.takes_kernels(u[:, :2])
