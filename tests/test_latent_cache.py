"""The latent layers against transformers' DynamicLayer, operation by operation, and 8 bits against a float64 loop."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import DynamicCache, EncoderDecoderCache, StaticCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer

from transformers_k2 import KimiK2Config, KimiK2ForCausalLM
from transformers_k2.latent_cache import (
    Int8LatentLayer,
    LatentCache,
    LatentLayer,
    adopt,
    dequantize,
    quantize,
)

CLASSES = [LatentLayer, Int8LatentLayer]


def states(
    num: int, batch: int = 2, dtype: torch.dtype = torch.float32, rank: int = 512, rotary: int = 64
) -> Any:
    scale = torch.rand(batch, 1, num, 1) * 8 + 0.1
    return (torch.randn(batch, 1, num, rank) * scale).to(dtype), torch.randn(batch, 1, num, rotary).to(dtype)


def filled(cls: type, *nums: int, **options: Any) -> tuple[Any, DynamicLayer]:
    """A layer, and upstream's with what it should hold."""
    layer, stock = cls(), DynamicLayer()
    for num in nums:
        new = states(num, **options)
        layer.update(*new)
        stock.update(*(new if cls is LatentLayer else rounded(*new)))
    return layer, stock


def rounded(*parts: Tensor) -> list[Tensor]:
    """Through 8 bits, group by group: 64 from the left of each part; quotients in float32, so that halves are halves."""
    results = []
    for part in parts:
        rows = part.reshape(-1, part.shape[-1]).float().numpy()
        result = np.empty_like(rows)
        for row, values in enumerate(rows):
            for start in range(0, len(values), 64):
                group = values[start : start + 64]
                scale = np.float32(max(map(abs, group))) / np.float32(127) or np.float32(1)
                result[row, start : start + 64] = [
                    np.float32(round(float(value / scale))) * scale for value in group
                ]
        results.append(torch.from_numpy(result).view(part.shape).to(part.dtype))
    return results


def equal(layer: Any, stock: DynamicLayer) -> None:
    assert layer.get_seq_length() == stock.get_seq_length()
    assert type(layer.get_seq_length()) is int
    assert layer.get_mask_sizes(3) == stock.get_mask_sizes(3)
    for ours, theirs in ((layer.keys, stock.keys), (layer.values, stock.values)):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


OPERATIONS: dict[str, Callable[[Any], Any]] = {
    "crop": lambda layer: layer.crop(-3),
    "crop by a tensor": lambda layer: layer.crop(-torch.tensor(2)),
    "crop nothing": lambda layer: layer.crop(0),
    "crop all": lambda layer: layer.crop(-7),
    "crop more than all": lambda layer: layer.crop(-9),
    "reorder": lambda layer: layer.reorder_cache(torch.tensor([1, 1])),
    "select": lambda layer: layer.batch_select_indices(torch.tensor([1, 0])),
    "select by mask": lambda layer: layer.batch_select_indices(torch.tensor([False, True])),
    "repeat": lambda layer: layer.batch_repeat_interleave(3),
    "offload and prefetch": lambda layer: (layer.offload(), layer.prefetch()),
}


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS.keys())
@torch.no_grad()
def test_operations(operation: Callable[[Any], Any], cls: type) -> None:
    """Each, and an update after it."""
    layer, stock = filled(cls, 5, 1, 1)
    operation(layer), operation(stock)
    equal(layer, stock)
    new = states(2, batch=stock.keys.shape[0])
    layer.update(*new)
    stock.update(*(new if cls is LatentLayer else rounded(*new)))
    equal(layer, stock)


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_grows(cls: type, dtype: torch.dtype) -> None:
    """Over several buffers; what was handed out stays as it was."""
    layer, stock, handed_out = cls(), DynamicLayer(), []
    for num in (1, 3, 0, 70, 1, 1, 40, 1):
        new = states(num, batch=1, dtype=dtype)
        ours = layer.update(*new)
        theirs = stock.update(*(new if cls is LatentLayer else rounded(*new)))
        handed_out += zip(ours, theirs, strict=True)
    equal(layer, stock)
    assert all(torch.equal(ours, theirs) for ours, theirs in handed_out)
    for start, stop in ((0, 117), (3, 64), (116, 117), (5, 5)):
        keys, values = layer.latents(start, stop)
        assert torch.equal(keys, stock.keys[:, :, start:stop])
        assert torch.equal(values, stock.values[:, :, start:stop])


@torch.no_grad()
def test_steps_copy_nothing() -> None:
    layer, _ = filled(LatentLayer, 100, 1)
    start = layer.keys.data_ptr()
    for _ in range(20):
        layer.update(*states(1))
    assert layer.keys.data_ptr() == start
    layer.crop(-50)
    layer.append(*states(4))
    assert layer.keys.data_ptr() == start


