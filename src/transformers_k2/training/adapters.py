"""What a recipe's `adapter` and `quantization` sections do to a model: LoRA through PEFT, a 4-bit base, INT4 training.

PEFT and bitsandbytes are imported where they are used: neither is needed by a recipe without these sections, and they
take seconds. What it gives up: adapters and 4-bit weights in pipelines, 4-bit weights that are sharded, and adapters on
routed experts where those are sharded or trained for INT4; each is an error before training.
"""

from __future__ import annotations

import hashlib
import importlib.util
import math
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from ..configuration_kimi_k2 import KimiK2Config
from ..parallel import Layout
from ..parallel.model import Elsewhere
from ..peft_mapping import resolve
from ..quantization import qat
from ..quantization.hf_quantizer import Int4Config
from ..quantization.targets import find_targets
from .recipe import NF4, Int4

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

_FUSED = (".gate_up_proj", ".down_proj")


class AdapterOptions(Protocol):
    """A recipe's adapter section."""

    @property
    def rank(self) -> int: ...
    @property
    def alpha(self) -> float: ...
    @property
    def dropout(self) -> float: ...
    @property
    def targets(self) -> list[str]: ...


class QATOptions(Protocol):
    """A recipe's quantization section, method int4_qat."""

    @property
    def targets(self) -> list[str]: ...
    @property
    def ignore(self) -> list[str]: ...
    @property
    def group_size(self) -> int: ...
    @property
    def convention(self) -> str: ...


