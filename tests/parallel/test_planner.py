"""The planner against training runs that happened: torch's own collectives, states and saved tensors, byte by byte."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.pipelining.schedules import _get_1f1b_rank_ops
from torch.multiprocessing import spawn
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoModelForCausalLM

import plan_ranks
from transformers_k2 import experts
from transformers_k2.optim.muon import Task, step_local
from transformers_k2.parallel import plan_report
from transformers_k2.parallel.activations import layer_activations
from transformers_k2.parallel.layout import Layout
from transformers_k2.parallel.parts import Peak, _few, add_up, step_workspace
from transformers_k2.parallel.plan_options import Options
from transformers_k2.parallel.plan_search import advised, plan_nodes, search
from transformers_k2.parallel.planner import estimated, load_config, plan, stage_kind
from transformers_k2.parallel.share import layer_kinds, share_of
from transformers_k2.parallel.traffic import exchange, ring, schedule, send

CASES: list[dict[str, Any]] = [
    {"layout": {"shard": 4, "expert": 2}, "mixed": True, "full": False, "micro_batches": 2, "length": 9},
    {"layout": {"shard": 4, "expert": 2}, "mixed": False, "full": True, "micro_batches": 1, "length": 7},
    {
        "layout": {"shard": 2, "expert": 2, "replicate": 2},
        "mixed": True,
        "full": False,
        "micro_batches": 1,
        "length": 9,
    },
    {"layout": {"shard": 4}, "mixed": False, "full": False, "micro_batches": 1, "length": 5},
    {
        "layout": {"shard": 2, "expert": 2, "pipeline": 2},
        "mixed": False,
        "full": False,
        "micro_batches": 5,
        "length": 9,
    },
    {"layout": {"shard": 2, "pipeline": 2}, "mixed": True, "full": False, "micro_batches": 3, "length": 9},
    {
        "layout": {"shard": 2, "expert": 2, "pipeline": 2},
        "mixed": False,
        "full": False,
        "micro_batches": 6,
        "length": 9,
        "per_run": 3,
    },
    {
        "layout": {"shard": 2, "pipeline": 2},
        "mixed": False,
        "full": False,
        "micro_batches": 3,
        "length": 9,
        "schedule": "gpipe",
    },
    {"layout": {"replicate": 4}, "mixed": False, "full": False, "micro_batches": 1, "length": 9},
]
MUON = {"state_dtype": "float32", "master_weights": False, "ns_dtype": "bfloat16"}


@pytest.mark.slow
def test_bytes_of_real_steps(tiny_config, tmp_path: Path) -> None:
    """Four processes train a step in each layout; the plan was made without them."""
    config = tiny_config(n_routed_experts=8)
    arguments = (4, str(tmp_path / "store"), config.to_dict(), CASES, str(tmp_path))
    spawn(plan_ranks.run, args=arguments, nprocs=4)
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(4)]
    num_parameters = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    for number, case in enumerate(CASES):
        layout = Layout(**case["layout"])
        real = [results[number] for results in ranks]
        planned = plan(
            config,
            layout,
            batch_size=case["micro_batches"] * layout.data_size,
            sequence_length=case["length"],
            dtype="float32",
            mixed_precision=case["mixed"],
            recompute=("full",) if case["full"] else (),
            micro_batches_per_run=case.get("per_run"),
            schedule=case.get("schedule", "1f1b"),
        )
        assert planned.num_parameters == num_parameters
        for rank in range(4):
            share = share_of(
                config, layout, rank, torch.float32, case["mixed"], "muon_clip", {"ns_dtype": "bfloat16"}
            )
            assert share.weights == real[rank]["weights"], (case, rank)
            assert share.optimizer == real[rank]["optimizer"], (case, rank)
            assert share.muon_sent == real[rank]["muon"], (case, rank)
        for stage in planned.stages:
            counted = real[stage.rank]["bytes"]
            wire = {kind: one.total for kind, one in stage.wire.items()}
            assert wire["fsdp_forward"] + wire["fsdp_backward"] == counted["gather"], (case, stage.rank)
            assert wire["fsdp_reduce"] == counted["reduce_scatter"], (case, stage.rank)
            if layout.replicate > 1:
                assert (
                    wire["hsdp_reduce"]
                    == counted["all_reduce"] * 2 * (layout.replicate - 1) / layout.replicate
                )
            # Which rank gets more tokens depends on the router, the sum does not.
            group = [r for r in range(4) if layout.stage(r) == layout.stage(stage.rank)]
            exchanged = sum(real[r]["bytes"]["exchange"] for r in group) / len(group)
            away = (layout.expert - 1) / layout.expert
            assert math.isclose(
                wire["expert_forward"] + wire["expert_backward"], exchanged * away, rel_tol=1e-9
            ), case


@pytest.mark.parametrize("implementation", ["k2", "grouped_mm"])
def test_saved_tensors_of_a_real_layer(tiny_config, implementation: str) -> None:
    """The traced layer keeps what a layer with numbers in it keeps, by torch's own hooks."""
    experts.register()
    config = tiny_config(v_head_dim=32)  # as wide as queries: the CPU has a fused kernel for that
    config._experts_implementation = implementation
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").train()
    saved = layer_activations(config, 3, 17, torch.float32, False, experts=implementation)
    hidden = torch.randn(3, 17, config.hidden_size)
    tables = model.model.rotary_emb(hidden, torch.arange(17)[None])
    for kind, layer in (("dense", model.model.layers[0]), ("moe", model.model.layers[-1])):
        kept: list[torch.Tensor] = []

        def pack(tensor: torch.Tensor, kept: list[torch.Tensor] = kept) -> torch.Tensor:
            kept.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            layer(hidden.clone().requires_grad_(), position_embeddings=tables, attention_mask=None)
        known = {t.untyped_storage().data_ptr() for t in (*layer.parameters(), *layer.buffers(), *tables)}
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
        real = sum(size for address, size in storages.items() if address not in known)
        copied = (
            3 * 17 * config.num_attention_heads * 32 * 4
        )  # the CPU's kernel gives [b, heads, L, d]; a GPU's [b, L, ..]
        traced = sum(saved[kind].by_choice.values())
        assert 0 <= real - copied - traced < 0.01 * real, kind  # indices of 8 bytes
    assert saved["dense"].kept(("full",)) == hidden.nbytes


