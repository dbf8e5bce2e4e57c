"""The monitor's file, scalars and picture say what the optimizer did, also over a resume and for a thousand heads."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib import image
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from transformers_k2 import KimiK2Config, KimiK2ForCausalLM, MuonClip, muon_clip
from transformers_k2.training import MuonClipMonitor
from transformers_k2.training.history import StepMaxima, layer_of
from transformers_k2.training.muon_clip_plot import plot_muon_clip

TAU = 0.6
MakeModel = Callable[[], KimiK2ForCausalLM]
# Trainer reads the checkpoint's config.json, which has the hub's keys, as that of no particular model.
pytestmark = pytest.mark.filterwarnings("ignore:`rope_scaling` is deprecated:FutureWarning")


@pytest.fixture
def make(tiny_config: Callable[..., KimiK2Config]) -> MakeModel:
    def made() -> KimiK2ForCausalLM:
        torch.manual_seed(3)
        return KimiK2ForCausalLM(tiny_config(rope_theta=50000.0, num_hidden_layers=2))

    return made


class Spy(TrainerCallback):
    """What the optimizer says, taken from it directly, and what a reporting callback gets to see."""

    def __init__(self) -> None:
        self.stats: list[dict[str, dict[str, torch.Tensor]]] = []
        self.rms: list[dict[str, float]] = []
        self.logs: list[dict[str, float]] = []

    def on_optimizer_step(self, *args: Any, optimizer: Any = None, **kwargs: Any) -> None:
        self.stats.append(optimizer.optimizer.qk_clip_stats())
        self.rms.append(optimizer.optimizer.update_rms())

    def on_log(self, *args: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        self.logs.append(dict(logs or {}))


def trainer(
    model: KimiK2ForCausalLM,
    folder: Path,
    monitor: MuonClipMonitor,
    spy: Spy | None = None,
    optimizer: Any = None,
    **changes: Any,
) -> Trainer:
    ids = torch.randint(3, 331, (24, 17), generator=torch.Generator().manual_seed(5))
    settings: dict[str, Any] = {
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    run = Trainer(
        model=model,
        args=TrainingArguments(output_dir=str(folder), **(settings | changes)),
        train_dataset=[{"input_ids": row, "labels": row} for row in ids],
        eval_dataset=[{"input_ids": row, "labels": row} for row in ids[:2]],
        callbacks=[spy] if spy else [],
        optimizer_cls_and_kwargs=optimizer or muon_clip(lr=3e-2, qk_clip_tau=TAU),
    )
    monitor.attach(run)
    return run


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "qk_clip.jsonl").read_text(encoding="utf-8").splitlines()]


def test_the_lines_are_what_the_optimizer_did(make: MakeModel, tmp_path: Path) -> None:
    spy, monitor = Spy(), MuonClipMonitor(tmp_path, rms_every=2)
    run = trainer(make(), tmp_path, monitor, spy)
    run.train()
    written = lines(tmp_path)
    assert [line["step"] for line in written] == [1, 2, 3, 4]
    assert {line["tau"] for line in written} == {TAU}
    clips = {name: torch.zeros(4, dtype=torch.int64) for name in spy.stats[0]}
    for line, stats in zip(written, spy.stats, strict=True):
        assert (
            list(line["attention"])
            == list(stats)
            == [f"model.layers.{index}.self_attn" for index in range(2)]
        )
        for name, item in line["attention"].items():
            clips[name] += stats[name]["gamma"] < 1
            for key in ("max_logit", "gamma"):
                assert torch.equal(torch.tensor(item[key]), stats[name][key])  # every digit of float32
            assert item["exact"] == stats[name]["exact"].tolist()
            assert item["clips"] == clips[name].tolist()
    assert any(0 < count < 4 for counts in clips.values() for count in counts.tolist())

    assert [bool(rms) for rms in spy.rms] == [False, True, False, True]
    sizes = {name: parameter.numel() for name, parameter in run.model.named_parameters()}
    for line, rms in zip(written, spy.rms, strict=True):
        assert ("update_rms" in line) is bool(rms)
        for layer, value in line.get("update_rms", {}).items():
            mine = {name: rms[name] for name in rms if name.startswith(f"{layer}.")}
            mean = sum(value**2 * sizes[name] for name, value in mine.items()) / sum(
                sizes[name] for name in mine
            )
            assert value == pytest.approx(math.sqrt(mean), rel=1e-5)
    assert list(written[1]["update_rms"]) == ["model.layers.0", "model.layers.1"]


def test_the_scalars_reach_the_other_callbacks(make: MakeModel, tmp_path: Path) -> None:
    spy = Spy()
    run = trainer(make(), tmp_path, MuonClipMonitor(tmp_path, rms_every=1), spy, logging_steps=2)
    run.train()
    logs = [entry for entry in spy.logs if "loss" in entry]
    assert len(logs) == 2
    for entry, first in zip(logs, (0, 2), strict=True):
        pair = spy.stats[first : first + 2]
        largest = max(float(item["max_logit"].max()) for stats in pair for item in stats.values())
        assert entry["max_logit"] == pytest.approx(largest, rel=1e-7)
        clipped = {
            (name, head)
            for stats in pair
            for name in stats
            for head in range(4)
            if stats[name]["gamma"][head] < 1
        }
        assert entry["heads_clipped"] == len(clipped) > 0
        assert 0.05 < entry["update_rms"] < 0.3
    history = [entry for entry in run.state.log_history if "loss" in entry]
    assert [entry["max_logit"] for entry in history] == [entry["max_logit"] for entry in logs]


def test_the_outcome_counts_heads(make: MakeModel, tmp_path: Path) -> None:
    monitor = MuonClipMonitor(tmp_path)
    assert monitor.outcome() is None
    spy = Spy()
    trainer(make(), tmp_path, monitor, spy).train()
    outcome = monitor.outcome()
    assert outcome is not None
    logits = torch.stack([torch.cat([item["max_logit"] for item in stats.values()]) for stats in spy.stats])
    assert outcome.num_heads == 8
    assert outcome.peak_logit == pytest.approx(float(logits.max()), rel=1e-7)
    assert outcome.peak_is_exact
    assert outcome.heads_clipped == int((logits > TAU).any(0).sum())
    assert outcome.heads_above_tau == int((logits[-1] > TAU).sum())
    assert outcome.last_logit == pytest.approx(float(logits[-1].max()), rel=1e-7)
    assert (
        f"{8 - outcome.heads_above_tau} of 8 heads below tau 0.6 at the end; {outcome.heads_clipped} were"
        in str(outcome)
    )


def test_a_resumed_run_continues_the_file(make: MakeModel, tmp_path: Path) -> None:
    settings = {"save_strategy": "steps", "save_steps": 2}
    monitor = MuonClipMonitor(tmp_path)
    trainer(make(), tmp_path, monitor, **settings).train()
    path = tmp_path / "qk_clip.jsonl"
    whole, outcome = path.read_bytes(), monitor.outcome()
    assert whole.count(b"\n") == 4
    path.write_bytes(whole[:-7])  # killed while it wrote the last line, which lies after the checkpoint
    again = MuonClipMonitor(tmp_path)
    model = KimiK2ForCausalLM.from_pretrained(
        tmp_path / "checkpoint-2"
    )  # Trainer alone does not restore fused experts
    trainer(model, tmp_path, again, **settings).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert path.read_bytes() == whole
    assert again.outcome() == outcome

    path.write_bytes(b"{broken\n" + whole)
    with pytest.raises(ValueError, match=r"qk_clip.jsonl, line 1, is not JSON"):
        trainer(make(), tmp_path, MuonClipMonitor(tmp_path), **settings).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-2")
        )
    other = whole.replace(b"model.layers.1.self_attn", b"model.layers.7.self_attn")
    path.write_bytes(other)
    with pytest.raises(ValueError, match="expected the same run"):
        trainer(make(), tmp_path, MuonClipMonitor(tmp_path), **settings).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-2")
        )
    trainer(make(), tmp_path, MuonClipMonitor(tmp_path), max_steps=1).train()  # a new run starts a new file
    assert path.read_bytes() == whole[: whole.index(b"\n") + 1]


def test_another_optimizer_is_refused(make: MakeModel, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the Trainer's optimizer is AdamW: expected .*muon_clip"):
        trainer(
            make(), tmp_path, MuonClipMonitor(tmp_path), optimizer=(torch.optim.AdamW, {"lr": 1e-3})
        ).train()
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="rms_every is 0"):
        MuonClipMonitor(tmp_path, rms_every=0)


def test_without_clipping_update_sizes_remain(make: MakeModel, tmp_path: Path) -> None:
    monitor = MuonClipMonitor(tmp_path, rms_every=1)
    trainer(make(), tmp_path, monitor, optimizer=muon_clip(lr=3e-2, qk_clip_tau=None), max_steps=2).train()
    assert [line["attention"] for line in lines(tmp_path)] == [{}, {}]
    assert all(0.05 < value < 0.3 for line in lines(tmp_path) for value in line["update_rms"].values())
    assert monitor.outcome() is None
    assert image.imread(tmp_path / "qk_clip.png").shape[1] > 1000


def test_a_skipped_step_leaves_no_line(tmp_path: Path) -> None:
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer

    monitor, arguments = MuonClipMonitor(tmp_path), TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    Accelerator(cpu=True)  # the state that AcceleratedOptimizer reads
    muon = MuonClip([torch.nn.Parameter(torch.randn(5, 7))], lr=0.1)
    optimizer = AcceleratedOptimizer(muon, device_placement=False, scaler=torch.amp.GradScaler("cpu"))
    state, control = TrainerState(), TrainerControl()
    monitor.on_train_begin(arguments, state, control, optimizer=optimizer)
    for overflow in (True, False):
        muon.param_groups[0]["params"][0].grad = torch.full((5, 7), math.inf if overflow else 1.0)
        optimizer.scaler.scale(torch.zeros(()))
        optimizer.step()
        assert optimizer.step_was_skipped is overflow
        monitor.on_optimizer_step(arguments, state, control, optimizer=optimizer)
        state.global_step += 1
    assert [line["step"] for line in lines(tmp_path)] == [2]


@pytest.mark.parametrize("steps", [1, 7, 8, 9, 16, 100])
def test_many_steps_share_columns_and_lose_no_peak(steps: int) -> None:
    values = np.random.default_rng(0).normal(size=(3, steps)).astype(np.float32)
    history = StepMaxima(3, columns=8)
    for step in range(steps):
        history.add(step + 1, values[:, step])
    width = 2 ** max(0, math.ceil(math.log2(steps / 8)))
    assert history.width == width
    padded = np.pad(values, ((0, 0), (0, -steps % width)), constant_values=-np.inf)
    assert np.array_equal(history.values, padded.reshape(3, -1, width).max(2))
    assert history.steps[0] == (1 + width) / 2


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.layers.12.mlp.experts.gate_up_proj", "model.layers.12"),
        (
            "base_model.model.model.layers.0.self_attn.q_b_proj.base_layer.weight",
            "base_model.model.model.layers.0",
        ),
        ("transformer.h.3.mlp.experts.7.up_proj.weight", "transformer.h.3"),
        ("layers.3.weight", "layers.3"),
        ("projector.weight", "projector"),
    ],
)
def test_parameters_belong_to_layers(name: str, layer: str) -> None:
    assert layer_of(name) == layer


def colours(path: Path) -> tuple[int, int]:
    """How many pixels are of the orange to red above tau, how many of the blues below."""
    pixels = image.imread(path)[..., :3]
    red, green, blue = pixels[..., 0], pixels[..., 1], pixels[..., 2]
    return int(((red > blue + 0.4) & (green < 0.75)).sum()), int((blue > red + 0.2).sum())


def draw(path: Path, layers: int, heads: int, steps: int, hot: dict[tuple[int, int], float]) -> None:
    """All logits 80 but for the hot (head, step); tau is 100."""
    logits, clips, rms = StepMaxima(layers * heads), StepMaxima(layers * heads), StepMaxima(layers)
    for step in range(1, steps + 1):
        values = np.full(layers * heads, 80.0, np.float32)
        for (head, when), value in hot.items():
            values[head] = value if when == step else values[head]
        logits.add(step, values)
        clips.add(step, values > 100)
        rms.add(step, np.full(layers, 0.2, np.float32))
    names = [f"model.layers.{index}" for index in range(layers)]
    plot_muon_clip(
        path, {f"{name}.self_attn": heads for name in names}, logits, clips, 100.0, names, rms, 0.2
    )


def test_one_clip_among_thousands_of_heads_and_steps_is_seen(tmp_path: Path) -> None:
    draw(tmp_path / "calm.png", 61, 64, 1500, {})
    draw(tmp_path / "clip.png", 61, 64, 1500, {(1234, 777): 118.0})
    calm, clip = (image.imread(tmp_path / name)[..., :3] for name in ("calm.png", "clip.png"))
    assert calm.shape == clip.shape
    height, width = calm.shape[:2]
    assert 600 < height < 2400
    assert width < 2000
    differs = np.abs(calm - clip).max(2) > 0.3
    heat_map = differs[: int(0.55 * height), : int(0.88 * width)]
    assert heat_map.any()
    assert heat_map.sum() < 60
    row, column = (where.mean() for where in np.nonzero(heat_map))
    left, right = 0.085 * width, (0.085 + (0.9 - 0.085) * 60 / 61.9) * width
    assert (column - left) / (right - left) == pytest.approx(777 / 1500, abs=0.02)
    assert row / height == pytest.approx(0.04 + 0.5 * 1234 / 3904, abs=0.05)
    assert not [
        path.name for path in tmp_path.iterdir() if path.suffix != ".png" or path.name.startswith(".")
    ]


def test_a_small_model_is_drawn_head_by_head(tmp_path: Path) -> None:
    draw(tmp_path / "calm.png", 3, 2, 40, {})
    draw(tmp_path / "clips.png", 3, 2, 40, {(3, step): 115.0 for step in range(10, 30)})
    calm, clips = colours(tmp_path / "calm.png"), colours(tmp_path / "clips.png")
    share = 20 / 40 / 6  # of the heat map
    assert clips[0] - calm[0] > 0.8 * share * calm[1] * 0.9
    assert clips[1] < calm[1]
