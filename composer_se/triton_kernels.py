"""The two Triton kernels of Squeeze-and-Excitation, and the functions that launch them.

Both see a tensor of maps as (samples, channels, pixels), whatever its memory format:

- `_sum_kernel` reduces over the pixels: the squeeze, and the sum in the gradient of the gate's logits;
- `_scale_kernel` goes over all elements: ``u * sigmoid(z)``, and the gradient ``g * sigmoid(z) + dp / pixels``.

They compute in float32 whatever the dtype of the tensors, use no atomics, and split the work by shape alone, so equal
inputs give equal bits. The launchers take dense tensors, as `memory_format_of` defines, and launch nothing for empty
ones. Under ``TRITON_INTERPRET=1`` they run on the CPU.
"""

# Launches pass numbers where kernels declare tl.constexpr, and names of arguments not to specialise on.
# pyright: reportArgumentType=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from composer_se.ops import KERNEL_DTYPES

__all__ = ["logits_grad", "memory_format_of", "scale", "squeeze"]

# Unmeasured so far, all of them, for want of a GPU: the reasons are arithmetic. A tile gives each thread of four warps
# 16 elements, two 16-byte loads in half precision. Runs along the contiguous axis of 256 bytes and more fill whole
# memory sectors; a long run of pixels leaves a smaller share of a map to a tile that is partly masked off. Reductions
# are cut into enough programs for every multiprocessor of a large GPU to have several, each of enough tiles to repay
# its partial sums.
_TILE = 2048
_RUN_OF_CHANNELS = 128
_RUN_OF_PIXELS = 1024
_PROGRAMS = 512
_TILES_PER_PROGRAM = 4


def memory_format_of(u: Tensor) -> torch.memory_format:
    """The memory format in which ``u`` is dense.

    Args:
        u: Maps of shape (..., C, H, W).

    Returns:
        `torch.contiguous_format`, which also stands for maps that are dense both ways, or `torch.channels_last`.

    Raises:
        ValueError: If ``u`` is dense in neither, or its dtype is not one of `composer_se.ops.KERNEL_DTYPES`.
    """
    if u.dtype not in KERNEL_DTYPES:
        names = ", ".join(str(dtype) for dtype in KERNEL_DTYPES)
        raise ValueError(f"The Triton kernels take {names}, but the maps are {u.dtype}.")
    if u.is_contiguous():
        return torch.contiguous_format
    if u.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    raise ValueError(
        f"The Triton kernels take contiguous and channels_last maps, but these of shape {tuple(u.shape)} have "
        f"strides {u.stride()}."
    )


def squeeze(u: Tensor) -> Tensor:
    """The mean of every map, accumulated in float32.

    Args:
        u: Dense maps of shape (..., C, H, W).

    Returns:
        Tensor of shape (..., C) and of ``u``'s dtype.
    """
    means = u.new_empty(u.shape[:-2])
    _sum_pixels(u, None, None, False, means, divisor=_pixels(u))
    return means


def logits_grad(g: Tensor, kept: Tensor, z: Tensor, kept_is_product: bool) -> Tensor:
    """The gradient of the gate's logits, ``slope * sum over H, W of g * kept``.

    Args:
        g: Gradient of the product, of shape (..., C, H, W), in ``kept``'s memory format.
        kept: The product ``v = u * sigmoid(z)`` or the map ``u``, dense.
        z: The logits, of shape (..., C).
        kept_is_product: Whether ``kept`` is ``v``. The slope is ``1 - s`` then, and ``s * (1 - s)`` for ``u``.

    Returns:
        Tensor of ``z``'s shape and dtype.
    """
    grad_z = torch.empty_like(z, memory_format=torch.contiguous_format)
    _sum_pixels(g, kept, z.contiguous(), kept_is_product, grad_z, divisor=1)
    return grad_z


def scale(u: Tensor, z: Tensor, out: Tensor, added: Tensor | None = None) -> Tensor:
    """Writes ``u * sigmoid(z) + added / (H * W)`` into ``out``.

    Args:
        u: Dense maps of shape (..., C, H, W).
        z: Logits of shape (..., C).
        out: A tensor of ``u``'s shape and memory format, which may be ``u`` itself.
        added: One number per map, of shape (..., C): the gradient of the means. Default: nothing.

    Returns:
        ``out``.
    """
    if out.numel() == 0:
        return out
    samples, channels, pixels, channel_stride, pixel_stride = _as_maps(u)
    block_c, block_i = _tile(channels, pixels, channel_stride)
    grid = (samples * triton.cdiv(channels, block_c) * triton.cdiv(pixels, block_i),)
    with torch.cuda.device_of(u):
        _scale_kernel[grid](
            u,
            z.contiguous(),
            None if added is None else added.contiguous(),
            out,
            channels,
            pixels,
            channel_stride,
            pixel_stride,
            BLOCK_C=block_c,
            BLOCK_I=block_i,
        )
    return out