def test_recompute_and_imbalance_change_what_is_kept(tiny_config) -> None:
    config = tiny_config()
    saved = layer_activations(config, 2, 64, torch.bfloat16, True)["moe"]
    full = layer_activations(config, 2, 64, torch.bfloat16, True, 1.25)["moe"]
    rows = 2 * 64 * config.num_experts_per_tok
    per_row = 2 * (config.hidden_size + 2 * config.moe_intermediate_size) + 2 * config.hidden_size
    extra = sum(full.by_choice.values()) - sum(saved.by_choice.values())
    assert 0 < extra <= 0.25 * rows * (per_row + 16)
    sizes = [
        saved.kept(choice)
        for choice in ((), ("norms",), ("norms", "mla_up"), ("norms", "mla_up", "swiglu"), ("full",))
    ]
    assert sizes == sorted(set(sizes), reverse=True)


@pytest.mark.parametrize("stage", range(4))
def test_schedule_is_torch_s(stage: int) -> None:
    """1F1B as torch's own generator of single steps has it."""
    warm_up = 3 - stage
    operations = _get_1f1b_rank_ops(
        1, 4, warm_up, 7 - warm_up, warm_up, stage, lambda _: stage, lambda _: stage
    )
    kinds = [
        "B" if "BACKWARD" in operation.computation_type.name else "F"
        for operation in operations
        if operation is not None
    ]
    assert kinds == schedule(7, stage, 4)


