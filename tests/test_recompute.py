"""Recomputation changes memory and nothing else: gradients bit for bit those of a plain run, fewer bytes kept."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from live_storages import Live
from transformers_k2 import KimiK2Config, KimiK2ForCausalLM, MuonClip, experts, padded_sdpa, recompute
from transformers_k2.recompute import _Offloaded, apply_recompute

SELECTIVE = ("norms", "swiglu", "mla_up", "moe_down")
CHOICES: list[Sequence[str]] = [(), *[(name,) for name in SELECTIVE[:3]], SELECTIVE, ("full",)]


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    known = dict(ALL_EXPERTS_FUNCTIONS._global_mapping)
    experts.register()
    padded_sdpa.register()
    yield
    ALL_EXPERTS_FUNCTIONS._global_mapping.clear()
    ALL_EXPERTS_FUNCTIONS._global_mapping.update(known)


@pytest.fixture
def model(tiny_model: KimiK2ForCausalLM) -> KimiK2ForCausalLM:
    tiny_model.set_experts_implementation("k2")
    return tiny_model.train()


def batch() -> dict[str, Tensor]:
    """Three rows, two of them padded on the left."""
    ids = torch.randint(3, 331, (3, 13), generator=torch.Generator().manual_seed(5))
    mask = (torch.arange(13) >= torch.tensor([0, 4, 9])[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def gradients(model: nn.Module, autocast: bool = False) -> list[Tensor]:
    """The loss and every gradient."""
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(**batch(), use_cache=False).loss
    loss.backward()
    found = [p.grad for p in model.parameters() if p.grad is not None]
    return [loss.detach(), *[(g.full_tensor() if isinstance(g, DTensor) else g).clone() for g in found]]


def equal(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return len(ours) == len(theirs) > 10 and all(map(torch.equal, ours, theirs))


def kept(model: KimiK2ForCausalLM, names: Sequence[str], offload: bool = False) -> int:
    """Bytes between the forward and the backward pass."""
    handle = apply_recompute(model, names, offload)
    inputs = batch()
    with Live() as live:
        loss = model(**inputs, use_cache=False).loss
    size = live.bytes(model)
    loss.backward()
    handle.remove()
    return size


@pytest.mark.parametrize(
    ("names", "way"),
    [
        *[(names, "kept") for names in CHOICES[1:]],
        *[
            (names, way)
            for names in (SELECTIVE, ("full",))
            for way in ("autocast", "offload", "sdpa", "eager")
        ],
        ((), "offload"),
        ((), "autocast+offload"),
        (SELECTIVE, "autocast+offload"),
    ],
    ids=lambda value: value if isinstance(value, str) else "+".join(value),
)
def test_gradients_are_equal(model: KimiK2ForCausalLM, names: Sequence[str], way: str) -> None:
    """Every choice, and all together in every way to run it."""
    autocast, offload = "autocast" in way, "offload" in way
    model.set_attn_implementation(way if way in ("sdpa", "eager") else "padded_sdpa")
    plain = gradients(model, autocast)
    handle = apply_recompute(model, names, offload)
    assert equal(gradients(model, autocast), plain)
    handle.remove()


def test_bytes_by_name(model: KimiK2ForCausalLM) -> None:
    """At least what can be counted by hand: tokens times width times four bytes."""
    model.set_attn_implementation("padded_sdpa")
    model.loss_chunk_tokens = 8
    plain, tokens, layers = kept(model, ()), 39 * 4, 3
    saved = {name: plain - kept(model, (name,)) for name in SELECTIVE}
    hidden, q_rank, kv_rank, heads, qk, rope = 72, 56, 24, 4, 32, 12
    # A norm's normalised input and its output; the last norm's output goes into the loss, which keeps nothing.
    assert saved["norms"] >= tokens * (2 * layers * (2 * hidden + q_rank + kv_rank) - hidden)
    # Queries, keys and values, which the padding widens; kept instead: the rotated part that all heads' keys share.
    assert (
        saved["mla_up"] >= tokens * layers * (heads * 3 * qk - rope) - 100
    )  # the padding's zero, the sines' views
    # silu(gate) and the product, of one dense layer and two shared experts.
    assert saved["swiglu"] >= tokens * 2 * (88 + 2 * 40)
    assert saved["moe_down"] == 0  # never kept by these experts:
    model.set_experts_implementation("grouped_mm")
    pairs = 2 * tokens
    assert kept(model, ()) - plain >= pairs * 2 * (2 * hidden + 2 * 40)
    model.set_experts_implementation("k2")
    together = plain - kept(model, SELECTIVE)
    assert together >= sum(saved.values()) - 0.01 * plain
    assert kept(model, ("full",)) < kept(model, SELECTIVE) < 0.6 * plain
    assert kept(model, (), offload=True) < 0.2 * plain  # the copies are made out of the counter's sight


def test_nothing_outlives_a_step(model: KimiK2ForCausalLM) -> None:
    handle = apply_recompute(model, SELECTIVE, offload=True)
    with Live() as live:
        model(**batch(), use_cache=False).loss.backward()
        model.zero_grad()
    assert live.bytes(model) == 0
    handle.remove()


def test_a_retained_graph(model: KimiK2ForCausalLM) -> None:
    weights = list(model.parameters())
    handle = apply_recompute(model, SELECTIVE)
    loss = model(**batch(), use_cache=False).loss
    first = torch.autograd.grad(loss, weights, retain_graph=True)
    assert equal(list(torch.autograd.grad(loss, weights)), list(first))
    handle.remove()


def test_changes_in_place_are_noticed(model: KimiK2ForCausalLM) -> None:
    """As autograd would: a weight that changes between forward and backward."""
    for names in (("norms",), ("mla_up",), ()):
        handle = apply_recompute(model, names)
        loss = model(**batch(), use_cache=False).loss
        with torch.no_grad():
            model.model.layers[1].self_attn.q_b_proj.weight.mul_(2)
        with pytest.raises(RuntimeError, match=r"changed in place|modified by an inplace operation"):
            loss.backward()
        handle.remove()


def test_an_interrupted_forward_leaves_nothing_behind(model: KimiK2ForCausalLM) -> None:
    plain = gradients(model)
    handle = apply_recompute(model, SELECTIVE)
    hook = model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(**batch())
    hook.remove()
    assert equal(gradients(model), plain)
    handle.remove()
    with torch.no_grad():
        assert model(**batch()).loss == plain[0]


@pytest.mark.parametrize("names", [SELECTIVE, ("full",)], ids="+".join)
def test_muon_clip_sees_the_same_logits(model: KimiK2ForCausalLM, names: Sequence[str]) -> None:
    start = {key: value.clone() for key, value in model.state_dict().items()}
    seen = []
    for chosen in ((), names):
        model.load_state_dict(start)
        optimizer = MuonClip.for_model(model, lr=1e-2, qk_clip_tau=0.5, ns_dtype="float32")
        handle = apply_recompute(model, chosen)
        for _ in range(2):
            gradients(model)
            optimizer.step()
        stats = optimizer.qk_clip_stats()
        seen.append([*model.state_dict().values(), *[value["max_logit"] for value in stats.values()]])
        handle.remove()
        optimizer.close()
    assert equal(seen[1], seen[0])


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_lora_with_dropout(model: KimiK2ForCausalLM) -> None:
    """Adapters inside the recomputed modules; dropout is kept, not drawn again."""
    config = LoraConfig(
        r=2, lora_dropout=0.5, target_modules=["q_b_proj", "kv_b_proj"], init_lora_weights=False
    )
    adapted = get_peft_model(model, config).train()
    torch.manual_seed(3)
    plain = gradients(adapted)
    handle = apply_recompute(adapted, SELECTIVE)
    torch.manual_seed(3)
    assert equal(gradients(adapted), plain)
    handle.remove()


def test_unusable_choices(model: KimiK2ForCausalLM, tiny_config: Callable[..., KimiK2Config]) -> None:
    with pytest.raises(ValueError, match="'norm' is unknown, expected some of norms, swiglu"):
        apply_recompute(model, ["norm"])
    with pytest.raises(ValueError, match="'full', which contains the others"):
        apply_recompute(model, ["full", "norms"])
    with pytest.raises(ValueError, match="'mla_up' fits no module of Linear"):
        apply_recompute(nn.Linear(2, 2), ["mla_up"])
    with pytest.raises(ValueError, match="'full' fits no module"):
        apply_recompute(nn.Linear(2, 2), ["full"])
    model.set_experts_implementation("grouped_mm")
    for name in ("moe_down", "swiglu"):
        with pytest.raises(ValueError, match=f"{name!r} needs experts_implementation='k2'.*'grouped_mm'"):
            apply_recompute(model, [name])


# -- two processes


def offloaded() -> list[int]:
    """The sizes of all storages that are offloaded from now on."""
    sizes: list[int] = []

    class Counting(_Offloaded):
        def __init__(self, storage: torch.UntypedStorage) -> None:
            sizes.append(storage.nbytes())
            super().__init__(storage)

    vars(recompute)["_Offloaded"] = Counting
    return sizes


def run_rank(rank: int, folder: Path) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    experts.register()
    for sizes in ({"fsdp_size": 2}, {"fsdp_size": 2, "ep_size": 2}):
        model = AutoModelForCausalLM.from_pretrained(
            folder / "hub", distributed_config=DistributedConfig(**sizes), experts_implementation="k2"
        ).train()
        for chunk in (None, 8):
            model.loss_chunk_tokens = chunk
            plain = gradients(model)
            for names, offload in ((SELECTIVE, False), (SELECTIVE, True), (("full",), False)):
                handle, copied = apply_recompute(model, names, offload), offloaded()
                assert equal(gradients(model), plain), (sizes, chunk, names, offload)
                assert bool(copied) == offload
                # No weight of the routed experts, here or gathered: of one or of two processes' experts.
                assert not set(copied) & {n * 4 * 72 * width for n in (3, 6) for width in (40, 80)}
                handle.remove()
            torch.save(plain, folder / f"{len(sizes)} {chunk} {rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_shards(model: KimiK2ForCausalLM, tmp_path: Path) -> None:
    """FSDP2, alone and with expert parallelism: equal with and without, and close to one process."""
    model.save_pretrained(tmp_path / "hub")
    mp.spawn(run_rank, args=(tmp_path,), nprocs=2)
    one = gradients(model)
    for kind in (1, 2):
        for chunk in (None, 8):
            for rank in range(2):
                seen = torch.load(tmp_path / f"{kind} {chunk} {rank}.pt")
                torch.testing.assert_close(seen[0], one[0], rtol=1e-5, atol=1e-6)
                assert len(seen) == len(one)
                for got, wanted in zip(seen[1:], one[1:], strict=True):
                    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-5)
