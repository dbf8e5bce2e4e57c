"""The only file that touches the registries of transformers and peft. `register()` runs on import and is idempotent.

A registered class whose module is not under `transformers.` wins over a hub `auto_map`, whatever `trust_remote_code` says.
Should a later transformers ship `kimi_k2`, ours replaces it (`exist_ok`): it loads what the stock classes cannot.
Private upstream names are imported here only; tests/test_upstream.py holds one assert for each fact relied on.
"""

from __future__ import annotations

from typing import Any

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    Kimi_K25Config,
)
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.core_model_loading import PrefixChange
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)
from transformers.models.auto.tokenization_auto import REGISTERED_TOKENIZER_CLASSES, TOKENIZER_MAPPING_NAMES
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

from . import experts, flex_attention, padded_sdpa, peft_mapping
from .configuration_kimi_k2 import KimiK2Config
from .modeling_kimi_k2 import (
    KimiK2ForCausalLM,
    KimiK2ForSequenceClassification,
    KimiK2ForTokenClassification,
    KimiK2Model,
)
from .quantization.hf_quantizer import METHOD, Int4Config, PackedQuantizer
from .tokenization_kimi_k2 import HUB_CLASS_NAME, KimiK2Tokenizer

MODEL_TYPE = KimiK2Config.model_type

# transformers' own configuration of the K2.5 wrapper, from a module outside `transformers.`: an auto_map cannot replace
# it. The name stays, because the stock model mappings are keyed by it.
_WrapperConfig = type("Kimi_K25Config", (Kimi_K25Config,), {"__module__": __name__})


def register() -> None:
    """Make the Auto classes, the weight conversions and the quantizers know the Kimi K2 family."""
    AutoConfig.register(MODEL_TYPE, KimiK2Config, exist_ok=True)
    AutoModel.register(KimiK2Config, KimiK2Model, exist_ok=True)
    AutoModelForCausalLM.register(KimiK2Config, KimiK2ForCausalLM, exist_ok=True)
    AutoModelForSequenceClassification.register(KimiK2Config, KimiK2ForSequenceClassification, exist_ok=True)
    AutoModelForTokenClassification.register(KimiK2Config, KimiK2ForTokenClassification, exist_ok=True)
    # Where a task is told by the name of the class: Trainer shifts labels under label smoothing only for names it finds
    # here, `transformers serve` refuses the others.
    MODEL_MAPPING_NAMES[MODEL_TYPE] = KimiK2Model.__name__
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[MODEL_TYPE] = KimiK2ForCausalLM.__name__
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES[MODEL_TYPE] = KimiK2ForSequenceClassification.__name__
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES[MODEL_TYPE] = KimiK2ForTokenClassification.__name__
    # The text half of a K2.5 checkpoint: AutoModelForCausalLM has no class for it. The public method refuses a model
    # whose config class is another one, so the mapping is told directly.
    AutoConfig.register("kimi_k25", _WrapperConfig, exist_ok=True)
    causal: Any = AutoModelForCausalLM._model_mapping
    causal.register(_WrapperConfig, KimiK2ForCausalLM, exist_ok=True)

    # By the class name in the hub's tokenizer_config.json. AutoTokenizer.register(KimiK2Config, ...) would make the
    # hub's auto_map win under trust_remote_code=True; so would the stock entry for K2.5.
    TOKENIZER_MAPPING_NAMES.pop("kimi_k25", None)
    REGISTERED_TOKENIZER_CLASSES[HUB_CLASS_NAME] = KimiK2Tokenizer

    # Not inherited by subclassing: without it per-expert checkpoints load with randomly initialised experts.
    fusing = get_checkpoint_conversion_mapping("deepseek_v3")
    assert fusing is not None, "transformers no longer maps deepseek_v3's experts"
    mapping = [PrefixChange(prefix_to_remove="language_model"), *fusing]
    register_checkpoint_conversion_mapping(MODEL_TYPE, mapping, overwrite=True)

    AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = Int4Config
    AUTO_QUANTIZER_MAPPING[METHOD] = PackedQuantizer

    peft_mapping.register()
    flex_attention.register()
    padded_sdpa.register()
    experts.register()
