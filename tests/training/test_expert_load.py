"""The monitor's file, scalars, bias and picture say what the routers chose, also over a resume and a skipped step."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib import image
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments

from transformers_k2 import KimiK2Config, KimiK2ForCausalLM
from transformers_k2.moe import RouterBalance, routers
from transformers_k2.training.expert_load import ExpertLoadMonitor, plot_expert_load
from transformers_k2.training.history import StepMaxima

SPEED = 0.01
MakeModel = Callable[[], KimiK2ForCausalLM]
# Trainer reads the checkpoint's config.json, which has the hub's keys, as that of no particular model.
pytestmark = pytest.mark.filterwarnings("ignore:`rope_scaling` is deprecated:FutureWarning")


@pytest.fixture
def make(tiny_config: Callable[..., KimiK2Config]) -> MakeModel:
    def made() -> KimiK2ForCausalLM:
        torch.manual_seed(3)
        model = KimiK2ForCausalLM(tiny_config(rope_theta=50000.0))
        model.model.layers[2].mlp.gate.e_score_correction_bias[4] = -9.0  # a dead expert
        return model

    return made


class Spy(TrainerCallback):
    """Choices and bias, taken from the model's own hooks, and what a reporting callback gets to see."""

    def __init__(self, model: KimiK2ForCausalLM) -> None:
        self.routers = routers(model)
        self.chosen: list[dict[str, np.ndarray]] = []
        self.bias: list[np.ndarray] = []
        self.logs: list[dict[str, float]] = []
        self._now = {name: np.zeros(6, np.int64) for name in self.routers}
        for name, router in self.routers.items():
            router.register_forward_hook(
                lambda module, args, out, name=name: self.count(name, module, out[2])
            )

    def count(self, name: str, module: torch.nn.Module, indices: torch.Tensor) -> None:
        if module.training:
            self._now[name] = self._now[name] + np.bincount(indices.numpy().ravel(), minlength=6)

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.chosen.append(self._now)
        self._now = {name: np.zeros(6, np.int64) for name in self.routers}
        self.bias.append(
            np.stack([router.e_score_correction_bias.numpy().copy() for router in self.routers.values()])
        )

    def on_log(self, *args: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        self.logs.append(dict(logs or {}))


def run(
    model: KimiK2ForCausalLM,
    folder: Path,
    alpha: float = 0.01,
    freeze_after: int | None = None,
    resume: str | None = None,
    extra: list[TrainerCallback] | None = None,
    **changes: Any,
) -> tuple[Trainer, ExpertLoadMonitor, Spy]:
    ids = torch.randint(3, 331, (24, 9), generator=torch.Generator().manual_seed(5))
    settings: dict[str, Any] = {
        "max_steps": 4,
        "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": 2,
        "lr_scheduler_type": "constant",
        "learning_rate": 1e-3,
        "logging_steps": 2,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    spy = Spy(model)
    balance = RouterBalance(model, bias_update_speed=SPEED, balance_loss=alpha)
    monitor = ExpertLoadMonitor(balance, folder, freeze_after, title="test")
    trainer = Trainer(
        model=model,
        args=TrainingArguments(output_dir=str(folder), **(settings | changes)),
        train_dataset=[{"input_ids": row, "labels": row} for row in ids],
        eval_dataset=[{"input_ids": row, "labels": row} for row in ids[:2]],
        callbacks=[spy, *(extra or [])],
    )
    monitor.attach(trainer)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, monitor, spy


def lines(folder: Path) -> list[dict[str, Any]]:
    text = (folder / "expert_load.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_lines_scalars_bias_and_outcome(make: MakeModel, tmp_path: Path, checkpointing: bool) -> None:
    model = make()
    start = np.stack([router.e_score_correction_bias.numpy() for router in routers(model).values()])
    extra = {"activation_checkpointing": True} if checkpointing else {}
    spy_counts = 2 if checkpointing else 1  # its plain hook sees the recomputation too
    trainer, monitor, spy = run(model, tmp_path, freeze_after=3, **extra)
    written = lines(tmp_path)
    assert [line["step"] for line in written] == [1, 2, 3, 4]
    assert [line["frozen"] for line in written] == [False, False, False, True]
    ratios, dead = [], []
    for line, chosen, bias in zip(written, spy.chosen, spy.bias, strict=True):
        assert list(line["layers"]) == list(chosen) == [f"model.layers.{index}.mlp.gate" for index in (1, 2)]
        counts = np.stack(list(chosen.values())) // spy_counts
        assert counts.sum(1).tolist() == [6 * 9 * 2] * 2
        for row, layer in zip(counts, line["layers"].values(), strict=True):
            assert layer["counts"] == row.tolist()
            assert layer["max_over_mean"] == pytest.approx(row.max() / row.mean(), rel=1e-5)
            assert layer["dead"] == (row == 0).sum()
        assert line["balance_loss"] > 0
        ratios.append((counts.max(1) / counts.mean(1)).mean())
        dead.append(counts == 0)
        if not line["frozen"]:
            error = np.sign(counts.mean(1, keepdims=True) - counts)
            start = start + SPEED * (error - error.mean(1, keepdims=True))
        np.testing.assert_allclose(bias, start, rtol=1e-6, atol=1e-7)

    logs = [log for log in spy.logs if "loss" in log]
    kept = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logs) == len(kept) == 2
    for log, now in zip(logs + kept, [0, 2, 0, 2], strict=True):
        assert log["load_max_over_mean"] == pytest.approx(np.mean(ratios[now : now + 2]))
        assert log["dead_experts"] == (dead[now] & dead[now + 1]).sum() >= 1
        mean = np.mean([line["balance_loss"] for line in written[now : now + 2]])
        assert log["balance_loss"] == pytest.approx(mean)

    outcome = monitor.outcome()
    assert outcome is not None
    assert (outcome.num_steps, outcome.num_experts) == (1, 12)
    assert outcome.max_over_mean == pytest.approx(ratios[-1])
    last = {name: layer["max_over_mean"] for name, layer in written[-1]["layers"].items()}
    assert outcome.worst_layer == max(last, key=last.__getitem__)
    assert outcome.worst_max_over_mean == pytest.approx(max(last.values()), rel=1e-5)
    assert outcome.num_dead == dead[-1].sum()
    assert f"{outcome.num_dead} of 12 experts had no token" in str(outcome)
    assert image.imread(tmp_path / "expert_load.png").std() > 0.01


def test_resuming_equals_a_run_in_one_piece(make: MakeModel, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    _, monitor, spy = run(make(), whole, freeze_after=3)
    run(make(), parts, freeze_after=3, save_strategy="steps", save_steps=2)
    with (parts / "expert_load.jsonl").open("a") as file:
        file.write('{"step": 5, "lay')  # a crash in the middle of a line
    _, resumed, spy_resumed = run(make(), parts, freeze_after=3, resume=str(parts / "checkpoint-2"))
    assert lines(parts) == lines(whole)
    assert [line["step"] for line in lines(parts)] == [1, 2, 3, 4]
    assert resumed.outcome() == monitor.outcome()
    np.testing.assert_array_equal(spy_resumed.bias[-1], spy.bias[-1])


def test_a_skipped_step_moves_nothing(make: MakeModel, tmp_path: Path) -> None:
    class Overflow(TrainerCallback):
        """Says of the second step what float16's loss scaler would."""

        def on_pre_optimizer_step(self, *args: Any, optimizer: Any = None, **kwargs: Any) -> None:
            self.optimizer, self.step = optimizer, optimizer.step
            optimizer.step = self.stepped

        def stepped(self) -> None:
            state: TrainerState = self.trainer.state
            self.step()
            self.optimizer._is_overflow = state.global_step == 1
            self.optimizer.step = self.step

    class Skips(TrainerCallback):
        def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            kwargs["optimizer"]._is_overflow = False

    model = make()
    overflow = Overflow()
    ids = torch.randint(3, 331, (12, 9))
    balance = RouterBalance(model, bias_update_speed=SPEED, balance_loss=0)
    monitor = ExpertLoadMonitor(balance, tmp_path)
    spy = Spy(model)
    settings = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True}
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(tmp_path), max_steps=3, dataloader_pin_memory=False, **settings
        ),
        train_dataset=[{"input_ids": row, "labels": row} for row in ids],
        callbacks=[spy, overflow, Skips()],
    )
    overflow.trainer = trainer
    monitor.attach(trainer)
    trainer.train()
    assert np.array_equal(spy.bias[1], spy.bias[0])
    assert not np.array_equal(spy.bias[2], spy.bias[1])
    steps = {line["step"]: line for line in lines(tmp_path)}
    assert list(steps) == [1, 3]
    name = "model.layers.1.mlp.gate"
    assert steps[3]["layers"][name]["counts"] == spy.chosen[2][name].tolist()  # not the second's too
    assert not any("balance_loss" in log for log in spy.logs)


