"""The INT4 grid against compressed-tensors, textbook loops in float64, and torch's own fake quantisation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import quantize as library_quantize
from compressed_tensors.quantization.utils import calculate_qparams

from transformers_k2.quantization import int4
from transformers_k2.quantization.codecs import int4_pack

DTYPES = [torch.bfloat16, torch.float32]


def weights(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Real-shaped: rows of different magnitude, a few outliers, one group of zeros and one of tiny values."""
    w = 0.02 * torch.randn(shape) * torch.logspace(-2, 1, shape[-2]).unsqueeze(1)
    w.view(-1)[:: shape[-1] * 3 + 1] *= 8
    w[..., 0, :32] = 0
    w[..., -1, -32:] = 1e-37 * torch.randn(32)
    return w.to(dtype)


def textbook(w: torch.Tensor, group_size: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    """K2's rule, one weight after the other."""
    codes = torch.empty(w.shape, dtype=torch.int8)
    scale = torch.empty(*w.shape[:-1], w.shape[-1] // group_size, dtype=torch.bfloat16)
    for index in np.ndindex(*scale.shape):
        *row, group = index
        part = slice(group * group_size, (group + 1) * group_size)
        values = w[(*row, part)].double().numpy()
        step = torch.tensor(np.abs(values).max() / 7).bfloat16()
        scale[index] = step
        for offset, value in enumerate(values):
            code = 0 if step == 0 else round(float(value) / float(step))  # Python rounds half to even
            codes[(*row, group * group_size + offset)] = max(-7, min(7, code))
    return codes, scale


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "group_size"), [((5, 96), 32), ((3, 4, 64), 32), ((2, 1, 40), 8), ((2, 2, 3, 32), 32)]
)
def test_kimi_grid(shape: tuple[int, ...], group_size: int, dtype: torch.dtype) -> None:
    w = weights(*shape, dtype=dtype)
    codes, scale = int4.quantize(w, group_size)
    expected_codes, expected_scale = textbook(w, group_size)
    assert torch.equal(scale, expected_scale)
    assert torch.equal(codes, expected_codes)
    assert codes[..., 0, :8].eq(0).all()


