"""INT4 training by recipe, and the file it ends with: compressed-tensors and transformers read what was computed with."""

from __future__ import annotations

import functools
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from matplotlib import image
from matplotlib.figure import Figure
from rich.console import Console
from torch.distributed.tensor import DTensor

from training_ranks import RECIPE, Run, lines, same_weights, text_file, weights
from transformers_k2 import KimiK2Config, KimiK2ForCausalLM, MuonClip, experts
from transformers_k2.optim.newton_schulz import choose_dtype
from transformers_k2.parallel import Layout, RandomWeights, build_model
from transformers_k2.parallel.shards import Shards
from transformers_k2.quantization import int4, prepare_qat
from transformers_k2.quantization.qat import settings
from transformers_k2.training import export_int4, load_recipe, train
from transformers_k2.training.checkpoints import Checkpoints
from transformers_k2.training.export import export_hub

experts.register()

IDS = torch.arange(33).reshape(3, 11) * 37 % 331
SIZES = {"hidden_size": 64, "moe_intermediate_size": 96}
ROUTED = [r"re:.*mlp\.experts\..*"]
THINKING = [
    "lm_head",
    "re:.*self_attn.*",
    "re:.*shared_experts.*",
    r"re:.*mlp\.(gate|up|gate_up|down)_proj.*",
]


def trained(model: KimiK2ForCausalLM, steps: int = 2) -> KimiK2ForCausalLM:
    """Some steps of MuonClip with clipped heads; bfloat16 weights have float32 masters."""
    half = model.dtype == torch.bfloat16
    optimizer = MuonClip.for_model(model, lr=0.02, qk_clip_tau=0.5, master_weights=half)
    for _ in range(steps):
        optimizer.zero_grad()
        for ids in IDS.split(2):  # accumulated
            (model(ids, labels=ids, use_cache=False).loss / 2).backward()
        optimizer.step()
    optimizer.close()
    return model.eval()


def by_compressed_tensors(folder: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """All weights of a file, INT4 ones as that library unpacks and multiplies them."""
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    found = weights(folder)
    for name in [name for name in found if name.endswith("_packed")]:
        name = name.removesuffix("_packed")
        packed, scale, shape = (found.pop(f"{name}_{part}") for part in ("packed", "scale", "shape"))
        codes = helpers.unpack_from_int32(packed, 4, torch.Size(shape.tolist()))
        found[name] = (
            codes.to(dtype).unflatten(1, (scale.shape[1], -1)) * scale.to(dtype).unsqueeze(-1)
        ).flatten(1)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("convention", ["kimi", "compressed_tensors"])
@pytest.mark.parametrize(
    ("targets", "ignore", "group_size"), [(ROUTED, [], 32), (["Linear"], THINKING[:1], 8)]
)
def test_the_file_is_what_training_computed(
    tiny_config: Callable[..., KimiK2Config], tmp_path: Path, dtype: torch.dtype, convention: str, targets: list[str],
    ignore: list[str], group_size: int,
) -> None:  # fmt: skip
    config = tiny_config(**SIZES)
    model = build_model(config, Layout(), RandomWeights(config, 3), dtype)
    model.model.layers[1].mlp.gate.e_score_correction_bias.data.normal_()
    prepare_qat(model, group_size, targets, convention, ignore)
    trained(model)
    folder = tmp_path / "int4"
    export_int4(model, folder, file_bytes=40_000)
    assert len(list(folder.glob("*.safetensors"))) > 2
    loaded = KimiK2ForCausalLM.from_pretrained(folder, dequantize=True).eval()
    assert loaded.dtype == dtype
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    # The same for readers that know nothing of us.
    loaded.save_pretrained(tmp_path / "dense")
    dense, read = weights(tmp_path / "dense"), by_compressed_tensors(folder, dtype)
    assert dense.keys() == read.keys()
    assert all(torch.equal(dense[name], tensor) for name, tensor in read.items())
    stored = weights(folder)
    scales = {name for name in stored if name.endswith("_scale")}
    assert {stored[name].dtype for name in scales} == {torch.bfloat16}
    assert {stored[f"{name.removesuffix('scale')}shape"].dtype for name in scales} == {torch.int32}
    # Its configuration says which they are, in compressed-tensors' words.
    quantization = json.loads((folder / "config.json").read_text())["quantization_config"]
    match = pytest.importorskip("compressed_tensors.utils.match")
    quant_config = pytest.importorskip("compressed_tensors.quantization.quant_config")
    config = quant_config.QuantizationConfig.model_validate(quantization)
    scheme = config.config_groups["group_0"]
    assert scheme.weights.group_size == group_size
    assert (config.ignore == THINKING) == (targets == ROUTED)
    for name, tensor in dense.items():
        if tensor.dim() == 2 and "embed_tokens" not in name and "mlp.gate.weight" not in name:
            module = name.removesuffix(".weight")
            linear = torch.nn.Linear(1, 1)
            assert match.is_match(module, linear, scheme.targets, config.ignore) == (
                f"{name}_packed" in stored
            )


def test_what_cannot_be_exported(tiny_config: Callable[..., KimiK2Config], tmp_path: Path) -> None:
    model = KimiK2ForCausalLM(tiny_config(**SIZES))
    with pytest.raises(ValueError, match="expected a model after `prepare_qat`"):
        export_int4(model, tmp_path)
    prepare_qat(model)
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "model.safetensors").touch()
    with pytest.raises(ValueError, match=r"has model.safetensors already: expected a folder without weights"):
        export_int4(model, tmp_path / "old")
    with torch.no_grad():
        model.model.layers[2].mlp.experts.down_proj[3, 5, 7] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        export_int4(model, tmp_path / "nan")
    assert not (tmp_path / "nan" / "model.safetensors.index.json").exists()  # so it does not load


