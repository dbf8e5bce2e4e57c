"""Absorbed and blockwise attention against a textbook softmax over expanded keys and values in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from transformers_k2 import mla

HEADS, RANK, NOPE, ROTARY, VALUE = 3, 24, 20, 12, 28
SCALING = 0.2


def textbook(
    q_nope: Tensor, q_rot: Tensor, c: Tensor, rotary: Tensor, kv_b: Tensor, mask: Tensor | None
) -> Tensor:
    """[b, q, heads, value] in float64."""
    q_nope, q_rot, c, rotary, kv_b = (x.double() for x in (q_nope, q_rot, c, rotary, kv_b))
    (batch, num_heads, num_queries, _), num_keys = q_nope.shape, c.shape[1]
    if mask is None:
        mask = torch.ones(num_queries, num_keys, dtype=torch.bool).tril(num_keys - num_queries)[None, None]
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -math.inf)
    mask = mask.double().expand(batch, 1, num_queries, num_keys)
    output = torch.zeros(batch, num_queries, num_heads, VALUE, dtype=torch.float64)
    for b in range(batch):
        for head in range(num_heads):
            rows = kv_b[head * (NOPE + VALUE) : (head + 1) * (NOPE + VALUE)]
            keys = torch.cat((c[b] @ rows[:NOPE].T, rotary[b]), dim=-1)
            scores = torch.cat((q_nope[b, head], q_rot[b, head]), dim=-1) @ keys.T * SCALING + mask[b, 0]
            weights = (scores - scores.amax(-1, keepdim=True).clamp(min=-1e300)).exp()
            weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-300)
            output[b, :, head] = weights @ (c[b] @ rows[NOPE:].T)
    return output


def masks(kind: str, batch: int, num_queries: int, num_keys: int) -> Tensor | None:
    causal = torch.ones(num_queries, num_keys, dtype=torch.bool).tril(num_keys - num_queries)[None, None]
    if kind == "causal":
        return None
    if kind == "left padding":
        first = torch.tensor([0, num_keys // 2, num_keys - 1])[:batch, None, None, None]
        return causal & (torch.arange(num_keys) >= first)
    if kind == "packed":
        rows = torch.arange(num_keys) // 7
        return causal & (rows[-num_queries:, None] == rows)
    if kind == "random":
        return torch.rand(batch, 1, num_queries, num_keys) > 0.7
    if kind == "finite":  # and some rows see nothing: the mean of all values
        hidden = ~causal | (torch.rand(batch, 1, num_queries, 1) > 0.5)
        return torch.zeros(hidden.shape).masked_fill(hidden, torch.finfo(torch.bfloat16).min)
    assert kind == "additive"
    return torch.randn(batch, 1, num_queries, num_keys).masked_fill(~causal, -math.inf)


KINDS = ("causal", "left padding", "packed", "random", "additive", "finite")
TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 0.01}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_both_ways_give_what_the_textbook_gives(
    dtype: torch.dtype, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mla, "BLOCK", 16)
    batch = 3
    for num_keys in (1, 2, 15, 16, 17, 33, 64, 100):
        for num_queries in (1, 2, 5, 16, 17, 33, 100):
            if num_queries > num_keys:
                continue
            # Blocks of 1, and of 16 and 17 latents.
            monkeypatch.setattr(mla, "_SCORES", (num_keys % 3) * 16 * batch * HEADS * num_queries)
            q_nope, q_rot, c, rotary, kv_b = (
                torch.randn(shape).to(dtype)
                for shape in (
                    (batch, HEADS, num_queries, NOPE),
                    (batch, HEADS, num_queries, ROTARY),
                    (batch, num_keys, RANK),
                    (batch, num_keys, ROTARY),
                    (HEADS * (NOPE + VALUE), RANK),
                )
            )
            mask = masks(kind, batch, num_queries, num_keys)
            if mask is not None and mask.is_floating_point():
                mask = mask.to(dtype)
            expected = textbook(q_nope, q_rot, c, rotary, kv_b, mask)

            def latents(
                start: int, stop: int, c: Tensor = c, rotary: Tensor = rotary
            ) -> tuple[Tensor, Tensor]:
                return c[:, start:stop], rotary[:, start:stop]

            absorbed = mla.absorbed(q_nope, q_rot, latents, num_keys, kv_b, SCALING, mask, VALUE)
            expanded = mla.expanded(
                torch.cat((q_nope, q_rot), dim=-1),
                latents,
                num_keys,
                lambda x, kv_b=kv_b: x @ kv_b.T,
                SCALING,
                mask,
                VALUE,
            )
            for output in (absorbed, expanded):
                assert output.dtype == dtype
                assert (output.double() - expected).norm() <= TOLERANCE[dtype] * expected.norm()


def test_rows_that_see_nothing_are_zero_and_not_a_number_stays() -> None:
    q_nope, q_rot = torch.randn(1, HEADS, 3, NOPE), torch.randn(1, HEADS, 3, ROTARY)
    c, rotary, kv_b = (
        torch.randn(1, 9, RANK),
        torch.randn(1, 9, ROTARY),
        torch.randn(HEADS * (NOPE + VALUE), RANK),
    )
    mask = torch.ones(1, 1, 3, 9, dtype=torch.bool)
    mask[:, :, 1] = False

    def both(q_nope: Tensor) -> list[Tensor]:
        def latents(start: int, stop: int) -> tuple[Tensor, Tensor]:
            return c[:, start:stop], rotary[:, start:stop]

        query = torch.cat((q_nope, q_rot), dim=-1)
        return [
            mla.absorbed(q_nope, q_rot, latents, 9, kv_b, SCALING, mask, VALUE),
            mla.expanded(query, latents, 9, lambda x: x @ kv_b.T, SCALING, mask, VALUE),
        ]

    for output in both(q_nope):
        assert torch.equal(output[:, 1], torch.zeros(1, HEADS, VALUE))
        assert output[:, [0, 2]].isfinite().all()
    q_nope[0, 0, 0, 0] = math.nan
    for output in both(q_nope):
        assert output[0, 0, 0].isnan().all()
        assert output[0, 0, 1:].isfinite().all()


def test_the_rule_counts_multiply_adds() -> None:
    def count(num_queries: int, num_keys: int) -> tuple[int, int]:
        """Of one head, by the shapes of the products that each way computes."""
        rank, nope, rotary, value = 512, 128, 64, 128
        pairs = num_queries * num_keys
        absorbing = (
            num_queries * nope * rank + pairs * (rank + rotary) + pairs * rank + num_queries * rank * value
        )
        expanding = num_keys * rank * (nope + value) + pairs * (nope + rotary) + pairs * value
        return absorbing, expanding

    for num_keys in (1, 2, 64, 170, 171, 1000, 131072):
        for num_queries in (1, 2, 16, 100, 169, 170, 171, 300):
            absorbing, expanding = count(num_queries, num_keys)
            assert mla.absorbs(num_queries, num_keys, 512, 128, 128) == (absorbing < expanding)
    # K2's switch over a long cache, and later where the matrix has to be found first.
    assert mla.absorbs(170, 1 << 20, 512, 128, 128)
    assert not mla.absorbs(171, 1 << 20, 512, 128, 128)
    assert not mla.absorbs(1, 512, 512, 128, 128, num_unfolded=512)
    assert mla.absorbs(1, 1024, 512, 128, 128, num_unfolded=512)


def test_memory_does_not_grow_with_the_context_times_heads() -> None:
    """The largest tensor either way allocates, counted from every operation's result."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(
            self, func: object, types: object, args: tuple = (), kwargs: dict | None = None
        ) -> object:
            result = func(*args, **(kwargs or {}))  # type: ignore[operator]
            for x in result if isinstance(result, tuple | list) else (result,):
                if isinstance(x, Tensor):
                    self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
            return result

    num_heads, found = 16, []
    for num_keys in (8192, 32768):
        c, rotary = torch.randn(1, num_keys, RANK), torch.randn(1, num_keys, ROTARY)
        kv_b = torch.randn(num_heads * (NOPE + VALUE), RANK)
        q_nope, q_rot = torch.randn(1, num_heads, 64, NOPE), torch.randn(1, num_heads, 64, ROTARY)

        def latents(start: int, stop: int, c: Tensor = c, rotary: Tensor = rotary) -> tuple[Tensor, Tensor]:
            return c[:, start:stop].clone(), rotary[:, start:stop].clone()

        with Largest() as largest:
            mla.expanded(
                torch.cat((q_nope, q_rot), -1),
                latents,
                num_keys,
                lambda x, w=kv_b: x @ w.T,
                SCALING,
                None,
                VALUE,
            )
        found.append(largest.elements)
    assert found[0] == found[1] < 32768 * num_heads * VALUE / 8
