"""What does a LoRA step on packed INT4 experts cost, against PEFT on the same experts dequantised?

One layer of routed experts with an adapter on both of its stacks, forward and backward: ours on INT4 weights, and PEFT's
`target_parameters` on the weights that these stand for. Both take turns (A B A B ...), and the median of the rounds
counts. Beside the time: what autograd keeps for the backward pass, weights aside, the weights themselves, and how far each
way's gradients are from PEFT's in float32 (their largest relative error, and least cosine, over the factors and the input).

What it gives up: attention and the rest of a layer, which are the same in both. A CPU without bfloat16 instructions
computes bfloat16 products at a hundredth of float32's speed: there PEFT's time in bfloat16 is mostly that, while packed
experts compute theirs in float32 and round once, so only the float32 ratio tells what the method saves.

On a busy machine run one thread (OMP_NUM_THREADS=1): then only its own time on the core is counted.

    python benchmarks/int4_lora.py [--experts 64] [--hidden 1024] [--intermediate 512] [--tokens 256 64]
        [--rank 16] [--dtypes bfloat16 float32] [--rounds 3]
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
import warnings
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from transformers_k2 import KimiK2Config, KimiK2ForCausalLM
from transformers_k2.quantization import cpu_kernel, int4
from transformers_k2.quantization.packed_experts import STACKS, PackedExperts

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
MIB = 1 << 20


def build(options: argparse.Namespace) -> tuple[nn.Module, nn.Module]:
    """A model of one layer with weights on the INT4 grid, and one with the same weights packed."""
    config = KimiK2Config(
        vocab_size=64,
        hidden_size=options.hidden,
        intermediate_size=64,
        moe_intermediate_size=options.intermediate,
        num_hidden_layers=1,
        first_k_dense_replace=0,
        num_attention_heads=2,
        n_routed_experts=options.experts,
        num_experts_per_tok=options.top_k,
        bos_token_id=0,
        eos_token_id=1,
    )
    dense: Any = KimiK2ForCausalLM(config)
    packed = PackedExperts(options.experts, options.hidden, options.intermediate)
    experts = dense.model.layers[0].mlp.experts
    with torch.no_grad():
        for name in STACKS:
            weight = experts.get_parameter(name)
            codes, scale = int4.quantize(weight.normal_(std=0.02))
            weight.copy_(int4.dequantize(codes, scale, torch.float32))
            packed.get_parameter(f"{name}_packed").copy_(int4.pack(codes))
            packed.get_parameter(f"{name}_scale").copy_(scale)
    if not cpu_kernel.available():  # as the loader does
        packed.use_kernel_form()
    dense.model.layers[0].mlp.experts = nn.Identity()
    other = copy.deepcopy(dense)
    dense.model.layers[0].mlp.experts, other.model.layers[0].mlp.experts = experts, packed
    dense.set_experts_implementation(options.implementation)
    return dense, other


def adapt(model: Any, rank: int) -> Any:
    """The layer's experts, with adapters that have been trained: B is not zero."""
    targets = [f"mlp.experts.{name}" for name in STACKS]
    with warnings.catch_warnings():
        # PEFT 0.21.2 reads a property that transformers 5.23 has renamed.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        adapted: Any = get_peft_model(model, LoraConfig(r=rank, lora_alpha=rank, target_parameters=targets))
    layer = adapted.base_model.model.model.layers[0].mlp.experts
    generator = torch.Generator().manual_seed(1)
    for parameter in layer.parameters():
        if parameter.requires_grad:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return layer


def step(layer: Any, hidden: Tensor, index: Tensor, weights: Tensor, direction: Tensor) -> list[Tensor]:
    """The gradients of the factors and of the input."""
    rows = hidden.clone().requires_grad_()
    factors = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    output = layer(rows, index, weights)
    return list(torch.autograd.grad(output, [*factors, rows], direction))


def kept(layer: nn.Module, hidden: Tensor, index: Tensor, weights: Tensor) -> int:
    """Bytes that autograd keeps for the backward pass, parameters aside."""
    parameters = {value.untyped_storage().data_ptr() for value in layer.parameters()}
    storages: dict[int, int] = {}

    def note(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(note, lambda value: value):
        output = layer(hidden.clone().requires_grad_(), index, weights)  # alive, or addresses are used again
    del output
    return sum(storages.values())


def agreement(found: list[Tensor], expected: list[Tensor]) -> str:
    """The largest relative error, the least cosine."""
    pairs = [
        (mine.double().flatten(), its.double().flatten()) for mine, its in zip(found, expected, strict=True)
    ]
    error = max(float((mine - its).norm() / its.norm()) for mine, its in pairs)
    cosine = min(float(torch.cosine_similarity(mine, its, 0)) for mine, its in pairs)
    return f"error {error:.1e}, cosine {cosine:.6f}"


def compare(layers: list[Any], inputs: tuple[Tensor, ...], expected: list[Tensor], rounds: int) -> str:
    """Print what each way costs; the ratios."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    times: list[list[float]] = [[] for _ in layers]
    for _ in range(rounds):
        for layer, taken in zip(layers, times, strict=True):
            start = clock()
            step(layer, *inputs)
            taken.append(clock() - start)
    medians = [statistics.median(taken) for taken in times]
    memory = [kept(layer, *inputs[:3]) for layer in layers]
    for what, layer, median, size in zip(("PEFT", "ours"), layers, medians, memory, strict=True):
        resident = sum(value.nbytes for value in layer.parameters() if not value.requires_grad)
        print(
            f"  {what}: {median:.3f} s a step, keeps {size / MIB:.1f} MiB, weights {resident / MIB:.0f} MiB; gradients "
            f"{agreement(step(layer, *inputs), expected)}"
        )
    return f"{medians[0] / medians[1]:.1f}x faster, keeps {memory[0] / memory[1]:.0f}x less"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--intermediate", type=int, default=512)
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 64])
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--implementation",
        default="grouped_mm",
        help="of the dequantised experts: eager, grouped_mm, k2 (grouped_mm)",
    )
    options = parser.parse_args()
    torch.manual_seed(0)
    layers = [adapt(model, options.rank) for model in build(options)]
    values = sum(value.numel() for value in layers[0].get_base_layer().parameters())
    print(
        f"{options.experts} experts of {options.hidden} x {options.intermediate} ({values / 1e6:.0f} M weights), rank "
        f"{options.rank}, each token to {options.top_k} experts, {torch.get_num_threads()} thread(s)"
    )
    sizes = options.tokens
    hidden = torch.randn(max(sizes), options.hidden)
    weights, index = torch.rand(max(sizes), options.experts).topk(options.top_k)
    direction = torch.randn(max(sizes), options.hidden)
    exact = [
        step(layers[0], *(each[:size] for each in (hidden, index, weights, direction))) for size in sizes
    ]
    ratios = []
    for name in sorted(options.dtypes, key=["float32", "bfloat16"].index):
        dtype = DTYPES[name]
        layers[0].get_base_layer().to(dtype)  # the factors stay float32, as PEFT has them
        for size, expected in zip(sizes, exact, strict=True):
            inputs = hidden[:size].to(dtype), index[:size], weights[:size], direction[:size].to(dtype)
            print(f"{name}, {size} tokens")
            ratios.append(f"{name}, {size} tokens: {compare(layers, inputs, expected, options.rounds)}")
    print("\n".join(ratios))


if __name__ == "__main__":
    main()