@pytest.mark.parametrize("cls", CLASSES)
@torch.no_grad()
def test_shallow_copies_part_at_the_next_token(cls: type) -> None:
    layer, stock = filled(cls, 4, 1)
    other, other_stock = copy.copy(layer), copy.copy(stock)
    for each, same in ((layer, stock), (other, other_stock), (copy.copy(other), copy.copy(other_stock))):
        new = states(1)
        each.update(*new)
        same.update(*(new if cls is LatentLayer else rounded(*new)))
    equal(layer, stock)
    equal(other, other_stock)


@pytest.mark.parametrize("cls", CLASSES)
@torch.no_grad()
def test_reset_and_copies(cls: type) -> None:
    layer, stock = filled(cls, 4, 1)
    copied = copy.deepcopy(layer)
    layer.update(*states(1))
    equal(copied, stock)
    layer.reset()
    assert (layer.keys, layer.values, layer.is_initialized) == (None, None, False)
    assert (layer.get_seq_length(), layer.nbytes) == (0, 0)
    new = states(2, batch=3, dtype=torch.bfloat16)
    stock.reset()
    layer.update(*new)
    stock.update(*(new if cls is LatentLayer else rounded(*new)))
    equal(layer, stock)
    with pytest.raises(ValueError, match="positive"):
        layer.crop(1)


@torch.no_grad()
def test_assigned_tensors() -> None:
    """One after the other, as upstream code does, and other numbers."""
    layer, stock = filled(LatentLayer, 6)
    for each in (layer, stock):
        each.keys = each.keys[..., :4, :] * 2
        each.values = each.values[..., :4, :]
    equal(layer, stock)
    for _ in range(2):
        new = states(1)
        layer.update(*new), stock.update(*new)
        equal(layer, stock)
    layer.keys, layer.values = states(3)
    layer.crop(-1)
    assert layer.keys.shape == (2, 1, 2, 512)
    quantised, _ = filled(Int8LatentLayer, 6)
    new = states(3)
    quantised.keys, quantised.values = new
    assert torch.equal(quantised.keys, new[0])  # exact until they are stored
    assert quantised.codes.shape == (2, 3, 576)
    assert torch.equal(quantised.keys, rounded(new[0])[0])


@torch.no_grad()
def test_what_does_not_fit() -> None:
    """Dtypes are promoted, other batches refused, as by upstream's concatenation."""
    layer, stock = filled(LatentLayer, 2, dtype=torch.bfloat16)
    new = states(1, dtype=torch.float32)
    layer.update(*new), stock.update(*new)
    equal(layer, stock)
    for cls in CLASSES:
        layer, stock = filled(cls, 2)
        with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
            layer.update(*states(1, batch=1))
    wide = torch.randn(1, 4, 3, 20), torch.randn(1, 4, 3, 20)  # keys and values of another model
    layer, stock = LatentLayer(), DynamicLayer()
    layer.update(*wide), stock.update(*wide)
    equal(layer, stock)
    with pytest.raises(ValueError, match="4 heads"):
        Int8LatentLayer().update(*wide)


def test_gradients() -> None:
    """Through two updates and an update without gradients, as upstream; nothing is written over what a graph holds."""
    first, second, third = ([part.requires_grad_() for part in states(num)] for num in (3, 2, 1))
    weight = torch.randn(512)
    wanted = []
    for layer in (LatentLayer(), DynamicLayer()):
        layer.update(*first)
        keys, values = layer.update(*second)
        loss = (keys.sin() @ weight).sum() + values.cos().sum()
        with torch.no_grad():
            layer.crop(-1)
            layer.update(*third)
        wanted.append(torch.autograd.grad(loss, [*first, *second]))
        assert not layer.keys[..., -1:, :].isnan().any()
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*wanted, strict=True))
    with pytest.raises(ValueError, match="no gradients"):
        Int8LatentLayer().update(*first)


def test_graph_that_saves_the_cache() -> None:
    """Queries alone need gradients: what they met must still be there when they are computed."""
    query = torch.randn(2, 1, 1, 512, requires_grad=True)
    grads = []
    for layer in (LatentLayer(), DynamicLayer()):
        torch.manual_seed(1)
        loss = torch.zeros(())
        for _ in range(3):
            keys, _ = layer.update(*states(2))
            loss = loss + (query @ keys.mT).exp().sum()
        grads.append(torch.autograd.grad(loss, query)[0])
    assert torch.equal(*grads)


