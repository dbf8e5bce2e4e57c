"""Products with packed INT4 weights against float64 ones with dequantised weights; the layout against ATen's own packer."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

from transformers_k2.quantization import kernel_layout, packed_linear
from transformers_k2.quantization.kernel_layout import (
    from_kernel,
    from_kernel_,
    kernel_available,
    kernel_scales,
    to_kernel,
    to_kernel_,
)
from transformers_k2.quantization.packed_linear import linear, linear_dequantized, linear_transposed

SHAPES = [(16, 32), (32, 96), (48, 64), (64, 32), (112, 160), (576, 64), (4096, 32)]
ERROR = {torch.bfloat16: 2.2e-3, torch.float32: 1e-5}  # F.linear's own in bfloat16
ROUNDING = 2**-8  # the most that rounding a result to bfloat16 takes; the figure above is an average
FORMS = ["hub", "kernel"]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def matrix(*shape: int, group_size: int = 32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, the hub's form of them and scales: every code occurs, one group is zero, magnitudes differ from row to row."""
    codes = torch.randint(-8, 8, shape, dtype=torch.int8)
    codes.view(-1)[:16] = torch.arange(-8, 8)
    scale = torch.rand(*shape[:-1], shape[-1] // group_size) * torch.logspace(-3, -1, shape[-2]).unsqueeze(1)
    scale[..., -1, -1] = 0
    packed = pack_to_int32(codes.flatten(0, -2), 4).view(*shape[:-1], -1)
    return codes, packed, scale.bfloat16()


def dequantised(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return codes.double() * scale.double().repeat_interleave(codes.shape[-1] // scale.shape[-1], -1)


def in_form(form: str, packed: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return (packed, scale) if form == "hub" else to_kernel(packed, scale)


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.shape == expected.shape
    few = actual.dtype == torch.bfloat16 and actual.numel() < 1000
    error = (actual.double() - expected).norm() / expected.norm()
    assert error < (ROUNDING if few else ERROR[actual.dtype])


@pytest.fixture
def small_bands(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several bands, and a shorter last one, in matrices of a few thousand weights."""
    monkeypatch.setattr(packed_linear, "_BAND", 5000)
    monkeypatch.setattr(kernel_layout, "_BAND", 5000)


@pytest.mark.parametrize("shape", SHAPES)
def test_kernel_form_is_what_aten_packs(shape: tuple[int, int], small_bands: None) -> None:
    codes, packed, scale = matrix(*shape)
    kernel, scales_and_zeros = to_kernel(packed, scale)
    assert torch.equal(kernel, torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int() + 8, 2))
    assert torch.equal(scales_and_zeros[..., 0], scale.T)
    assert not scales_and_zeros[..., 1].any()


@pytest.mark.parametrize("shape", [(48, 64), (3, 48, 64), (2, 2, 112, 96), (0, 32, 32)])
def test_stacks_go_there_and_back(shape: tuple[int, ...], small_bands: None) -> None:
    if shape[0]:
        _, packed, scale = matrix(*shape)
    else:
        packed = torch.zeros(*shape[:-1], shape[-1] // 8, dtype=torch.int32)
        scale = torch.zeros(*shape[:-1], shape[-1] // 32, dtype=torch.bfloat16)
    kernel, scales_and_zeros = to_kernel(packed, scale)
    for place in itertools.product(*map(range, shape[:-2])):
        one, one_scales = to_kernel(packed[place], scale[place])
        assert torch.equal(kernel[place], one)
        assert torch.equal(scales_and_zeros[place], one_scales)
    back, back_scale = from_kernel(kernel, scales_and_zeros)
    assert torch.equal(back, packed)
    assert torch.equal(back_scale, scale)


def test_in_place(small_bands: None) -> None:
    _, packed, scale = matrix(3, 112, 96)
    kernel, _ = to_kernel(packed, scale)
    memory = packed.clone()
    there = to_kernel_(memory)
    assert there.data_ptr() == memory.data_ptr()
    assert torch.equal(there, kernel)
    back = from_kernel_(there)
    assert back.data_ptr() == memory.data_ptr()
    assert torch.equal(back, packed)
    with pytest.raises(ValueError, match="expected contiguous"):
        to_kernel_(packed.transpose(0, 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel(shape: tuple[int, int], dtype: torch.dtype) -> None:
    codes, packed, scale = matrix(*shape)
    weight = dequantised(codes, scale)
    kernel, scales_and_zeros = to_kernel(packed, scale)
    for num_rows in (1, 2, 3, 5, 8, 40):
        x = torch.randn(num_rows, shape[1]).to(dtype)
        assert_close(linear(x, kernel, scales_and_zeros), x.double() @ weight.T)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
def test_bands(
    shape: tuple[int, int], dtype: torch.dtype, form: str, small_bands: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_linear, "has_bfloat16_instructions", lambda: False)
    codes, packed, scale = matrix(*shape)
    weight = dequantised(codes, scale)
    packed, scale = in_form(form, packed, scale)
    for num_rows in (1, 7, 40):
        x, grad = torch.randn(num_rows, shape[1]).to(dtype), torch.randn(num_rows, shape[0]).to(dtype)
        assert_close(linear_dequantized(x, packed, scale), x.double() @ weight.T)
        assert_close(linear_transposed(grad, packed, scale), grad.double() @ weight)


@pytest.mark.parametrize("form", FORMS)
def test_bands_in_bfloat16(form: str, small_bands: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU that has instructions for it: the weights are rounded to bfloat16."""
    monkeypatch.setattr(packed_linear, "has_bfloat16_instructions", lambda: True)
    codes, packed, scale = matrix(112, 160)
    weight = dequantised(codes, scale).bfloat16()
    packed, scale = in_form(form, packed, scale)
    x, grad = torch.randn(40, 160).bfloat16(), torch.randn(40, 112).bfloat16()
    assert_close(linear_dequantized(x, packed, scale), x.double() @ weight.double().T)
    assert_close(linear_transposed(grad, packed, scale), grad.double() @ weight.double())
    eye = torch.eye(160, dtype=torch.bfloat16)
    assert torch.equal(linear_dequantized(eye, packed, scale), weight.T)


@pytest.mark.parametrize("group_size", [32, 64, 128, 256])
@pytest.mark.parametrize("form", FORMS)
def test_group_sizes(group_size: int, form: str, small_bands: None) -> None:
    codes, packed, scale = matrix(80, 512, group_size=group_size)
    weight = dequantised(codes, scale)
    x, grad = torch.randn(3, 512), torch.randn(3, 80)
    assert kernel_available(80, 512, group_size, torch.bfloat16)
    assert_close(linear(x.bfloat16(), *to_kernel(packed, scale)), x.bfloat16().double() @ weight.T)
    packed, scale = in_form(form, packed, scale)
    assert_close(linear_dequantized(x, packed, scale), x.double() @ weight.T)
    assert_close(linear_transposed(grad, packed, scale), grad.double() @ weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_weight_by_itself(dtype: torch.dtype) -> None:
    """Rows of the identity: products are the weights, exact in every form (in bfloat16 rounded once)."""
    codes, packed, scale = matrix(48, 64)
    weight = dequantised(codes, scale).to(dtype)
    kernel = to_kernel(packed, scale)
    eye = torch.eye(64, dtype=dtype)
    assert torch.equal(linear(eye, *kernel), weight.T)
    for form in ((packed, scale), kernel):
        assert torch.equal(linear_dequantized(eye, *form), weight.T)
        assert torch.equal(linear_transposed(torch.eye(48, dtype=dtype), *form), weight)


@pytest.mark.parametrize("form", FORMS)
def test_shapes_of_rows(form: str) -> None:
    """No rows, rows in several dimensions, rows with strides, and a place for the result."""
    codes, packed, scale = matrix(48, 64)
    weight = dequantised(codes, scale)
    packed, scale = in_form(form, packed, scale)
    assert linear_dequantized(torch.zeros(0, 64), packed, scale).shape == (0, 48)
    assert linear_transposed(torch.zeros(2, 0, 48), packed, scale).shape == (2, 0, 64)
    x = torch.randn(64, 5, 2).permute(2, 1, 0)
    out = torch.full((2, 5, 48), torch.nan)
    assert linear_dequantized(x, packed, scale, out) is out
    assert_close(out, x.double() @ weight.T)
    vector = torch.randn(48)
    assert_close(linear_transposed(vector, packed, scale), vector.double() @ weight)
    if form == "kernel":
        assert linear(torch.zeros(0, 64), packed, scale).shape == (0, 48)
        assert_close(linear(x, packed, scale), x.double() @ weight.T)


@pytest.mark.parametrize("shape", [(33, 64), (24, 32), (1, 96)])
def test_rows_that_the_kernel_does_not_take(shape: tuple[int, int], small_bands: None) -> None:
    codes, packed, scale = matrix(*shape)
    assert not kernel_available(*shape, 32, torch.bfloat16)
    with pytest.raises(ValueError, match=f"have {shape[0]} rows .* expected multiples of 16"):
        to_kernel(packed, scale)
    x, grad = torch.randn(5, shape[1]), torch.randn(5, shape[0])
    weight = dequantised(codes, scale)
    assert_close(linear_dequantized(x, packed, scale), x.double() @ weight.T)
    assert_close(linear_transposed(grad, packed, scale), grad.double() @ weight)


def test_kernel_available() -> None:
    assert kernel_available(4096, 7168, 32, torch.bfloat16)
    assert kernel_available(48, 64, 32, torch.float32)
    assert not kernel_available(48, 64, 16, torch.bfloat16)
    assert not kernel_available(48, 96, 64, torch.bfloat16)
    assert not kernel_available(48, 64, 32, torch.float64)


@pytest.fixture
def other_packing(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An ATen that packs from the last input to the first."""
    pack = kernel_layout._aten_pack
    monkeypatch.setattr(kernel_layout, "_aten_pack", lambda codes: pack(codes.flip(1)))
    kernel_layout.find_layout.cache_clear()
    yield
    kernel_layout.find_layout.cache_clear()


def test_unknown_layout(other_packing: None) -> None:
    codes, packed, scale = matrix(32, 64)
    assert not kernel_available(32, 64, 32, torch.bfloat16)
    with pytest.raises(ValueError, match="in an unknown order"):
        to_kernel(packed, scale)
    x = torch.randn(2, 64)
    assert_close(linear_dequantized(x, packed, scale), x.double() @ dequantised(codes, scale).T)


def packed_for_avx512(codes: torch.Tensor) -> torch.Tensor:
    """ATen's order there: 64 rows with rows d and d + 32 in a byte; what is left over in pairs of neighbours."""
    blocks = []
    for block in codes.to(torch.uint8).split(64):
        low, high = (block[:32], block[32:]) if len(block) == 64 else (block[0::2], block[1::2])
        blocks.append((low | high << 4).T.reshape(len(block), -1))
    return torch.cat(blocks)


def test_layout_of_avx512(monkeypatch: pytest.MonkeyPatch, small_bands: None) -> None:
    monkeypatch.setattr(kernel_layout, "_aten_pack", packed_for_avx512)
    kernel_layout.find_layout.cache_clear()
    try:
        assert kernel_layout.known_layout().block == 64
        for num_rows in (16, 48, 64, 240):
            codes, packed, scale = matrix(num_rows, 96)
            kernel, scales_and_zeros = to_kernel(packed, scale)
            assert torch.equal(kernel, packed_for_avx512(codes + 8))
            assert torch.equal(from_kernel(kernel, scales_and_zeros)[0], packed)
            x = torch.randn(5, 96)
            expected = x.double() @ dequantised(codes, scale).T
            assert_close(linear_dequantized(x, kernel, scales_and_zeros), expected)
    finally:
        kernel_layout.find_layout.cache_clear()


OTHER_CAPABILITY = """
import torch
from transformers_k2.quantization.kernel_layout import from_kernel_, known_layout, to_kernel_
from transformers_k2.quantization.packed_linear import linear, linear_dequantized
from transformers_k2.quantization.kernel_layout import kernel_scales
print(torch.backends.cpu.get_cpu_capability(), known_layout())
codes = torch.randint(0, 16, (112, 96), dtype=torch.int32)
packed = sum(codes[:, i::8].long() << 4 * i for i in range(8)).int()
kernel = to_kernel_(packed.clone())
assert torch.equal(kernel, torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 2))
scales = kernel_scales(torch.rand(112, 3))
x = torch.randn(6, 96)
torch.testing.assert_close(linear_dequantized(x, kernel, scales), linear(x, kernel, scales), rtol=1e-4, atol=1e-3)
assert torch.equal(from_kernel_(kernel), packed)
"""


def test_other_vector_instructions() -> None:
    """The layout belongs to the instructions that ATen uses: here none, where rows stand in pairs."""
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": "default"}
    run = [sys.executable, "-c", OTHER_CAPABILITY]
    done = subprocess.run(run, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "slice(0, 31, 2), slice(1, 32, 2)" in done.stdout


def test_errors() -> None:
    _, packed, scale = matrix(48, 64)
    kernel, scales_and_zeros = to_kernel(packed, scale)
    with pytest.raises(ValueError, match=r"3 INT4 groups do not divide 64 inputs"):
        linear_dequantized(torch.zeros(1, 64), packed, torch.ones(48, 3))
    with pytest.raises(ValueError, match=r"scales are \[48, 2\].*expected \[groups, 48, 2\]"):
        linear_dequantized(torch.zeros(1, 64), kernel, scale)
    with pytest.raises(ValueError, match="Rows have 48 features, but the INT4 weights take 64"):
        linear(torch.zeros(1, 48), kernel, scales_and_zeros)
    with pytest.raises(ValueError, match="expected a contiguous"):
        linear_transposed(torch.zeros(2, 48), packed, scale, torch.zeros(64, 2).T)


def test_threshold() -> None:
    """Nothing but bfloat16 goes to the kernel, which does not take float64."""
    assert packed_linear.threshold(torch.bfloat16) > 1
    assert packed_linear.threshold(torch.float32) == packed_linear.threshold(torch.float64) == 1
    codes, packed, scale = matrix(48, 64)
    x = torch.randn(3, 64, dtype=torch.float64)
    result = linear_dequantized(x, *to_kernel(packed, scale))
    torch.testing.assert_close(result, x @ dequantised(codes, scale).T, rtol=1e-12, atol=1e-12)


def test_scales_in_the_dtype_of_the_rows() -> None:
    """Kept in float32 they multiply as the bfloat16 ones do, which are converted at each call."""
    _, packed, scale = matrix(48, 64)
    kernel, scales_and_zeros = to_kernel(packed, scale)
    x = torch.randn(3, 64)
    assert torch.equal(
        linear(x, kernel, kernel_scales(scale, torch.float32)), linear(x, kernel, scales_and_zeros)
    )
