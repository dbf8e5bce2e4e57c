"""The model test class that runs inside transformers' own source distribution (see test_upstream_suite.py).

The runner puts this file beside the mixins of that distribution, as `tests/test_k2_suite.py`. One class, two families:
the environment variable K2_SUITE_FAMILY says whether the tests see transformers' DeepSeek-V3 or ours. Everything but
the classes is the same, so a test that passes on one and not on the other is a difference of ours.
"""

from __future__ import annotations

import inspect
import os
import unittest
import unittest.mock
from typing import Any

import torch
import transformers
from transformers.models.deepseek_v3 import modeling_deepseek_v3
from transformers.testing_utils import torch_device

import transformers_k2

from . import test_expert_parallel_mixin, test_fsdp_mixin, test_tensor_parallel_mixin
from .generation.test_utils import GenerationTesterMixin
from .test_configuration_common import ConfigTester
from .test_expert_parallel_mixin import ExpertParallelTesterMixin
from .test_fsdp_mixin import FSDPTesterMixin
from .test_modeling_common import ModelTesterMixin
from .test_tensor_parallel_mixin import TensorParallelTesterMixin
from .test_training_mixin import TrainingTesterMixin

# Upstream runs its multi-process tests for a handful of model types only; None means for every one.
test_expert_parallel_mixin.EP_DISTRIBUTED_TEST_MODEL_TYPES = None
test_fsdp_mixin.FSDP_DISTRIBUTED_TEST_MODEL_TYPES = None
test_tensor_parallel_mixin.TP_DISTRIBUTED_TEST_MODEL_TYPES = None

FAMILIES = {"stock": (transformers, "DeepseekV3"), "ours": (transformers_k2, "KimiK2")}
LIBRARY, NAME = FAMILIES[os.environ["K2_SUITE_FAMILY"]]
HEADS = ("Model", "ForCausalLM", "ForSequenceClassification", "ForTokenClassification")
CLASSES = tuple(getattr(LIBRARY, NAME + head) for head in HEADS)
CONFIG = getattr(LIBRARY, f"{NAME}Config")

SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 40,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "routed_scaling_factor": 2.827,
    "max_position_embeddings": 512,
    "rope_theta": 50000.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "num_mtp_layers": 0,
}


class Tester:
    """What the mixins call `model_tester`: the classes, one tiny configuration, one batch."""

    base_model_class, causal_lm_class, sequence_classification_class, token_classification_class = CLASSES
    config_class = CONFIG
    batch_size, seq_length, is_training = 3, 7, True
    vocab_size, hidden_size = SIZES["vocab_size"], SIZES["hidden_size"]
    num_hidden_layers, num_attention_heads = SIZES["num_hidden_layers"], SIZES["num_attention_heads"]

    def get_config(self) -> Any:
        return CONFIG(**SIZES)

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, torch.Tensor]]:
        shape = (self.batch_size, self.seq_length)
        input_ids = torch.randint(3, self.vocab_size, shape, device=torch_device)
        mask = torch.ones(shape, dtype=torch.long, device=torch_device).tril()
        return self.get_config(), {"input_ids": input_ids, "attention_mask": mask}


class ModelTest(
    ModelTesterMixin,
    GenerationTesterMixin,
    TensorParallelTesterMixin,
    ExpertParallelTesterMixin,
    FSDPTesterMixin,
    TrainingTesterMixin,
    unittest.TestCase,
):
    all_model_classes = CLASSES
    test_all_params_have_gradient = False  # an expert that no token chose
    test_can_init_all_missing_weights_before_2023 = (
        True  # the year is read from a copyright line; ours has none
    )
    model_tester = None

    def setUp(self) -> None:
        self.model_tester = Tester()
        self.config_tester = ConfigTester(self, config_class=CONFIG, hidden_size=37)

    def test_config(self) -> None:
        self.config_tester.run_common_tests()

    def test_moe_models_record_router_logits(self) -> None:
        """It looks for the experts in the source of the class's module; ours inherit theirs."""
        with unittest.mock.patch.object(inspect, "getmodule", return_value=modeling_deepseek_v3):
            super().test_moe_models_record_router_logits()

    def test_model_weights_reload_no_missing_tied_weights(self) -> None:
        """It loads a file without a single weight to read the report: with ours that takes `strict=False`."""
        base = transformers_k2.KimiK2PreTrainedModel
        strict = base.from_pretrained.__func__
        lenient = classmethod(lambda cls, *args, **kwargs: strict(cls, *args, strict=False, **kwargs))
        with unittest.mock.patch.object(base, "from_pretrained", lenient):
            super().test_model_weights_reload_no_missing_tied_weights()
