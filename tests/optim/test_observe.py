"""What is recorded while modules run: against float64 logits, and outputs and gradients against plain PyTorch."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from transformers_k2 import KimiK2ForCausalLM
from transformers_k2.optim.observe import LogitObserver, record, recording
from transformers_k2.optim.sdpa import on_cuda

HEADS, INF = 4, math.inf


class Attention(nn.Module):
    """Causal attention over [batch, rows, 24] that calls whatever it is given."""

    def __init__(self, attend: Callable[..., Tensor]) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(24, HEADS * 10), nn.Linear(24, HEADS * 10)
        self.v, self.o = nn.Linear(24, HEADS * 7), nn.Linear(HEADS * 7, 24)
        self.attend = attend

    def split(self, x: Tensor) -> list[Tensor]:
        return [p(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for p in (self.q, self.k, self.v)]

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.attend(*self.split(x)).transpose(1, 2).flatten(2))


def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def composed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    hidden = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
    logits = (q @ k.mT) * q.shape[-1] ** -0.5
    return (logits + torch.zeros_like(logits).masked_fill(hidden, torch.finfo(q.dtype).min)).softmax(-1) @ v


def truth(module: Attention, x: Tensor) -> Tensor:
    q, k, _ = (t.detach().double() for t in module.split(x))
    logits = (q @ k.mT) / math.sqrt(q.shape[-1])
    hidden = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
    return logits.masked_fill(hidden, -INF).amax((0, 2, 3)).float()


def observed(attend: Callable[..., Tensor] = fused, tau: float = -1e9) -> tuple[Attention, LogitObserver]:
    module, observer = Attention(attend), LogitObserver(tau)
    observer.watch("layer", module, HEADS)
    return module, observer


def tokens(num_rows: int = 19) -> Tensor:
    return torch.randn(3, num_rows, 24) * 4


def argument_styles() -> dict[str, Callable[..., Tensor]]:
    sdpa = F.scaled_dot_product_attention
    return {
        "keywords": lambda q, k, v: sdpa(query=q, key=k, value=v, is_causal=True),
        "positional": lambda q, k, v: sdpa(q, k, v, None, 0.0, True),
        "scale": lambda q, k, v: sdpa(q, k, v, is_causal=True, scale=q.shape[-1] ** -0.5),
        "bool mask": lambda q, k, v: sdpa(q, k, v, torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril()),
        "wide values": lambda q, k, v: sdpa(q, k, torch.cat((v, v), -1), is_causal=True)[..., :7],
        "equal dims": lambda q, k, v: sdpa(q, k, F.pad(v, (0, 3)), is_causal=True)[..., :7],
        "strided": lambda q, k, v: sdpa(q.mT.contiguous().mT, k, v, is_causal=True),
    }  # fmt: skip


@pytest.mark.parametrize("style", argument_styles())
def test_fused_attention_in_every_style(style: str) -> None:
    module, observer = observed(argument_styles()[style])
    x = tokens()
    module(x)
    assert torch.equal(observer.packed("cpu")[0], truth(module, x))


def test_softmax_in_every_style() -> None:
    for softmax in (
        lambda t: F.softmax(t, dim=-1, dtype=torch.float32),
        lambda t: torch.softmax(t, -1),
        lambda t: torch.softmax(input=t, dim=-1),
        lambda t: t.softmax(-1),
    ):

        def attend(q: Tensor, k: Tensor, v: Tensor, softmax: Any = softmax) -> Tensor:
            return softmax((q @ k.mT) / math.sqrt(q.shape[-1])) @ v

        module, observer = observed(attend)
        x = tokens()
        module(x)
        q, k, _ = module.split(x)
        expected = ((q @ k.mT) / math.sqrt(10)).amax((0, 2, 3))
        assert torch.equal(observer.packed("cpu")[0], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value_dim", [6, 16, 24])
@pytest.mark.parametrize("mask", ["causal", "bool", "lowest", "-inf"])
def test_output_and_gradients_are_those_of_pytorch(dtype: torch.dtype, value_dim: int, mask: str) -> None:
    """Left padding included, where some rows see nothing. Both sides round: the reference is float64."""
    visible = torch.ones(2, 1, 21, 21, dtype=torch.bool).tril()
    visible[0, ..., :5] = False
    lowest = torch.finfo(dtype).min if mask == "lowest" else -INF
    additive = torch.zeros(visible.shape, dtype=dtype).masked_fill(~visible, lowest)
    arguments: dict[str, Any] = {
        "causal": {"is_causal": True},
        "bool": {"attn_mask": visible},
    }.get(mask, {"attn_mask": additive})
    q, k = (torch.randn(2, HEADS, 21, 16).to(dtype) for _ in "qk")
    v, weight = (torch.randn(2, HEADS, 21, value_dim).to(dtype) for _ in "vw")

    class Plain(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, **arguments: Any) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, **arguments)

    def run(module: nn.Module, dtype: torch.dtype) -> list[Tensor]:
        inputs = [t.to(dtype, copy=True).requires_grad_() for t in (q, k, v)]
        given = {
            n: t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t
            for n, t in arguments.items()
        }
        output = module(*inputs, **given)
        (output * weight.to(dtype)).sum().backward()
        return [t.double() for t in (output.detach(), *(i.grad for i in inputs if i.grad is not None))]

    watched, observer = Plain(), LogitObserver(-1e9)
    observer.watch("layer", watched, HEADS)
    ours, plain, reference = run(watched, dtype), run(Plain(), dtype), run(Plain(), torch.float64)
    if mask == "lowest" and value_dim == 16:
        # PyTorch's own kernel has wrong gradients in rows hidden by a finite value: ours are no better, nor worse.
        reference = plain
    for a, b, exact in zip(ours, plain, reference, strict=True):
        assert a.isfinite().all()
        assert (a - exact).norm() <= 2 * (b - exact).norm() + 1e-6 * exact.norm()
    logits = (q.double() @ k.double().mT) / 4
    seen = visible[1:].tril() if mask == "causal" else visible
    assert torch.equal(observer.packed("cpu")[0], logits.masked_fill(~seen, -INF).amax((0, 2, 3)).float())


def test_grouped_queries() -> None:
    q, k, v = (torch.randn(2, h, 9, 8) for h in (HEADS, 2, 2))
    module, observer = observed(
        lambda *_: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    )
    module.forward = lambda: module.attend()
    module()
    logits = (q.double() @ k.double().repeat_interleave(2, 1).mT) / math.sqrt(8)
    hidden = torch.ones(9, 9, dtype=torch.bool).triu(1)
    assert torch.equal(observer.packed("cpu")[0], logits.masked_fill(hidden, -INF).amax((0, 2, 3)).float())


@pytest.mark.parametrize("shared", [True, False])
def test_one_query_row_with_its_groups_as_rows(shared: bool) -> None:
    """How transformers calls grouped attention with a mask, for a single token."""
    q, k, v = (torch.randn(3, h, n, 8) for h, n in ((HEADS, 1), (2, 9), (2, 9)))
    visible = torch.rand(3, 1 if shared else HEADS, 1, 9) > 0.4
    visible[..., 0] = True
    mask = visible if shared else visible.view(3, 2, 2, 9)
    module, observer = observed(lambda *_: F.scaled_dot_product_attention(q.view(3, 2, 2, 8), k, v, mask))
    module.forward = lambda: module.attend()
    module()
    logits = (q.double() @ k.double().repeat_interleave(2, 1).mT) / math.sqrt(8)
    assert torch.equal(observer.packed("cpu")[0], logits.masked_fill(~visible, -INF).amax((0, 2, 3)).float())


def test_where_the_fused_kernel_cannot_run_the_maximum_is_exact_too() -> None:
    x = tokens()
    module, observer = observed(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, None, 0.2, True), tau=1e9
    )
    module(x)
    assert torch.equal(observer.packed("cpu")[0], truth(module, x))
    module, observer = observed(tau=1e9)
    with sdpa_kernel(SDPBackend.MATH):
        module(x)
    assert torch.equal(observer.packed("cpu")[0], truth(module, x))


def test_autocast_casts_as_plain_attention_does() -> None:
    module, observer = observed(lambda q, k, v: fused(q, k.float(), v))
    plain = copy.deepcopy(module)
    x = tokens()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        a, b = module(x), plain(x)
        q, k, _ = (t.detach().double() for t in module.split(x))
    assert a.dtype == b.dtype == torch.bfloat16
    assert torch.allclose(a, b, rtol=0, atol=2**-5 * float(b.detach().abs().max()))
    hidden = torch.ones(19, 19, dtype=torch.bool).triu(1)
    expected = ((q @ k.mT) / math.sqrt(10)).masked_fill(hidden, -INF).amax((0, 2, 3)).float()
    assert torch.equal(observer.packed("cpu")[0], expected)


def test_heads_below_tau_keep_a_bracket() -> None:
    module, observer = observed()
    x = tokens()
    expected = truth(module, x)
    observer.tau = module_tau = float(expected.max()) - 1e-3
    fresh = LogitObserver(module_tau)
    fresh.watch("again", module, HEADS)
    observer.close()
    module(x)
    exact, upper, lower = fresh.packed("cpu")
    assert exact[expected.argmax()] == expected.max()
    below = exact == -INF
    assert below.any()
    assert (upper >= expected - 1e-5)[below].all()
    assert (lower <= expected + 1e-5)[below].all()
    assert upper[~below].eq(-INF).all()


@pytest.mark.parametrize("attend", [fused, composed])
def test_forwards_accumulate_until_reset(attend: Callable[..., Tensor]) -> None:
    module, observer = observed(attend)
    first, second = tokens(), tokens(7)
    assert observer.packed("cpu").eq(-INF).all()
    module(first)
    module(second)
    both = torch.maximum(truth(module, first), truth(module, second))
    assert torch.allclose(observer.packed("cpu")[0], both, rtol=1e-5)
    observer.reset()
    module(second)
    assert torch.allclose(observer.packed("cpu")[0], truth(module, second), rtol=1e-5)


def test_only_training_forwards_count() -> None:
    module, observer = observed()
    x = tokens()
    module.eval()
    with torch.no_grad():
        module(x)
    assert observer.packed("cpu").eq(-INF).all()
    module.train()
    with torch.no_grad():
        module(x)
    assert torch.equal(observer.packed("cpu")[0], truth(module, x))
    observer.reset()
    module.eval()(x)
    assert torch.equal(observer.packed("cpu")[0], truth(module, x))


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("attend", [fused, composed])
def test_gradient_checkpointing(use_reentrant: bool, attend: Callable[..., Tensor]) -> None:
    module, observer = observed(attend)
    plain = copy.deepcopy(module)
    x = tokens().requires_grad_()
    checkpoint(module, x, use_reentrant=use_reentrant).square().sum().backward()
    assert not recording()
    assert torch.allclose(observer.packed("cpu")[0], truth(module, x), rtol=1e-5)
    plain(x).square().sum().backward()
    largest = max(
        float(p.grad.abs().max()) for p in plain.parameters()
    )  # the bias of the keys has none but rounding
    for a, b in zip(module.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, rtol=1e-4, atol=1e-6 * largest)
    module(x)  # and the next step is as before
    assert not recording()


def test_exceptions_leave_nothing_behind() -> None:
    def fails(*_: Tensor) -> Tensor:
        assert recording()
        raise ArithmeticError("inside")

    module, observer = observed(fails)
    with pytest.raises(ArithmeticError, match="inside"):
        module(tokens())
    assert not recording()
    other, seen = observed()
    other(tokens())
    assert observer.packed("cpu").eq(-INF).all()
    assert seen.packed("cpu")[0].isfinite().all()


def test_an_interrupt_is_forgotten_with_reset() -> None:
    def interrupt(*_: Tensor) -> Tensor:
        raise KeyboardInterrupt

    module, observer = observed(interrupt)
    with pytest.raises(KeyboardInterrupt):
        module(tokens())
    assert torch.overrides._get_current_function_mode() is not None
    observer.reset()
    assert not recording()
    assert torch.overrides._get_current_function_mode() is None
    fused(*(torch.randn(1, 2, 3, 4) for _ in "qkv"))  # outside of any module, with another number of heads
    module.attend = fused
    x = tokens()
    module(x)
    assert torch.equal(observer.packed("cpu")[0], truth(module, x))


def test_attention_that_cannot_be_seen_is_an_error() -> None:
    module, _ = observed(lambda q, k, v: v)
    with pytest.raises(RuntimeError, match=r"layer: .*sdpa, eager or flex_attention"):
        module(tokens())
    assert not recording()


def test_another_number_of_heads_is_an_error() -> None:
    module, observer = Attention(fused), LogitObserver(1.0)
    observer.watch("shard", module, 2 * HEADS)
    with pytest.raises(ValueError, match=f"shard: .*{HEADS} heads.*{2 * HEADS}"):
        module(tokens())


def test_nested_modules_record_to_the_innermost() -> None:
    inner, outer, observer = Attention(fused), Attention(composed), LogitObserver(-1e9)
    both = nn.ModuleList([inner, outer])
    outer.attend = lambda q, k, v: composed(q, k, v) + 0 * inner(x).mean()
    observer.watch("outer", outer, HEADS)
    observer.watch("inner", inner, HEADS)
    x = tokens()
    outer(x)
    assert len(both) == 2
    assert observer.names == ["outer", "inner"]
    assert observer.num_heads == [HEADS, HEADS]
    expected = torch.cat((truth(outer, x), truth(inner, x)))
    assert torch.allclose(observer.packed("cpu")[0], expected, rtol=1e-5)


def test_record_needs_an_observer() -> None:
    q = torch.randn(1, 3, 5, 8)
    record(q, q, None, scaling=1.0)
    module, observer = observed(lambda q, k, v: (record(q, k, None, scaling=0.5), v)[1])
    x = tokens()
    module(x)
    q, k, _ = (t.double() for t in module.split(x))
    assert torch.equal(observer.packed("cpu")[0], ((q @ k.mT) * 0.5).amax((0, 2, 3)).float())


def test_copies_are_not_watched() -> None:
    module, observer = observed()
    module.attend = F.scaled_dot_product_attention
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    for twin in (copy.deepcopy(module), torch.load(file, weights_only=False)):
        twin(tokens())
        twin.attend = lambda q, k, v: v
        twin(tokens())
        assert observer.packed("cpu").eq(-INF).all()
    module(tokens())
    assert observer.packed("cpu")[0].isfinite().all()


def test_close_removes_the_hooks() -> None:
    module, observer = observed()
    observer.close()
    module(tokens())
    assert observer.packed("cpu").eq(-INF).all()
    assert not module._forward_hooks
    assert not module._forward_pre_hooks


@pytest.mark.parametrize("attend", [fused, composed])
def test_under_torch_compile(attend: Callable[..., Tensor]) -> None:
    module, observer = observed(attend)
    model = nn.Sequential(nn.Linear(24, 24), module)
    compiled: Any = torch.compile(model, backend="eager")
    for num_rows in (19, 8):
        x = tokens(num_rows)
        observer.reset()
        compiled(x).sum().backward()
        assert torch.allclose(observer.packed("cpu")[0], truth(module, model[0](x)), rtol=1e-5)
        assert not recording()


def test_our_calls_of_the_gpu_kernels_fit_their_schemas(monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU here: the calls are made with meta tensors, and what they bind to is read back."""
    q, k, v = (torch.empty(2, HEADS, 21, d, device="meta") for d in (12, 12, 7))
    mask = torch.ones(2, 1, 21, 21, dtype=torch.bool, device="meta")
    for backend, given in (
        (SDPBackend.FLASH_ATTENTION, None),
        (SDPBackend.EFFICIENT_ATTENTION, None),
        (SDPBackend.EFFICIENT_ATTENTION, mask),
        (SDPBackend.CUDNN_ATTENTION, mask),
    ):
        monkeypatch.setattr(torch, "_fused_sdp_choice", lambda *_, backend=backend, **__: backend.value)
        if backend == SDPBackend.FLASH_ATTENTION:
            answer = on_cuda(q, k, torch.empty(2, HEADS, 21, 12, device="meta"), None, 0.0, True, 0.3, False)
            assert answer is not None
            assert answer[0].shape[-1] == 12
        else:
            answer = on_cuda(q, k, v, given, 0.0, given is None, 0.3, False)
            assert answer is not None
            assert answer[0].shape[-1] == 7
        assert answer[1].shape == (2, HEADS, 21)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_two_observers_of_one_module(tiny_config: Any, attention: str) -> None:
    model = KimiK2ForCausalLM(tiny_config(num_hidden_layers=1)).train()
    model.set_attn_implementation(attention)
    module = model.model.layers[0].self_attn
    observers = [LogitObserver(1e-6), LogitObserver(1e-6), LogitObserver(1e6)]
    for observer in observers:
        observer.watch("attention", module, 4)
    model(torch.randint(3, 331, (2, 9)))
    first, second, third = (observer.packed("cpu") for observer in observers)
    assert first[0].isfinite().all()
    assert torch.equal(first, second)
    assert (third.amax(0) >= first[0]).all()
    observers[2].close()
    observers[0].close()
    observers[1].reset()
    model(torch.randint(3, 331, (2, 9)))
    assert torch.equal(observers[0].packed("cpu"), first)
    assert observers[1].packed("cpu")[0].isfinite().all()