def test_real_model_adds_up() -> None:
    """1T: every parameter is somewhere once; no time is lost."""
    config = load_config("kimi_k2_instruct")
    layout = Layout(pipeline=16, shard=16, expert=16)
    made = plan(config, layout, recompute=("full",))
    assert made.num_parameters == 1_026_408_209_408  # `k2 inspect`'s, less 60 router biases of 384
    weights = sum(stage.memory["weights"] * layout.data_size for stage in made.stages)
    assert (
        0 <= weights - 2 * made.num_parameters < 1e-4 * weights
    )  # the first rank has the larger part of an odd cut
    experts = 24 * 3 * 7168 * 2048 * 2 * 4
    assert experts < made.stages[1].memory["weights"] < 1.02 * experts
    tokens = 4096 * 7168 * 2
    assert made.stages[3].wire["pipeline"].inter == 2 * tokens * made.num_micro_batches


LAYOUTS = [
    Layout(),
    Layout(replicate=4),
    Layout(shard=4, expert=2),
    Layout(replicate=3, shard=4, expert=4),
    Layout(pipeline=3),
    Layout(pipeline=2, replicate=2),
    Layout(pipeline=3, shard=4, expert=2),
    Layout(pipeline=2, replicate=2, shard=6, expert=2),
]


@pytest.mark.parametrize("optimizer", ["muon_clip", pytest.param("adamw", marks=pytest.mark.slow)])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_few_layers_stand_for_all(tiny_config, layout: Layout, optimizer: str) -> None:
    """A stage put together from one layer of each kind is the stage that is laid out with all layers."""
    config = tiny_config(n_routed_experts=8, num_hidden_layers=5, first_k_dense_replace=2)
    arguments = (torch.bfloat16, True, optimizer, MUON)
    kinds = layer_kinds(config, layout, *arguments)
    for number in range(layout.pipeline):
        rank = number * layout.data_size
        composed = add_up(kinds.stage(*stage_kind(config, layout, number)), layout, 0).moved(rank)
        assert composed == share_of(config, layout, rank, *arguments), number


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1, 15])
def test_few_layers_stand_for_all_of_the_real_model(number: int) -> None:
    config = load_config("kimi_k2_instruct")
    layout = Layout(pipeline=16, replicate=4, shard=16, expert=8)
    arguments = (torch.bfloat16, True, "muon_clip", MUON)
    rank = number * layout.data_size
    kinds = layer_kinds(config, layout, *arguments)
    composed = add_up(kinds.stage(*stage_kind(config, layout, number)), layout, 0).moved(rank)
    assert composed == share_of(config, layout, rank, *arguments)


def test_workspace_of_many_layers() -> None:
    """Experts that fill a chunk alone: a few of them need what all need."""
    groups: list[dict[str, Any]] = [
        {"rule": rule, "momentum": 0.9, "nesterov": False, "row_blocks": None, "ns_dtype": "bfloat16"}
        | {"ns_iteration": "standard", "ns_steps": 2, "ns_schedule": "muon", "ns_eps": 1e-7}
        | {"update_rms": 0.2, "lr": 0.1, "weight_decay": 0.1}
        for rule in ("a", "b")
    ]
    tasks = []
    for group, shape in (
        (groups[0], (3, 4000, 7000)),
        (groups[1], (3, 7000, 2000)),
        (groups[1], (1, 99, 70)),
    ):
        for _ in range(7):
            made = [torch.empty(shape, dtype=dtype, device="meta") for dtype in (torch.bfloat16,) * 2]
            momentum = torch.empty(shape, device="meta")
            tasks.append(Task(made[0], made[1], momentum, group, shape))
    with torch.no_grad(), Peak(t for k in tasks for t in (k.weight, k.grad, k.momentum)) as peak:
        step_local(tasks)
    assert step_workspace(tasks) == peak.bytes > 3 * 4000 * 7000 * 4
    assert len(_few(tasks)) < len(tasks)