# -- recipes

PHASES = (
    "quantization={method: int4_qat, targets: ['re:.*mlp\\.experts\\..*'], ignore: [], group_size: 8, convention: kimi,"
    " warmup: %s, freeze: %s}"
)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_file(tmp_path_factory.mktemp("int4"))


def run_here(text: Path, output: Path, *overrides: str) -> str:
    """A run in this process; what it prints."""
    console = Console(width=160, record=True, file=io.StringIO())
    train(RECIPE, [*Run(text, output, overrides).arguments, "training.cpu_threads=1"], console)
    return " ".join(console.export_text().replace("\u2502", " ").split())


@pytest.fixture(scope="module")
def finished(text: Path) -> Path:
    folder = text.parent / "finished"
    printed = run_here(text, folder, PHASES % (2, 2))
    assert (
        "read back: 0 different weights, 0 different codes, logits of training forward and file equal"
        in printed
    )
    return folder


@pytest.fixture
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Figure, "savefig", lambda _, path, **options: Path(path).touch())


@pytest.mark.usefixtures("_no_pictures")
def test_phases_and_report(text: Path, finished: Path) -> None:
    """Two steps as without quantisation, two on the grid, two in which the weights on the grid stay."""
    plain = text.parent / "plain"
    run_here(text, plain)
    mine, its = ([line["loss"] for line in lines(folder) if "loss" in line] for folder in (finished, plain))
    assert mine[:2] == its[:2]
    assert mine[2] != its[2]
    before, after = (Shards(finished / "checkpoints" / f"step-0000000{step}") for step in (4, 6))
    same = {
        name: torch.equal(*(shards.rows(name, shape, torch.arange(shape[0])) for shards in (before, after)))
        for name, shape in before.shapes.items()
        if name.startswith("model.") and not name.endswith("e_score_correction_bias")
    }
    assert {name for name, unchanged in same.items() if unchanged} == {
        f"model.model.layers.{layer}.mlp.experts.{stack}"
        for layer in (1, 2)
        for stack in ("gate_up_proj", "down_proj")
    }
    outcome = json.loads((finished / "int4_qat.json").read_text())
    assert outcome["agreement"] == {"different_weights": 0, "different_codes": 0, "same_logits": True}
    assert outcome["trained_rounded"] == lines(finished)[-1]["held_out_loss"]
    assert outcome["trained_rounded"] < outcome["start_rounded"] != outcome["start"]
    assert outcome["num_weights"] == 2 * 4 * 3 * 32 * 16
    assert 0.01 < outcome["moved_codes"] < 1
    assert json.loads((finished / "summary.json").read_text())["int4"] == outcome
    assert image.imread(finished / "int4_qat.png").shape[:2] == (480, 1080)
    model = KimiK2ForCausalLM.from_pretrained(finished, dequantize=True)
    weight = model.model.layers[1].mlp.experts.down_proj.data
    assert torch.equal(int4.dequantize(*int4.quantize(weight, 8), torch.float32), weight)