def add_adapter(
    model: PreTrainedModel, section: AdapterOptions, seed: int, base: str | os.PathLike | None = None
) -> PeftModel:
    """Freeze a model and put LoRA on the projections that a recipe names.

    The factors are float32, whatever the dtype of the base. Each is drawn from `seed` and its name alone: on any number of
    processes, and whatever else is adapted, they are the same. On a model whose weights are sharded every rank holds the
    whole adapter; its gradients are averaged over all ranks as they arise (FSDP2 does so for its own weights only).

    Args:
        model: as `build_model` or `load_quantised` made it. It becomes part of what is returned.
        section: rank, alpha, dropout, and targets in the meaning of peft_mapping.py; ["all-linear"] is that word of PEFT's.
        base: folder or hub name of the frozen weights, to be written into the saved adapter. None: they are nowhere, and
            who loads the adapter has to bring them.

    Raises:
        ValueError: a target matches nothing; a model in pipeline stages or trained for INT4; routed experts that are
            sharded; PEFT is not installed.
    """
    _demand_package("peft", "An adapter", "train")
    from peft import LoraConfig, get_peft_model

    if any(isinstance(module, Elsewhere) for module in model.modules()):
        raise ValueError("An adapter needs every layer on every rank: expected parallel.pipeline 1.")
    if qat.is_prepared(model):
        raise ValueError(
            "quantization.method is 'int4_qat', which trains routed experts, and an adapter freezes them: expected one of "
            "the two sections to be null."
        )
    targets: Any = "all-linear" if list(section.targets) == ["all-linear"] else list(section.targets)
    config: Any = LoraConfig(
        r=section.rank,
        lora_alpha=section.alpha,  # type: ignore[arg-type]
        lora_dropout=section.dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    resolve(config, model)
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        _demand_no_routed_experts(config, section.targets)
    with _without_renaming_warning():
        adapted: Any = get_peft_model(model, config)
    adapted.peft_config["default"].base_model_name_or_path = None if base is None else os.fspath(base)
    _draw(adapted, seed)
    if dist.is_initialized() and any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(_average_gradient)
    return adapted


def _demand_no_routed_experts(config: Any, targets: list[str]) -> None:
    if any(f".{name}".endswith(_FUSED) for name in config.target_parameters or ()):
        raise ValueError(
            f"adapter.targets {targets} include the routed experts, which PEFT cannot adapt where weights are sharded: "
            "leave out gate_proj, up_proj, down_proj and all-linear; shared_experts.gate_proj, shared_experts.up_proj and "
            "shared_experts.down_proj mean the shared experts alone; or set parallel.shard to 1."
        )


def _draw(model: nn.Module, seed: int) -> None:
    """PEFT's default: A as torch draws a linear layer's weight, B zero, so that nothing changes at first."""
    for name, parameter in model.named_parameters():
        if ".lora_A." in name:
            digest = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
            values = torch.empty(parameter.shape)
            nn.init.kaiming_uniform_(values, a=math.sqrt(5), generator=generator)
            parameter.data.copy_(values)
        elif ".lora_" in name:
            assert not parameter.any()


def _average_gradient(parameter: Tensor) -> None:
    """With accumulation too: what was averaged before is the same on every rank."""
    assert parameter.grad is not None
    dist.all_reduce(parameter.grad)
    parameter.grad /= dist.get_world_size()


def save_adapter(model: PeftModel, folder: str | os.PathLike) -> None:
    """Write adapter_model.safetensors and adapter_config.json, which plain PEFT loads; rank 0 writes.

    The base is not written; adapter_config.json names it. On a base that was quantised for training the saved adapter
    computes what it computed in training if the base is quantised in the same way, and nearly so if not.
    """
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    rank = dist.get_rank() if dist.is_initialized() else 0
    # "auto" would ask the hub whether the vocabulary has grown.
    model.save_pretrained(
        str(path),
        # Of the whole state dict, packed experts would make a copy.
        state_dict={name: value.detach() for name, value in model.named_parameters() if ".lora_" in name},
        save_embedding_layers=False,
        is_main_process=rank == 0,
    )


def load_adapter(model: PreTrainedModel, folder: str | os.PathLike) -> PeftModel:
    """The model with an adapter that `save_adapter` wrote."""
    from peft import PeftModel

    with _without_renaming_warning():
        return PeftModel.from_pretrained(model, os.fspath(folder))


@contextmanager
def _without_renaming_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        # PEFT 0.21.2 reads a property that transformers 5.23 has renamed.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


def load_quantised(
    folder: str | os.PathLike,
    config: KimiK2Config,
    layout: Layout,
    section: Int4 | NF4,
    dtype: torch.dtype = torch.float32,
    compute_dtype: torch.dtype | None = None,
) -> PreTrainedModel:
    """A frozen base whose routed experts are INT4, from files in any codec; INT4 files keep their codes.

    With method nf4 the linear layers of attention, dense layers and shared experts are bitsandbytes' 4-bit NormalFloat
    (arXiv 2305.14314), quantised one at a time as they are read. Embeddings, head, router and norms stay in `dtype`:
    transformers computes norms in float32 already, and a float32 gain would make bfloat16 activations float32.

    Args:
        folder: a checkpoint in the hub's layout.
        config: of the model; what it says of quantisation is not asked.
        layout: copies of the model are allowed, shards and stages are not.
        section: method, `group_size` of the experts, and for nf4 `double_quant`.
        dtype: of everything that is not quantised.
        compute_dtype: of the products with NF4 weights; `dtype` if None. They do not follow autocast.

    Raises:
        ValueError: the layout splits the model, bitsandbytes is not installed, or the groups do not fit the experts.
    """
    if layout.splits_the_model:
        raise ValueError(
            f"quantization.method is {section.method!r}, whose packed weights cannot be split, but parallel has shard "
            f"{layout.shard} and pipeline {layout.pipeline}: expected 1 and 1 (every process then holds a copy)."
        )
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder,
        config=config,
        quantization_config=Int4Config(section.group_size, linear=_linear(section, compute_dtype or dtype)),
        dtype=dtype,
        device_map={"": torch.cuda.current_device() if torch.cuda.is_available() else "cpu"},
    )
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            # On CPUs with bfloat16 products the first evaluation would repack the weights into a form without a gradient.
            module.support_avx512bf16_for_cpu = False
    return model.requires_grad_(False)


def _linear(section: Int4 | NF4, compute_dtype: torch.dtype) -> BitsAndBytesConfig | None:
    if not isinstance(section, NF4):
        return None
    _demand_package("bitsandbytes", "quantization.method 'nf4'", "quant")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=section.double_quant,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def start_qat(model: nn.Module, section: QATOptions) -> None:
    """Train on the INT4 grid from the next forward on; see quantization/qat.py.

    A stage of a pipeline prepares what it has of the weights that the patterns choose in the whole model.

    Raises:
        ValueError: a pattern that matches nothing, or groups that do not divide the inputs.
    """
    targets, ignore = section.targets, section.ignore
    if any(isinstance(module, Elsewhere) for module in model.modules()):
        with torch.device("meta"):
            whole = type(model)(model.config)
        here = dict(model.named_modules())
        chosen = find_targets(whole, targets, ignore)
        targets, ignore = [target.aliases[-1] for target in chosen if target.path in here], []
        if not targets:
            return
    qat.prepare_qat(model, section.group_size, targets, section.convention, ignore)


def _demand_package(name: str, what: str, extra: str) -> None:
    if importlib.util.find_spec(name) is None:
        raise ValueError(
            f"{what} needs {name}, which is not installed: pip install 'transformers_k2[{extra}]'."
        )