def _sum_pixels(
    a: Tensor, b: Tensor | None, z: Tensor | None, kept_is_product: bool, out: Tensor, divisor: int
) -> None:
    """Launches `_sum_kernel` once, or twice where one program for each block of maps would leave the GPU idle."""
    if out.numel() == 0:
        return
    samples, channels, pixels, channel_stride, pixel_stride = _as_maps(a)
    block_c, block_i = _tile(channels, pixels, channel_stride)
    programs = samples * triton.cdiv(channels, block_c)
    tiles = triton.cdiv(pixels, block_i)
    tiles_per_split = max(_TILES_PER_PROGRAM, triton.cdiv(tiles, triton.cdiv(_PROGRAMS, programs)))
    splits = max(1, triton.cdiv(tiles, tiles_per_split))
    strides = (channels, pixels, channel_stride, pixel_stride)
    with torch.cuda.device_of(a):
        if splits == 1:
            _sum_kernel[(programs,)](
                a, b, z, out, *strides, 1, max(tiles, 1), divisor, kept_is_product, BLOCK_C=block_c, BLOCK_I=block_i
            )
            return
        maps = samples * channels
        sums = a.new_empty((splits, maps), dtype=torch.float32)
        _sum_kernel[(programs * splits,)](
            a, b, None, sums, *strides, maps, tiles_per_split, 1, False, BLOCK_C=block_c, BLOCK_I=block_i
        )
        # The partial sums are maps of `splits` pixels in turn, with the channel axis contiguous.
        block_c, block_i = _tile(maps, splits, 1)
        _sum_kernel[(triton.cdiv(maps, block_c),)](
            sums, None, z, out, maps, splits, 1, maps, 1, triton.cdiv(splits, block_i), divisor, kept_is_product,
            BLOCK_C=block_c, BLOCK_I=block_i,
        )  # fmt: skip


def _as_maps(u: Tensor) -> tuple[int, int, int, int, int]:
    """Samples, channels, pixels, and the strides of the last two; contiguous maps count as one sample."""
    pixels = _pixels(u)
    if u.is_contiguous():
        return 1, u.shape[:-2].numel(), pixels, pixels, 1
    return u.shape[0], u.shape[1], pixels, 1, u.shape[1]


def _pixels(u: Tensor) -> int:
    return u.shape[-2] * u.shape[-1]


def _tile(channels: int, pixels: int, channel_stride: int) -> tuple[int, int]:
    """Channels and pixels of a program's tile: long along the contiguous axis, no longer than the map asks for."""
    block_c, block_i = triton.next_power_of_2(channels), triton.next_power_of_2(max(pixels, 1))
    if channel_stride == 1:
        block_c = min(block_c, _RUN_OF_CHANNELS)
        return block_c, min(block_i, _TILE // block_c)
    block_i = min(block_i, _RUN_OF_PIXELS)
    return min(block_c, _TILE // block_i), block_i


# Offsets are 64 bits wide throughout: batches of more than 2**31 elements are in reach of one GPU. The products are
# taken per row and per column of a tile, so that an element costs one wide addition.


@triton.jit(do_not_specialize=["out_stride", "tiles_per_split", "divisor"])
def _sum_kernel(
    a_ptr,
    b_ptr,
    z_ptr,
    out_ptr,
    channels,
    pixels,
    channel_stride,
    pixel_stride,
    out_stride,
    tiles_per_split,
    divisor,
    KEPT_IS_PRODUCT: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """Sums a, or a * b, over a run of pixels; divides, and multiplies by the gate's slope if there are logits."""
    splits = tl.maximum(tl.cdiv(tl.cdiv(pixels, BLOCK_I), tiles_per_split), 1)
    channel_blocks = tl.cdiv(channels, BLOCK_C)
    program = tl.program_id(0).to(tl.int64)
    split = program % splits
    block = program // splits
    sample = block // channel_blocks
    c = (block % channel_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_channels = c < channels
    rows = sample * channels * pixels + c * channel_stride
    first = split * tiles_per_split * BLOCK_I
    last = tl.minimum((split + 1) * tiles_per_split * BLOCK_I, pixels)
    acc = tl.zeros((BLOCK_C, BLOCK_I), dtype=tl.float32)
    for start in range(first, last, BLOCK_I):
        i = start + tl.arange(0, BLOCK_I)
        inside = in_channels[:, None] & (i < pixels)[None, :]
        offsets = rows[:, None] + (i * pixel_stride)[None, :]
        a = tl.load(a_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        if b_ptr is not None:
            a *= tl.load(b_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        acc += a
    result = tl.sum(acc, axis=1) / divisor
    maps = sample * channels + c
    if z_ptr is not None:
        s = tl.sigmoid(tl.load(z_ptr + maps, mask=in_channels, other=0.0).to(tl.float32))
        result *= 1 - s
        if not KEPT_IS_PRODUCT:
            result *= s
    tl.store(out_ptr + split * out_stride + maps, result, mask=in_channels)


@triton.jit
def _scale_kernel(
    u_ptr,
    z_ptr,
    added_ptr,
    out_ptr,
    channels,
    pixels,
    channel_stride,
    pixel_stride,
    BLOCK_C: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """Multiplies maps by sigmoid(z), and adds a number per map divided by the map's pixels, if there is one."""
    pixel_blocks = tl.cdiv(pixels, BLOCK_I)
    channel_blocks = tl.cdiv(channels, BLOCK_C)
    program = tl.program_id(0).to(tl.int64)
    block = program // pixel_blocks
    sample = block // channel_blocks
    c = (block % channel_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    i = (program % pixel_blocks) * BLOCK_I + tl.arange(0, BLOCK_I)
    in_channels = c < channels
    maps = sample * channels + c
    s = tl.sigmoid(tl.load(z_ptr + maps, mask=in_channels, other=0.0).to(tl.float32))
    inside = in_channels[:, None] & (i < pixels)[None, :]
    offsets = (sample * channels * pixels + c * channel_stride)[:, None] + (i * pixel_stride)[None, :]
    result = tl.load(u_ptr + offsets, mask=inside, other=0.0).to(tl.float32) * s[:, None]
    if added_ptr is not None:
        result += (tl.load(added_ptr + maps, mask=in_channels, other=0.0).to(tl.float32) / pixels)[:, None]
    tl.store(out_ptr + offsets, result, mask=inside)
