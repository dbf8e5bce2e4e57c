"""A hub folder opens with our classes through every Auto class, and its remote code is never run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    Trainer,
    TrainingArguments,
)

import transformers_k2
from transformers_k2 import (
    KimiK2Config,
    KimiK2ForCausalLM,
    KimiK2ForSequenceClassification,
    KimiK2ForTokenClassification,
    KimiK2Model,
)

CLASSES = {
    AutoConfig: KimiK2Config,
    AutoModel: KimiK2Model,
    AutoModelForCausalLM: KimiK2ForCausalLM,
    AutoModelForSequenceClassification: KimiK2ForSequenceClassification,
    AutoModelForTokenClassification: KimiK2ForTokenClassification,
}


@pytest.fixture
def hub_folder(tiny_model: KimiK2ForCausalLM, tmp_path: Path) -> Path:
    """As published: an auto_map, and the modules it names; these leave a mark when they are imported."""
    folder = tmp_path / "hub"
    tiny_model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": "configuration_deepseek.DeepseekV3Config",
        "AutoModel": "modeling_deepseek.DeepseekV3Model",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
    }
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("configuration_deepseek.py", "modeling_deepseek.py"):
        mark = tmp_path / "executed"
        (folder / name).write_text(f"open({str(mark)!r}, 'w')\nraise RuntimeError('remote code ran')\n")
    return folder


@pytest.mark.parametrize("trust", [None, False, True])
@pytest.mark.parametrize("auto", CLASSES)
def test_our_class_and_no_remote_code(auto: Any, trust: bool | None, hub_folder: Path) -> None:
    options = {} if trust is None else {"trust_remote_code": trust}
    assert type(auto.from_pretrained(hub_folder, **options)) is CLASSES[auto]
    assert not (hub_folder.parent / "executed").exists()


@pytest.mark.parametrize("auto", [auto for auto in CLASSES if auto is not AutoConfig])
def test_from_config(auto: Any, hub_folder: Path) -> None:
    config = AutoConfig.from_pretrained(hub_folder, trust_remote_code=True)
    assert type(auto.from_config(config, trust_remote_code=True)) is CLASSES[auto]
    assert not (hub_folder.parent / "executed").exists()


def test_registering_again_changes_nothing(hub_folder: Path) -> None:
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    def weights() -> list[tuple]:
        rules = get_checkpoint_conversion_mapping("kimi_k2")
        return [(type(rule), rule.source_patterns, rule.target_patterns) for rule in rules]

    before = weights()
    transformers_k2.register()
    transformers_k2.register()
    assert weights() == before
    for auto, cls in CLASSES.items():
        assert type(auto.from_pretrained(hub_folder)) is cls


def test_importing_is_all_it_takes(hub_folder: Path) -> None:
    """In a process of its own: nothing that another test imported helps."""
    program = (
        "import sys, transformers_k2\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "print(type(model).__qualname__, model.config._experts_implementation)"
    )
    run = subprocess.run(
        [sys.executable, "-c", program, str(hub_folder)],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert run.stdout.split() == ["KimiK2ForCausalLM", "grouped_mm"]


def test_label_smoothing_shifts_the_labels(tiny_model: KimiK2ForCausalLM, tmp_path: Path) -> None:
    """Trainer shifts them for the class names it knows as causal language models, and silently not for others."""
    arguments = TrainingArguments(tmp_path, label_smoothing_factor=0.1, report_to="none", use_cpu=True)
    ids = torch.randint(3, 331, (2, 9))
    with torch.no_grad():
        got = Trainer(tiny_model, arguments).compute_loss(tiny_model, {"input_ids": ids, "labels": ids})
        logits = tiny_model(ids).logits[:, :-1]
    wanted = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), ids[:, 1:].flatten(), label_smoothing=0.1
    )
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)  # another order of summation