def test_other_ranks_write_nothing_but_move_the_bias(make: MakeModel, tmp_path: Path) -> None:
    model = make().train()
    monitor = ExpertLoadMonitor(RouterBalance(model, bias_update_speed=SPEED, balance_loss=0), tmp_path / "x")
    state: Any = TrainerState(max_steps=2, is_world_process_zero=False)
    nothing: Any = None
    monitor.on_train_begin(nothing, state, nothing)
    before = model.model.layers[1].mlp.gate.e_score_correction_bias.clone()
    model(torch.randint(3, 331, (2, 5)))
    monitor.on_optimizer_step(nothing, state, nothing)
    monitor.on_train_end(nothing, state, nothing)
    assert not torch.equal(model.model.layers[1].mlp.gate.e_score_correction_bias, before)
    assert not (tmp_path / "x").exists()
    assert monitor.outcome() is None


def test_a_file_of_another_run_is_refused(make: MakeModel, tmp_path: Path) -> None:
    monitor = ExpertLoadMonitor(RouterBalance(make(), bias_update_speed=0, balance_loss=0), tmp_path)
    state: Any = TrainerState(max_steps=9, global_step=1)
    nothing: Any = None
    (tmp_path / "expert_load.jsonl").write_text("loss 3.2\n")
    with pytest.raises(ValueError, match="line 1, is not JSON"):
        monitor.on_train_begin(nothing, state, nothing)
    layer = {"max_over_mean": 1.0, "dead": 0, "counts": [1, 1]}
    line = {"step": 1, "frozen": False, "balance_loss": 0.0, "layers": {"gate": layer}}
    (tmp_path / "expert_load.jsonl").write_text(json.dumps(line) + "\n")
    monitor.on_train_begin(nothing, state, nothing)
    monitor.balance.routers["model.layers.1.mlp.gate"].train()(torch.randn(1, 3, 72))
    with pytest.raises(ValueError, match=r"1 routers, \[1, 2\] .* 2, \[2, 6\]"):
        monitor.on_optimizer_step(nothing, state, nothing)
    monitor.on_train_end(nothing, state, nothing)
    with pytest.raises(ValueError, match="freeze_after is -1"):
        ExpertLoadMonitor(monitor.balance, tmp_path, -1)


def test_a_large_model_can_be_drawn(tmp_path: Path) -> None:
    history = StepMaxima(60)
    random = np.random.default_rng(0)
    for step in range(1, 40):
        history.add(step, 1 + random.random(60))
    shares = random.lognormal(0, 0.4, (60, 384))
    shares[7, 100] = 0
    plot_expert_load(
        tmp_path / "x.png", shares, [f"model.layers.{i}.mlp.gate" for i in range(1, 61)], history, 39
    )
    assert image.imread(tmp_path / "x.png").shape[0] > 1000
