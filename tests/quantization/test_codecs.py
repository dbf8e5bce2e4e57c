"""The decoders against compressed-tensors' packer and textbook loops, on real-shaped and awkward sizes."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32

from checkpoints import fp8_blocks, from_fp8_blocks, int4_groups
from transformers_k2.quantization.codecs import fp8_block, int4_pack


@pytest.mark.parametrize("shape", [(576, 256), (192, 200), (1, 1), (128, 128), (129, 127), (300, 384)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_fp8_blocks_are_anchored_at_the_first_row(shape: tuple[int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = (
        0.02 * torch.randn(shape) * torch.logspace(-3, 3, shape[0]).unsqueeze(1)
    )  # scales differ from block to block
    quantised, scales = fp8_blocks(weight)
    assert torch.equal(fp8_block.decode(quantised, scales, dtype), from_fp8_blocks(quantised, scales, dtype))


def test_fp8_block_size_of_the_config() -> None:
    quantised = torch.randn(96, 64).to(torch.float8_e4m3fn)
    scales = torch.rand(3, 1)
    decoded = fp8_block.decode(quantised, scales, torch.float32, (32, 64))
    for row in range(96):
        assert torch.equal(decoded[row], quantised[row].float() * scales[row // 32, 0])


@pytest.mark.parametrize("scale", [1.0, 3e-7, 1e-38, 1e30])
def test_every_fp8_byte(scale: float) -> None:
    """All 256 bytes, the NaNs and subnormals among them, against torch's own cast."""
    weight = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).reshape(16, 16)
    decoded = fp8_block.decode(weight, torch.full((1, 1), scale), torch.float32)
    torch.testing.assert_close(decoded, weight.float() * scale, rtol=0, atol=0, equal_nan=True)
    assert decoded.isnan().sum() == 2


def test_fp8_wrong_grid() -> None:
    with pytest.raises(ValueError, match=r"\[576, 256\] weight must be \[5, 2\].*got \[4, 2\]"):
        fp8_block.decode(torch.zeros(576, 256).to(torch.float8_e4m3fn), torch.ones(4, 2), torch.float32)


@pytest.mark.parametrize("shape", [(96, 256), (1, 32), (700, 96), (257, 64)])
def test_int4_unpacks_what_compressed_tensors_packs(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    codes = torch.randint(-8, 8, shape, dtype=torch.int8)
    packed = pack_to_int32(codes, 4)
    assert torch.equal(int4_pack.unpack(packed, shape[1]), codes)
    assert torch.equal(int4_pack.unpack(packed, shape[1]), unpack_from_int32(packed, 4, torch.Size(shape)))


def test_int4_nibble_order() -> None:
    """Codes -8..7 pack to 0x76543210, 0xfedcba98: offset binary, the first code in the low nibble."""
    packed = torch.tensor([[0x76543210, 0xFEDCBA98 - (1 << 32)]], dtype=torch.int32)
    assert int4_pack.unpack(packed, 16).tolist() == [list(range(-8, 8))]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_int4_decodes_to_code_times_scale(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = 0.02 * torch.randn(257, 96)
    weight[5, 32:64] = 0  # a group of zeros has scale 0
    codes, scale = int4_groups(weight)
    codes[5, 32:64] = 0
    decoded = int4_pack.decode(pack_to_int32(codes, 4), scale, dtype, torch.tensor([257, 96]))
    expected = (codes.double() * scale.double().repeat_interleave(32, 1)).float().to(dtype)
    assert torch.equal(decoded, expected)
    if dtype is torch.bfloat16:  # the library's own way: a multiply in bf16
        assert torch.equal(decoded, codes.to(dtype) * scale.repeat_interleave(32, 1))


def test_int4_contradicting_shapes() -> None:
    packed, scale = torch.zeros(4, 8, dtype=torch.int32), torch.ones(4, 2, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"weight_shape \[4, 96\] does not fit weight_packed \[4, 8\]"):
        int4_pack.decode(packed, scale, torch.float32, torch.tensor([4, 96]))
    with pytest.raises(ValueError, match=r"weight_scale \[4, 2\] does not divide a \[4, 63\] weight"):
        int4_pack.decode(packed, scale, torch.float32, torch.tensor([4, 63]))