@pytest.mark.usefixtures("_no_pictures")
@pytest.mark.parametrize("step", [4, 6])
def test_a_stopped_run_goes_on_in_its_phase(
    text: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """Stopped where the checkpoint at the end of the warm-up is the newest, or the one where weights freeze."""
    save = Checkpoints.save

    def stop(self: Checkpoints, at: int, *rest: Any) -> Path:
        if at == step:
            raise InterruptedError
        return save(self, at, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", stop)
        with pytest.raises(InterruptedError):
            run_here(text, tmp_path / "run", PHASES % (2, 2))
    printed = run_here(text, tmp_path / "run", PHASES % (2, 2))
    assert f"Continuing at step {step - 2} of 6" in printed
    assert same_weights(tmp_path / "run", finished)
    assert lines(tmp_path / "run") == lines(finished)
    assert (tmp_path / "run" / "int4_qat.json").read_bytes() == (finished / "int4_qat.json").read_bytes()


def test_phases_that_overlap_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"quantization.warmup is 0.6 and quantization.freeze 5, together 11 steps"
    ):
        load_recipe("debug_pretrain", ["training.steps=10", PHASES % (0.6, 5), "schedule.warmup=1"])
    with pytest.raises(ValueError, match="expected one of kimi, compressed_tensors"):
        load_recipe("debug_pretrain", [(PHASES % (0, 0)).replace("kimi", "awq")])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_processes", "overrides"),
    [
        (2, []),
        (2, ["parallel.shard=all", "parallel.expert=2", "training.micro_batch_size=2"]),
        (2, ["parallel.pipeline=2", "training.micro_batch_size=2"]),
        (2, ["parallel.shard=all", "training.dtype=bfloat16"]),
    ],
    ids=["copies", "experts", "stages", "shards, mixed precision"],
)
def test_runs_on_several_processes_end_with_the_same_kind_of_file(
    text: Path, finished: Path, tmp_path: Path, num_processes: int, overrides: list[str]
) -> None:
    run = Run(text, tmp_path / "run", [PHASES % (2, 2), *overrides], num_processes)
    folder = run.finish()
    exact = "training.dtype=bfloat16" not in overrides
    mine, its = ([line["loss"] for line in lines(path) if "loss" in line] for path in (folder, finished))
    # A code at a threshold may flip; Newton-Schulz in bfloat16, where the CPU multiplies it, flips a few more.
    rounding = 1e-4 if choose_dtype("cpu") is torch.float32 else 1e-3
    assert mine == pytest.approx(its, rel=rounding if exact else 2e-2)
    one, other = weights(finished), weights(folder)
    assert {name: tensor.dtype for name, tensor in one.items()} == {
        name: t.dtype for name, t in other.items()
    }
    for name, tensor in one.items():
        if exact and name.endswith("_packed"):
            codes = [int4.unpack(packed, 8 * packed.shape[1]) for packed in (tensor, other[name])]
            assert (codes[0] != codes[1]).float().mean() < 0.02
    configs = [json.loads((path / "config.json").read_text()) for path in (folder, finished)]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]


# -- shards


def note(module: torch.nn.Module, read: dict[str, torch.Tensor], *_: Any) -> None:
    for name, weight in module._parameters.items():
        assert weight is not None
        read[name] = (weight.to_local() if isinstance(weight, DTensor) else weight).detach().clone()


def run_rank(rank: int, folder: Path, config: KimiK2Config) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for name, layout in LAYOUTS.items():
        model = build_model(config, layout, RandomWeights(config, 3), mixed_precision=True)
        prepare_qat(model, 8, [*ROUTED, "re:.*o_proj"])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model(IDS, labels=IDS, use_cache=False).loss.backward()
        optimizer.step()
        read: dict[str, torch.Tensor] = {}
        module = model.model.layers[2].mlp.experts
        module.act_fn.register_forward_hook(
            functools.partial(note, module, read)
        )  # in the midst of its forward
        with torch.no_grad():
            model(IDS, use_cache=False)
        assert {how.dtype for how in settings(model).values()} == {torch.bfloat16}
        checkpoints = Checkpoints(folder / name, 1, layout)
        path = checkpoints.save(1, model, optimizer, "{}", {})
        (folder / f"{name} int4").mkdir(exist_ok=True)
        dist.barrier()
        export_hub(path, model, folder / f"{name} int4", file_bytes=40_000)
        torch.save(read, folder / f"{name} {rank}.pt")
        dist.barrier()
    dist.destroy_process_group()


LAYOUTS = {"shards": Layout(shard=2), "experts": Layout(shard=2, expert=2)}


@pytest.mark.slow
def test_float32_shards_that_are_gathered_as_bfloat16(
    tiny_config: Callable[..., KimiK2Config], tmp_path: Path
) -> None:
    """The grid is that of the gathered weights: the file, in bfloat16, holds the weights that the forward pass read."""
    config = tiny_config(**SIZES)
    mp.spawn(run_rank, args=(tmp_path, config), nprocs=2)
    for name in LAYOUTS:
        loaded = KimiK2ForCausalLM.from_pretrained(
            tmp_path / f"{name} int4", dequantize=True, dtype=torch.bfloat16
        )
        experts = loaded.model.layers[2].mlp.experts
        for rank in range(2):
            read = torch.load(tmp_path / f"{name} {rank}.pt")
            assert read.keys() == {"gate_up_proj", "down_proj"}
            for stack, weight in read.items():
                mine = slice(3 * rank, 3 * rank + 3) if name == "experts" else slice(None)
                assert weight.dtype is torch.bfloat16
                assert torch.equal(weight, experts.get_parameter(stack)[mine])
