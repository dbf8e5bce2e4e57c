"""Caches of MLA's latents: written in place instead of copied at every step, and one that stores 8 bits a value.

Per token and layer upstream's attention caches the normed latent as keys [b, 1, T, rank] and the shared rotated key as
values [b, 1, T, rotary]. Upstream's DynamicLayer concatenates, which copies the whole cache for every token. Here both parts
of a token lie side by side in one buffer that is larger than needed, and a step writes its own rows only.

What this gives up: up to a fifth of the buffer is unused, and tensors handed out are views. Earlier ones stay right while
the cache grows (only rows behind theirs are written), but what a view shows of tokens that were cropped changes with the
next write. Where autograd could need what was handed out, and in compiled code, layers concatenate as upstream's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache, DynamicCache, EncoderDecoderCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

GROUP = 64  # values that share a scale
_LEAST_CAPACITY = 64
_LEAST_SCALE = 2.0**-126  # float32's smallest normal number: below it the quotients would lose their digits


class LatentLayer(DynamicLayer):
    """A layer's latents, [b, heads, T, rank] and [b, heads, T, rotary] in one dtype; K2's have one head.

    `keys` and `values` can be read, and assigned as those of DynamicLayer: what was assigned moves to the buffer with the
    next update. Offloading moves the buffer; this was tried between the CPU and the meta device only, without streams.
    """

    def __init__(self, **kwargs: Any) -> None:
        # Either buffers [b, ..., capacity, width] hold the tokens, or (None) two loose tensors do, as upstream.
        self._buffers: tuple[Tensor, ...] | None = None
        self._length = 0
        self._writable = False  # in place: the buffers are ours, no graph knows them
        self._num_heads, self._widths = 0, (0, 0)
        self._loose: list[Tensor | None] = [None, None]
        super().__init__(**kwargs)

    def __copy__(self) -> LatentLayer:
        """Another layer with the same tensors; the next to write takes a buffer of its own."""
        other = type(self).__new__(type(self))
        other.__dict__ |= self.__dict__
        self._writable = other._writable = False
        other._loose = list(self._loose)
        return other

    @property
    def keys(self) -> Tensor | None:
        """[b, heads, T, rank]; None before the first update."""
        return self._loose[0] if self._buffers is None else self.latents(0, self._length)[0]

    @keys.setter
    def keys(self, keys: Tensor | None) -> None:
        self._loosen()
        self._loose[0] = keys

    @property
    def values(self) -> Tensor | None:
        """[b, heads, T, rotary]; None before the first update."""
        return self._loose[1] if self._buffers is None else self.latents(0, self._length)[1]

    @values.setter
    def values(self, values: Tensor | None) -> None:
        self._loosen()
        self._loose[1] = values

    @property
    def nbytes(self) -> int:
        """Bytes allocated, those for tokens to come included."""
        held = self._loose if self._buffers is None else self._buffers
        return sum(tensor.nbytes for tensor in held if tensor is not None)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add tokens [b, heads, n, rank], [b, heads, n, rotary]; returns all T of them."""
        self.append(key_states, value_states)
        return self.latents(0, self.get_seq_length())

    def append(self, key_states: Tensor, value_states: Tensor) -> None:
        """Add tokens [b, heads, n, rank], [b, heads, n, rotary]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if not self._fits(key_states, value_states):
            super().update(key_states, value_states)  # promotes dtypes, or says what does not fit
        elif self._buffers is None:
            self._pack(key_states, value_states)
        else:
            self._write(key_states, value_states)

    def latents(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Tokens start .. stop: [b, heads, stop - start, rank], [b, heads, stop - start, rotary]."""
        if self._buffers is None:
            keys, values = self._loose
            assert keys is not None
            assert values is not None
            return keys[..., start:stop, :], values[..., start:stop, :]
        length = min(stop, self._length) - start
        return self._decode(tuple(buffer.narrow(-2, start, length) for buffer in self._buffers))

    def stored(self) -> tuple[Tensor, ...]:
        """What is held, as it is held: [b, heads, T, rank + rotary]; 8 bits: codes and scales. None of it is copied."""
        if self._buffers is None:
            self._pack()
        assert self._buffers is not None
        return tuple(buffer.narrow(-2, 0, self._length) for buffer in self._buffers)

    def restore(self, stored: tuple[Tensor, ...]) -> None:
        """Hold what another layer's `stored` returned, instead of what is held; widths, dtype and device are this layer's.

        Raises:
            ValueError: this layer holds tensors of other shapes (but for the number of tokens) or dtypes.
        """
        for ours, new in zip(self.stored(), stored, strict=True):
            expected, got = ([*each.shape[:-2], each.shape[-1], each.dtype] for each in (ours, new))
            if expected != got:
                raise ValueError(
                    f"The stored latents are {got} (without the number of tokens), expected {expected}."
                )
        self._buffers = tuple(new.to(ours.device) for ours, new in zip(self.stored(), stored, strict=True))
        self._length, self._writable = stored[0].shape[-2], False

    def get_seq_length(self) -> int:
        """T."""
        return super().get_seq_length() if self._buffers is None else self._length

    def reset(self) -> None:
        """Forget everything, dtype and device too."""
        self._buffers, self._length = None, 0
        super().reset()

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens (a negative count, as upstream); nothing is copied.

        Raises:
            ValueError: the count is positive.
        """
        if self._buffers is None or tokens_to_remove > 0:
            super().crop(tokens_to_remove)
        else:
            self._length = max(0, self._length + int(tokens_to_remove))  # assisted decoding gives a tensor

    def offload(self) -> None:
        """Move what is held to the CPU."""
        if self._buffers is None:
            super().offload()
        else:
            self._change(lambda buffer: buffer.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Move what is held to the device of the first update."""
        if self._buffers is None:
            super().prefetch()
        else:
            self._change(lambda buffer: buffer.to(self.device, non_blocking=True))

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Batch rows `beam_idx` [b] take the places 0 .. b."""
        if self._buffers is None:
            super().reorder_cache(beam_idx)
        else:
            self._change(lambda buffer: buffer.index_select(0, beam_idx.to(buffer.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each batch row becomes `repeats` rows."""
        if self._buffers is None:
            super().batch_repeat_interleave(repeats)
        else:
            self._change(lambda buffer: buffer.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the batch rows `indices` (numbers, or a boolean mask)."""
        if self._buffers is None:
            super().batch_select_indices(indices)
        else:
            self._change(lambda buffer: buffer[indices, ...])

    def _change(self, function: Callable[[Tensor], Tensor]) -> None:
        assert self._buffers is not None
        self._buffers = tuple(map(function, self._buffers))

    def _fits(self, keys: Tensor, values: Tensor) -> bool:
        """Whether the two can lie side by side, behind what is held."""
        if keys.dtype != values.dtype or keys.device != values.device:
            return False
        *rows, width = keys.shape
        if values.shape[:-1] != tuple(rows):
            return False
        if self._buffers is not None:
            buffer = self._buffers[0]
            return (
                (rows[0], rows[1], width, values.shape[-1])
                == (buffer.shape[0], self._num_heads, *self._widths)
                and keys.dtype == self.dtype
                and keys.device == buffer.device
            )
        return all(
            held is None
            or held.dim() == 1  # as initialised
            or (held.shape[:2], held.shape[3], held.dtype, held.device)
            == (new.shape[:2], new.shape[3], new.dtype, new.device)
            for held, new in zip(self._loose, (keys, values), strict=True)
        )

    def _pack(self, *new: Tensor) -> None:
        """Move the loose tensors to buffers, and the new ones behind them."""
        parts = []
        for index, held in enumerate(self._loose):
            both = [] if held is None or held.dim() == 1 else [held]
            both += new[index : index + 1]
            parts.append(both[0] if len(both) == 1 else torch.cat(both, dim=-2))
        keys, values = parts
        self.dtype = keys.dtype
        self._num_heads, self._widths = keys.shape[1], (keys.shape[-1], values.shape[-1])
        encoded = self._encode(keys[..., :1, :], values[..., :1, :])  # for the widths
        self._buffers, self._length, self._writable = tuple(part[..., :0, :] for part in encoded), 0, False
        self._loose = [None, None]
        self._write(keys, values)

    def _loosen(self) -> None:
        if self._buffers is not None:
            loose = list(self.latents(0, self._length))
            self._buffers, self._loose = None, loose

    def _write(self, keys: Tensor, values: Tensor) -> None:
        assert self._buffers is not None
        first, num_new = self._buffers[0], keys.shape[-2]
        length = self._length + num_new
        if torch.compiler.is_compiling() or torch.is_grad_enabled():
            self._buffers = tuple(
                torch.cat((old[..., : self._length, :], part), dim=-2)
                for old, part in zip(self._buffers, self._encode(keys, values), strict=True)
            )
            self._writable = False
        else:
            is_locked = first.is_inference() and not torch.is_inference_mode_enabled()
            if not self._writable or is_locked or first.shape[-2] < length:
                self._change(lambda buffer: _longer(buffer[..., : self._length, :], length))
                self._writable = True
            self._put(keys, values, *(buffer.narrow(-2, self._length, num_new) for buffer in self._buffers))
        self._length = length

    def _put(self, keys: Tensor, values: Tensor, *places: Tensor) -> None:
        """Write what `_encode` makes of the tokens to these places."""
        torch.cat((keys, values), dim=-1, out=places[0])

    def _encode(self, keys: Tensor, values: Tensor) -> tuple[Tensor, ...]:
        """What the buffers hold of these tokens: new tensors [b, ..., n, width]."""
        return (torch.cat((keys, values), dim=-1),)

    def _decode(self, parts: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        keys, values = parts[0].split_with_sizes(self._widths, dim=-1)
        return keys, values


class Int8LatentLayer(LatentLayer):
    """A layer's latents in 8 bits: 612 bytes per token and layer at K2's widths (512 and 64) instead of bfloat16's 1152.

    Groups of 64 neighbouring values, of each part by itself (its last group may be smaller), share a float32 scale
    max|x| / 127, and codes are rounded to nearest: an error is at most 1/254 of the largest magnitude in its group (of
    1e-36, where all are smaller), before the result is rounded to the original dtype. With a NaN or an infinity in it a
    group has no finite value left. Tokens are quantised one by one, whatever comes with them. There are no gradients.
    """

    @property
    def codes(self) -> Tensor:
        """int8 [b, T, rank + rotary]."""
        return self.stored()[0]

    @property
    def scales(self) -> Tensor:
        """float32 [b, T, groups of keys + groups of values]."""
        return self.stored()[1]

    def _encode(self, keys: Tensor, values: Tensor) -> tuple[Tensor, ...]:
        if torch.is_grad_enabled() and (keys.requires_grad or values.requires_grad):
            raise ValueError(
                "An int8 cache has no gradients, and these states require some: call the model under torch.no_grad()."
            )
        if keys.shape[1] != 1:
            raise ValueError(
                f"The latents have {keys.shape[1]} heads, expected 1: MLA's are shared by all heads."
            )
        return quantize(keys[:, 0], values[:, 0])

    def _put(self, keys: Tensor, values: Tensor, *places: Tensor) -> None:
        for place, part in zip(places, self._encode(keys, values), strict=True):
            place.copy_(part)

    def _decode(self, parts: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        codes, scales = parts
        keys, values = dequantize(codes, scales, self._widths, self.dtype)
        return keys[:, None], values[:, None]


class LatentCache(DynamicCache):
    """A cache for MLA models: `model.generate(..., past_key_values=LatentCache(model.config, dtype="int8"))`.

    Args:
        config: the model's; without it the number of layers shows with the first forward.
        dtype: "auto" keeps the latents as the model computes them (LatentLayer), "int8" quantises (Int8LatentLayer).
        offloading: hold the layers on the CPU and fetch each when its turn comes. Needs an accelerator.

    Raises:
        ValueError: another dtype, or a config with layers that do not attend to the whole context.
    """

    def __init__(
        self,
        config: PreTrainedConfig | None = None,
        dtype: Literal["auto", "int8"] = "auto",
        offloading: bool = False,
    ) -> None:
        if dtype not in LAYERS:
            raise ValueError(f"dtype is {dtype!r}, expected one of {sorted(LAYERS)}.")
        super().__init__(config=config, offloading=offloading)
        layer_class = LAYERS[dtype]
        others = {type(layer).__name__ for layer in self.layers if type(layer) is not DynamicLayer}
        if others:
            raise ValueError(
                f"The config asks for layers {sorted(others)}, expected full attention in every layer."
            )
        self.layers = [layer_class() for _ in self.layers]
        if self.layer_class_to_replicate is not None:
            self.layer_class_to_replicate = layer_class
        self.latent_dtype = dtype

    @property
    def nbytes(self) -> int:
        """Bytes allocated for all layers, those for tokens to come included."""
        return sum(layer.nbytes for layer in self.layers)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(dtype={self.latent_dtype!r}, num_layers={len(self.layers)}, "
            f"num_tokens={self.get_seq_length()}, nbytes={self.nbytes})"
        )


LAYERS: dict[str, type[LatentLayer]] = {"auto": LatentLayer, "int8": Int8LatentLayer}


def adopt(cache: Cache) -> None:
    """Give a dynamic cache, in place, layers that do not copy it at every step; they take over what it holds.

    Cheap enough for every forward: the first layer tells whether there is something to do. Layers of other classes are left
    as they are, other caches too, and every cache in compiled code, where both kinds of layer do the same.
    """
    if torch.compiler.is_compiling() or isinstance(cache, EncoderDecoderCache):
        return
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layer_class_to_replicate = LatentLayer
    if cache.layers and type(cache.layers[0]) is DynamicLayer:
        cache.layers[:] = [_adopted(layer) for layer in cache.layers]


def _adopted(layer: Any) -> Any:
    if type(layer) is not DynamicLayer:
        return layer
    adopted = LatentLayer()
    if layer.is_initialized:
        adopted.keys, adopted.values = layer.keys, layer.values
        adopted.dtype, adopted.device, adopted.is_initialized = layer.dtype, layer.device, True
    return adopted


def quantize(*parts: Tensor) -> tuple[Tensor, Tensor]:
    """Floats [..., width] -> int8 codes [..., all widths], float32 scales [..., all groups]; see Int8LatentLayer."""
    widths = [part.shape[-1] for part in parts]
    padded = [
        F.pad(part, (0, -width % GROUP)) if width % GROUP else part
        for part, width in zip(parts, widths, strict=True)
    ]
    groups = torch.cat(padded, dim=-1).float().unflatten(-1, (-1, GROUP))
    scales = torch.linalg.vector_norm(groups, math.inf, dim=-1).div_(127).clamp_(min=_LEAST_SCALE)
    codes = (groups / scales[..., None]).round_().to(torch.int8).flatten(-2)
    if any(width % GROUP for width in widths):
        pieces = codes.split([part.shape[-1] for part in padded], dim=-1)
        codes = torch.cat([piece[..., :width] for piece, width in zip(pieces, widths, strict=True)], dim=-1)
    return codes, scales


def dequantize(
    codes: Tensor, scales: Tensor, widths: Sequence[int], dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """What `quantize` made of parts of these widths: codes times the scales of their groups, rounded once to `dtype`."""
    num_groups = [-(-width // GROUP) for width in widths]
    return tuple(
        (scale.repeat_interleave(GROUP, dim=-1)[..., :width] * code).to(dtype)
        for code, scale, width in zip(
            codes.split(list(widths), -1), scales.split(num_groups, -1), widths, strict=True
        )
    )


def _longer(rows: Tensor, length: int) -> Tensor:
    """The rows [..., n, width] in a buffer with room for `length` and a quarter more."""
    capacity = max(_LEAST_CAPACITY, length + length // 4)
    buffer = rows.new_empty(*rows.shape[:-2], capacity, rows.shape[-1])
    buffer[..., : rows.shape[-2], :] = rows
    return buffer