def test_ties_go_to_the_even_code() -> None:
    """With amax 7 the scale is 1, and the weights are their own quotients."""
    w = torch.tensor([[7.0, 0.5, 1.5, 2.5, -0.5, -1.5, -6.5, 5.5]])
    assert int4.quantize(w, 8)[0].tolist() == [[7, 0, 2, 2, 0, -2, -6, 6]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_compressed_tensors_grid(dtype: torch.dtype) -> None:
    w = weights(6, 96, dtype=dtype)
    w[-1, -32:] = 0.01 * torch.randn(32)  # the library puts a floor under scales
    arguments = QuantizationArgs(num_bits=4, strategy="group", group_size=32, symmetric=True)
    groups = w.unflatten(1, (3, 32))
    library_scale, zero_point = calculate_qparams(groups.amin(-1), groups.amax(-1), arguments)
    library_scale = library_scale.bfloat16()  # as stored
    expected = library_quantize(w, library_scale, zero_point, arguments, dtype=torch.int8)
    codes, scale = int4.quantize(w, convention="compressed_tensors")
    assert scale[0, 0] == 0  # there the library has its epsilon
    library_scale[0, 0] = 0
    assert torch.equal(scale, library_scale)
    assert torch.equal(codes, expected)
    assert not torch.equal(codes, int4.quantize(w)[0])


def test_bfloat16_weights_on_the_grid_stay_there() -> None:
    w = weights(64, 256)
    on_grid = int4.dequantize(*int4.quantize(w), torch.bfloat16)
    again = int4.quantize(on_grid)
    assert torch.equal(int4.dequantize(*again, torch.bfloat16), on_grid)
    assert torch.equal(again[0], int4.quantize(w)[0])


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_dequantize_is_what_the_decoder_of_checkpoints_computes(dtype: torch.dtype) -> None:
    codes = torch.randint(-8, 8, (3, 300, 96), dtype=torch.int8)
    scale = torch.rand(3, 300, 3).bfloat16()
    out = int4.dequantize(codes, scale, dtype)
    assert torch.equal(out, (codes.double() * scale.double().repeat_interleave(32, -1)).to(dtype))
    if dtype is not torch.float64:
        assert torch.equal(out[1], int4_pack.decode(pack_to_int32(codes[1], 4), scale[1], dtype))


@pytest.mark.parametrize("shape", [(4, 32), (3, 5, 64), (1, 9), (2, 7), (2, 3, 1, 40), (0, 8)])
def test_packing(shape: tuple[int, ...]) -> None:
    codes = torch.randint(-8, 8, shape, dtype=torch.int8)
    packed = int4.pack(codes)
    if shape[0]:
        rows = codes.reshape(-1, shape[-1])
        assert torch.equal(packed.reshape(len(rows), -1), pack_to_int32(rows, 4))
    assert packed.shape == (*shape[:-1], -(-shape[-1] // 8))
    assert torch.equal(int4.unpack(packed, shape[-1]), codes)


def test_packing_of_a_part_of_a_larger_tensor() -> None:
    codes = torch.randint(-8, 8, (6, 80), dtype=torch.int8)
    assert torch.equal(int4.pack(codes[::2, 8:72]), pack_to_int32(codes[::2, 8:72].contiguous(), 4))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("convention", list(int4.CONVENTIONS))
def test_fake_quantize_is_quantize_and_dequantize(convention: str, dtype: torch.dtype) -> None:
    w = weights(3, 700, 96, dtype=dtype)  # more rows than a band
    expected = int4.dequantize(*int4.quantize(w, 32, convention), dtype)
    assert torch.equal(int4.fake_quantize(w, 32, convention), expected)
    assert torch.equal(
        int4.fake_quantize(w.transpose(1, 2).contiguous().transpose(1, 2), 32, convention), expected
    )


@pytest.mark.parametrize(("convention", "lowest"), [("kimi", -7), ("compressed_tensors", -8)])
def test_gradient_is_that_of_torchs_fake_quantisation(convention: str, lowest: int) -> None:
    w = weights(12, 64, dtype=torch.float32)
    w[-1, -32:] = torch.linspace(
        -0.1, 0.1, 32
    )  # torch's kernel divides by the scale's reciprocal: no subnormals
    w[0, :32] = 0.3
    w.requires_grad_()
    groups = w.detach().clone().view(24, 32).requires_grad_()
    scale = int4.quantize(w.detach(), convention=convention)[1].float().view(24)
    reference = torch.fake_quantize_per_channel_affine(
        groups, scale, torch.zeros(24, dtype=torch.int32), 0, lowest, 7
    )
    upstream = torch.randn(12, 64)
    reference.backward(upstream.view(24, 32))
    out = int4.fake_quantize(w, convention=convention)
    out.backward(upstream)
    assert groups.grad is not None
    assert torch.equal(out.view(24, 32), reference)
    assert torch.equal(w.grad.view(24, 32), groups.grad)
    assert w.grad.eq(0).any() == (convention == "compressed_tensors")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: int4.quantize(torch.randn(2, 40)), "group_size is 32, but rows have 40 weights"),
        (lambda: int4.quantize(torch.randn(2, 32), 0), "group_size is 0"),
        (
            lambda: int4.fake_quantize(torch.randn(2, 32), convention="awq"),
            "'awq': expected one of kimi, compressed",
        ),
        (lambda: int4.pack(torch.tensor([[3, 8]], dtype=torch.int8)), "run from 3 to 8"),
        (lambda: int4.unpack(torch.zeros(2, 4, dtype=torch.int32), 33), "expected in_features from 25 to 32"),
        (
            lambda: int4.dequantize(torch.zeros(2, 8, dtype=torch.int8), torch.ones(2, 3), torch.float32),
            "8 inputs",
        ),
    ],
)
def test_errors(call: object, message: str) -> None:
    assert callable(call)
    with pytest.raises(ValueError, match=message):
        call()