def test_estimates_are_near() -> None:
    """The real model: what candidates are ordered by is the plan itself, but for a few per cent."""
    config = load_config("kimi_k2_instruct")
    for layout in (
        Layout(pipeline=16, shard=16, expert=16),
        Layout(pipeline=4, shard=64, expert=32, replicate=2),
    ):
        rough = estimated(config, layout, Options(recompute=("full",)))
        real = plan(config, layout, recompute=("full",))
        assert rough.fullest.peak == pytest.approx(real.fullest.peak, rel=0.02)
        assert rough.busiest.sent.total == pytest.approx(real.busiest.sent.total, rel=0.02)


@pytest.mark.parametrize(("nodes", "shards"), [(32, 23.8), (256, 3.0)])
def test_states_of_the_report(nodes: int, shards: float) -> None:
    """Arithmetic of arXiv 2507.20534: 6 bytes a parameter over 256 GPUs, dense parts whole on each, some 30 GB."""
    layout = Layout(pipeline=16, shard=nodes // 2, expert=16)
    memory = plan(load_config("kimi_k2_instruct"), layout).fullest.memory
    held = memory["gathered"] + memory["gradients"]
    dense, routed = 4 * 147_931_136, 4 * 384 * 3 * 7168 * 2048  # of four layers
    assert held == pytest.approx(6 * (dense + routed / 16), rel=1e-3)
    assert 28e9 < held < 30e9
    assert (memory["weights"] + memory["optimizer"]) / 2**30 == pytest.approx(shards, abs=0.1)


def test_frozen_weights_and_gpipe(tiny_config) -> None:
    config = tiny_config(n_routed_experts=8)
    options = {"sequence_length": 64, "batch_size": 64}
    layout = Layout(pipeline=2, shard=2, expert=2)
    usual, frozen = plan(config, layout, **options), plan(config, layout, **options, frozen=True)
    for before, after in zip(usual.stages, frozen.stages, strict=True):
        assert after.memory["gradients"] == after.memory["optimizer"] == after.wire["fsdp_reduce"].total == 0
        assert after.memory["weights"] == before.memory["weights"]
        assert after.wire["fsdp_backward"] == before.wire["fsdp_backward"]
    whole = plan(config, layout, **options, schedule="gpipe")
    assert [stage.in_flight for stage in usual.stages] == [2, 1]
    assert [stage.in_flight for stage in whole.stages] == [32, 32]
    pieces = plan(config, layout, **options, schedule="gpipe", micro_batches_per_run=8)
    assert [stage.in_flight for stage in pieces.stages] == [8, 8]
    assert pieces.bubble == pytest.approx(1 / 9)


def test_search_and_advice(tiny_config) -> None:
    config = tiny_config(n_routed_experts=8)
    options = {"sequence_length": 64, "batch_size": 64, "gpus_per_node": 4, "reserve": 0.0}
    found = search(config, 8, tries=2, **options, gpu_memory=1.0)
    assert all(one.fits and one.layout.world_size == 8 and not one.advice for one in found)
    sent = [one.busiest.sent.total for one in found]
    assert sent == sorted(sent)
    tight = search(config, 8, tries=2, **options, gpu_memory=1e-4)[0]
    assert not tight.fits
    assert tight.advice
    for one in tight.advice:
        other = plan(config, one.layout, **(options | {"gpu_memory": 1e-4} | one.options))
        assert one.saves == tight.fullest.peak - other.fullest.peak, one.change
        assert one.fits == other.fits
    assert json.loads(json.dumps(tight.to_dict()))["fits"] is False


def test_advice_is_followed(tiny_config) -> None:
    """A little less than each change alone gives: only several together fit."""
    config = tiny_config(n_routed_experts=8)
    options = {"sequence_length": 256, "batch_size": 64, "reserve": 0.0}
    layout = Layout(shard=4, expert=2)
    tight = advised(config, plan(config, layout, **options, gpu_memory=1e-6))
    least = min(tight.fullest.peak - one.saves for one in tight.advice)
    options["gpu_memory"] = (least - 1000) / 2**30
    together = advised(config, plan(config, layout, **options)).advice[-1]
    assert together.fits
    assert ";" in together.change
    assert plan(config, together.layout, **(options | together.options)).fits


@pytest.mark.slow
def test_advice_for_the_real_model_on_32_nodes() -> None:
    tight = plan_nodes("kimi_k2_instruct", (32,), {})[32][0]
    assert not tight.fits
    fitting = [one for one in tight.advice if one.fits]
    assert fitting
    for one in fitting:
        sizes = asdict(one.layout)
        nodes = one.layout.world_size // 8
        assert plan_nodes("kimi_k2_instruct", (nodes,), sizes, **one.options)[nodes][0].fits, one.change


def test_report_and_plot(tiny_config, tmp_path: Path) -> None:
    from rich.console import Console

    options = {"sequence_length": 64, "batch_size": 64, "gpus_per_node": 4}
    found = {n: search(tiny_config(n_routed_experts=8), 4 * n, tries=2, **options) for n in (1, 2)}
    console = Console(record=True, width=150, file=(tmp_path / "out").open("w"))
    console.print(plan_report.render(found[2]), plan_report.render_sweep(found))
    text = console.export_text()
    assert f"{found[2][0].num_parameters:,}" in text
    assert "Fits" in text
    assert "2 nodes" in text
    plan_report.plot_sweep(found, tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_bytes_on_the_wire_by_hand() -> None:
    assert ring(64, tuple(range(8)), 8).total == 56
    assert ring(64, tuple(range(8)), 8).inter == 0
    across = ring(64, tuple(range(16)), 8)  # each node lacks half, which its 8 ranks share
    assert across.total == 60
    assert across.inter == 4
    assert exchange(64, tuple(range(16)), 8).inter == 32
    assert exchange(64, tuple(range(16)), 8).total == 60
    assert send(5, 7, 8, 8).inter == 5
    assert send(5, 6, 7, 8).intra == 5
    assert ring(64, (3,), 8).total == exchange(64, (3,), 8).total == 0


def test_peak_counts_what_lives_together() -> None:
    with Peak() as peak:
        x = torch.empty(1000, device="meta")
        y = x + 1 + 2  # one temporary
        del x
        z = torch.empty(100, device="meta")
    assert peak.bytes == 12_000
    assert y.numel() + z.numel() == 1100


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recompute": ("norm",)}, "recompute has"),
        ({"batch_size": 7}, "multiple of"),
        ({"optimizer": "sgd"}, "optimizer is 'sgd'"),
        ({"colour": 1}, "no option colour"),
        ({"imbalance": 0}, "imbalance is 0"),
        ({"micro_batch_size": True}, "micro_batch_size is True"),
        ({"batch_size": 12, "micro_batches_per_run": 4}, "divisor of the 6"),
        ({"schedule": "zigzag"}, "schedule is 'zigzag'"),
        ({"experts": "eager"}, "experts is 'eager'"),
    ],
)
def test_wrong_options(tiny_config, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(tiny_config(), Layout(shard=2), **options)


def test_wrong_layouts(tiny_config) -> None:
    with pytest.raises(ValueError, match="6 routed experts"):
        plan(tiny_config(), Layout(shard=4, expert=4))
    with pytest.raises(ValueError, match="expected 1 nodes x 8 GPUs = 8"):
        plan_nodes("debug_minute", (1,), {"pipeline": 3})
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        with pytest.raises(ValueError, match="outside of the training run"):
            share_of(tiny_config(), Layout(shard=2), 0, torch.float32, False, "adamw", {})
    finally:
        torch.distributed.destroy_process_group()
    assert Options().recompute == ()