@pytest.mark.parametrize("cls", CLASSES)
def test_inference_mode(cls: type) -> None:
    """A cache filled under inference mode goes on without it, and back."""
    layer, stock = cls(), DynamicLayer()
    for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode, torch.enable_grad):
        with mode():
            new = states(2)
            layer.update(*new)
            stock.update(*(new if cls is LatentLayer else rounded(*new)))
    equal(layer, stock)


@pytest.mark.parametrize("cls", CLASSES)
@torch.no_grad()
def test_offload(cls: type) -> None:
    """To the CPU and back to the first update's device; `meta` stands for an accelerator."""
    layer = cls()
    layer.update(*(part.to("meta") for part in states(3)))
    assert layer.device.type == "meta"
    layer._change(lambda buffer: torch.zeros_like(buffer, device="cpu"))  # meta tensors cannot be copied from
    layer.offload()
    assert {layer.keys.device.type, layer.values.device.type} == {"cpu"}
    layer.prefetch()
    assert {layer.keys.device.type, layer.values.device.type} == {"meta"}
    assert layer.update(*(part.to("meta") for part in states(1)))[0].shape == (2, 1, 4, 512)


@pytest.mark.parametrize(("rank", "rotary"), [(512, 64), (24, 12), (100, 65)])
@torch.no_grad()
def test_int8(rank: int, rotary: int) -> None:
    new = states(9, rank=rank, rotary=rotary)
    new[0][0, 0, 1, :64] = 0
    new[0][1, 0, 3] = new[0][1, 0, 3] * 1e-44
    layer = Int8LatentLayer()
    keys, values = layer.update(*new)
    wanted = rounded(*new)
    assert torch.equal(values, wanted[1])
    torch.testing.assert_close(keys, wanted[0], rtol=0, atol=1e-37)  # of values below the smallest scale
    groups = -(-rank // 64) + -(-rotary // 64)
    assert layer.codes.shape == (2, 9, rank + rotary)
    assert (layer.codes.dtype, layer.scales.dtype) == (torch.int8, torch.float32)
    assert layer.scales.shape == (2, 9, groups)
    assert layer.codes.stride(-1) == 1
    assert (layer.scales >= torch.finfo(torch.float32).tiny).all()
    for part, exact in zip((keys, values), new, strict=True):
        for got, group in zip(part.split(64, -1), exact.double().split(64, -1), strict=True):
            bound = group.abs().amax(-1, keepdim=True).clamp(min=1e-36) * (1 / 254 + 1e-6)
            assert ((got - group).abs() <= bound).all()
    assert ((layer.codes == 127) | (layer.codes == -127)).any(-1).sum() >= 16  # the range is used


@torch.no_grad()
def test_int8_of_one_token_is_its_own() -> None:
    keys, values = states(5, batch=3, dtype=torch.bfloat16)
    codes, scales = quantize(keys, values)
    for row in range(3):
        for token in range(5):
            alone = quantize(keys[row, 0, token], values[row, 0, token])
            assert torch.equal(alone[0], codes[row, 0, token])
            assert torch.equal(alone[1], scales[row, 0, token])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@torch.no_grad()
def test_int8_does_not_hide_what_is_not_finite(bad: float) -> None:
    keys, values = states(2)
    keys[1, 0, 0, 70] = bad
    got, _ = dequantize(*quantize(keys, values), (512, 64), torch.float32)
    assert not got[1, 0, 0, 64:128].isfinite().any()
    got[1, 0, 0, 64:128] = 0
    assert got.isfinite().all()


@pytest.mark.parametrize("cls", CLASSES)
@torch.no_grad()
def test_restore(cls: type) -> None:
    """What is stored goes to another layer bit for bit, and is not written over from there."""
    (source, stock), (layer, _) = filled(cls, 6), filled(cls, 2)
    layer.restore(source.stored())
    equal(layer, stock)
    layer.crop(-3)
    layer.append(*states(2))
    assert layer.get_seq_length() == 5
    equal(source, stock)
    for other in (filled(cls, 2, batch=1)[0], filled(cls, 2, rank=128)[0]):
        with pytest.raises(ValueError, match=r"stored latents are .*expected"):
            layer.restore(other.stored())


@torch.no_grad()
def test_bytes() -> None:
    for cls, wanted in ((LatentLayer, 1152), (Int8LatentLayer, 612)):
        layer, _ = filled(cls, 800, batch=1, dtype=torch.bfloat16) if cls is LatentLayer else (cls(), None)
        if cls is Int8LatentLayer:
            layer.append(*states(800, batch=1, dtype=torch.bfloat16))
        assert layer.nbytes == wanted * 1000


def test_adopt(tiny_config: Callable[..., KimiK2Config]) -> None:
    config = tiny_config()
    cache = DynamicCache(config=config)
    adopt(cache)
    layers = list(cache.layers)
    adopt(cache)
    assert [type(layer) for layer in layers] == [LatentLayer] * 3
    assert all(a is b for a, b in zip(layers, cache.layers, strict=True))
    assert not cache.is_compileable
    lazy = DynamicCache()
    adopt(lazy)
    lazy.update(*states(1), layer_idx=1)
    assert [type(layer) for layer in lazy.layers] == [LatentLayer] * 2
    used = DynamicCache()
    first, second = states(2), states(3)
    used.update(*first, layer_idx=0)
    adopt(used)
    assert type(used.layers[0]) is LatentLayer
    with torch.no_grad():
        together = used.update(*second, layer_idx=0)
    for got, parts in zip(together, zip(first, second, strict=True), strict=True):
        assert torch.equal(got, torch.cat(parts, dim=-2))
    static = StaticCache(config=config, max_cache_len=8)
    adopt(static)
    assert {type(layer) for layer in static.layers} == {StaticLayer}
    both = EncoderDecoderCache(DynamicCache(), DynamicCache())
    adopt(both)
    assert both.self_attention_cache.layer_class_to_replicate is DynamicLayer


def test_cache(tiny_config: Callable[..., KimiK2Config], tiny_model: KimiK2ForCausalLM) -> None:
    assert [type(layer) for layer in LatentCache(tiny_config()).layers] == [LatentLayer] * 3
    cache = LatentCache(dtype="int8")
    ids = torch.randint(3, 331, (2, 9))
    with torch.no_grad():
        exact = tiny_model(ids).logits
        got = (
            tiny_model(ids[:, :5], past_key_values=cache).logits,
            tiny_model(ids[:, 5:], past_key_values=cache).logits,
        )
    assert [type(layer) for layer in cache.layers] == [Int8LatentLayer] * 3
    assert cache.get_seq_length() == 9
    assert repr(cache) == f"LatentCache(dtype='int8', num_layers=3, num_tokens=9, nbytes={cache.nbytes})"
    assert cache.nbytes == 3 * 2 * 64 * (36 + 2 * 4)
    error = (torch.cat(got, 1) - exact).norm() / exact.norm()
    assert 0 < error < 0.02
    assert [keys.shape for keys, *_ in cache] == [(2, 1, 9, 24)] * 3
    with pytest.raises(ValueError, match=r"dtype is 'int4', expected one of \['auto', 'int8'\]"):
        LatentCache(dtype="int4")  # type: ignore[arg-type]
    sliding = tiny_config()
    sliding.layer_types = ["sliding_attention"] * 3
    sliding.sliding_window = 4
    with pytest.raises(ValueError, match=DynamicSlidingWindowLayer.__name__):
        LatentCache(sliding)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3},
        {"prompt_lookup_num_tokens": 3},
        {"do_sample": True},
        {"num_return_sequences": 2, "do_sample": True},
    ],
    ids=["greedy", "beams", "prompt lookup", "sampling", "two sequences"],
)
def test_generate(options: dict[str, Any], tiny_model: KimiK2ForCausalLM) -> None:
    ids = torch.randint(3, 331, (1, 11))
    ids = torch.cat([ids, ids[:, :6]], 1)
    sequences = []
    for cache in (DynamicCache(), LatentCache()):
        if type(cache) is DynamicCache:
            cache.layers = [DynamicLayer() for _ in range(3)]
            cache.layer_class_to_replicate = None
            for layer in cache.layers:
                layer.__class__ = type("StockLayer", (DynamicLayer,), {})  # not adopted
        torch.manual_seed(3)
        sequences.append(
            tiny_model.generate(
                ids, past_key_values=cache, max_new_tokens=20, **{"do_sample": False} | options
            )
        )
    assert torch.equal(*sequences)
    assert sequences[0].shape[1] > 20


@pytest.mark.parametrize("cls", CLASSES)
def test_compiled(cls: type) -> None:
    """A step with growing lengths: the same numbers, few graphs, and eager code goes on from there."""
    counter = CompileCounterWithBackend("eager")

    @torch.no_grad()
    def step(layer: Any, keys: Tensor, values: Tensor) -> Tensor:
        keys, values = layer.update(keys, values)
        return keys.sum((1, 2, 3)) + values.sum((1, 2, 3))

    torch._dynamo.reset()
    compiled = torch.compile(step, backend=counter, fullgraph=True)
    layer, _ = filled(cls, 5)
    twin = copy.deepcopy(layer)
    for _ in range(12):
        new = states(1)
        torch.testing.assert_close(compiled(layer, *new), step(twin, *new))
    assert torch.equal(layer.keys, twin.keys)
    assert counter.frame_count <= 4
    new = states(1)
    torch.testing.assert_close(step(layer, *new), step(twin, *new))
