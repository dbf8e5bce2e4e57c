"""Generation over pipeline stages: several machines hold one model that none of them could hold alone.

Every process loads the layers of its own stage and calls `generate` with the same arguments. Each runs transformers' own
loop on the same token ids, so that all of generate's features work unchanged; only `forward` is different: hidden states
go from stage to stage, and the last stage's logits to all. To `generate`, to caches and to masks a stage is a smaller
model: its configuration counts its own layers, its cache holds their latents and nothing else. Rows of a long prompt go
through the stages in chunks, so that all stages work at once.

What it gives up: while one token is decoded, one stage works and the others wait, so a second machine adds memory, and
speed only to prompts; training, which is pipeline.py's; and saving, because no process has the whole model.

    torchrun --nproc-per-node 1 ... -m transformers_k2.parallel.stages CHECKPOINT --prompt TEXT
"""

from __future__ import annotations

import argparse
import copy
import os
import re
import sys
import time
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from transformers import AutoTokenizer, GenerationConfig, TextStreamer
from transformers.generation import StoppingCriteriaList
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from .. import few_tokens
from ..configuration_kimi_k2 import KimiK2Config
from ..lazy_tensors import DTYPES
from ..loading import resolve_config
from ..manifest import expected_tensors
from ..modeling_kimi_k2 import KimiK2ForCausalLM
from ..quantization.hf_quantizer import METHOD
from .model import Elsewhere

PREFILL_CHUNK = 512  # rows enough for matrix products at full speed, and few enough that no stage waits long
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_ONLY_LOGITS = ("output_attentions", "output_hidden_states", "output_router_logits")


@dataclass(frozen=True)
class Stage:
    """Which layers this process has, and how it speaks to the others; tensors travel through host memory.

    Attributes:
        rank: of this process in `group`, and the number of its stage.
        split: layers of every stage, in order.
        group: the processes of all stages; None: torch's default group.
    """

    rank: int
    split: tuple[int, ...]
    group: ProcessGroup | None = None

    @property
    def layers(self) -> range:
        """Numbers of the layers of this stage in the whole model."""
        start = sum(self.split[: self.rank])
        return range(start, start + self.split[self.rank])

    @property
    def is_first(self) -> bool:
        """Whether this stage has the embedding."""
        return self.rank == 0

    @property
    def is_last(self) -> bool:
        """Whether this stage has the head."""
        return self.rank == len(self.split) - 1

    def expect(self, shape: Sequence[int], dtype: torch.dtype) -> tuple[Tensor, dist.Work]:
        """A tensor that the stage before is going to fill; wait for the second value before reading it."""
        arriving = torch.empty(*shape, dtype=dtype)
        return arriving, _started(dist.irecv(arriving, group=self.group, group_src=self.rank - 1))

    def send(self, tensor: Tensor) -> tuple[Tensor, dist.Work]:
        """Start to send to the stage behind; keep the first value until the second one has been waited for."""
        leaving = tensor.detach().cpu().contiguous()
        return leaving, _started(dist.isend(leaving, group=self.group, group_dst=self.rank + 1))

    def broadcast(self, tensor: Tensor, source: int) -> Tensor:
        """The `source` stage's tensor, of the same shape and dtype everywhere, on the device of this one's."""
        shared = tensor.detach().cpu().contiguous()
        dist.broadcast(shared, group=self.group, group_src=source)
        return shared.to(tensor.device)

    def agree(self, what: str, values: Mapping[str, str]) -> None:
        """Compare what every process was given.

        Raises:
            ValueError: on all of them if one has another value than stage 0; with both.
        """
        given: list[dict[str, str]] = [{} for _ in self.split]
        dist.all_gather_object(given, dict(values), group=self.group)
        for rank, other in enumerate(given):
            for name in sorted(given[0].keys() | other.keys()):
                first, second = given[0].get(name, "nothing"), other.get(name, "nothing")
                if first != second:
                    raise ValueError(
                        f"{what}: {name} is {second} on rank {rank}, but {first} on rank 0: expected the same on every rank."
                    )


class _Numbered(nn.ModuleList):
    """Layers of one stage: a list to those who use them, and in their names the numbers of the whole model."""

    def __init__(self, layers: Iterable[nn.Module], numbers: Iterable[int]) -> None:
        super().__init__()
        for number, layer in zip(numbers, layers, strict=True):
            self.add_module(str(number), layer)

    def __getitem__(self, index: Any) -> Any:
        return list(self._modules.values())[index]


class _FirstStageDecides(StoppingCriteriaList):
    """What ends a row: stage 0's word counts everywhere, because clocks and users' own criteria may differ.

    Raises:
        RuntimeError: this process went on with other tokens than stage 0.
    """

    def __init__(self, criteria: Iterable[Any], stage: Stage) -> None:
        super().__init__(criteria)
        self.stage = stage

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        """Token ids [rows, length] -> which rows have ended, bool [rows]."""
        ended = super().__call__(input_ids, scores, **kwargs)
        mine = torch.cat([ended.long().cpu(), torch.tensor([_checksum(input_ids[:, -64:])])])
        first = self.stage.broadcast(mine, 0)
        if first[-1] != mine[-1]:
            raise RuntimeError(
                f"Stage {self.stage.rank} went on with other tokens than stage 0 after {input_ids.shape[1]}: expected every "
                "machine to choose the same from the same logits; do all of them run the same version of torch?"
            )
        return first[:-1].bool().to(ended.device)


class KimiK2StageForCausalLM(KimiK2ForCausalLM):
    """One stage's layers, which together with the other processes are a KimiK2ForCausalLM; for inference only.

    Use `load_stage`. `forward` and `generate` are collective: every process calls them, with the same arguments.

    Args:
        config: of the whole model.
        stage: which part of it this is.

    Raises:
        ValueError: the head's weights are the embedding's.

    Attributes:
        prefill_chunk: tokens a row that go through the stages together when a forward with a cache has more.
    """

    prefill_chunk: int = PREFILL_CHUNK

    def __init__(self, config: KimiK2Config, stage: Stage) -> None:
        if config.tie_word_embeddings:
            raise ValueError(
                "tie_word_embeddings is True: expected False, as in K2; first and last stage share no weight."
            )
        own = copy.deepcopy(config)
        own.num_hidden_layers = len(stage.layers)
        dense = (config.first_k_dense_replace or 0) - stage.layers.start
        own.first_k_dense_replace = min(max(dense, 0), len(stage.layers))
        super().__init__(own)
        self.stage = stage
        self.model.layers = _Numbered(self.model.layers, stage.layers)
        if not stage.is_first:
            self.model.embed_tokens = Elsewhere()
        if not stage.is_last:
            self.model.norm = Elsewhere()
            self.lm_head = Elsewhere()
        # What the others hold is no surprise in a checkpoint; layers that the whole model lacks still are.
        others = [number for number in range(config.num_hidden_layers) if number not in stage.layers]
        self._keys_to_ignore_on_load_unexpected = {
            *(self._keys_to_ignore_on_load_unexpected or ()),
            *(rf"^(language_model\.)?(model\.)?layers\.{number}\." for number in others),
            r"^(language_model\.)?((model\.)?(embed_tokens|norm)|lm_head)\.",
        }

    @torch.no_grad()
    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:
        """As the whole model's: ids [batch, sequence] -> logits [batch, kept, vocab] and this stage's cache.

        Raises:
            ValueError: no tokens, labels, or a wish for outputs of layers that other processes have.
        """
        if refused := [name for name in _ONLY_LOGITS if kwargs.get(name)] + ["labels"] * (labels is not None):
            raise ValueError(f"{refused[0]} is given to a pipeline stage: expected a call for logits only.")
        stage, name = self.stage, "input_ids" if inputs_embeds is None else "inputs_embeds"
        given = input_ids if inputs_embeds is None else inputs_embeds
        if given is None or given.shape[1] == 0:
            raise ValueError("A pipeline stage was given no tokens: expected input_ids or inputs_embeds.")
        rows, length = given.shape[:2]
        size = self.prefill_chunk if _can_be_cut(attention_mask, past_key_values) else length
        chunks = [*pairwise([*range(0, length, size), length])]
        shapes = [(rows, end - start, self.config.hidden_size) for start, end in chunks]
        arriving = None if stage.is_first else stage.expect(shapes[0], self.dtype)
        leaving: tuple[Tensor, dist.Work] | None = None
        states: list[Tensor] = []
        for number, (start, end) in enumerate(chunks):
            inputs = {name: given[:, start:end]}
            if arriving is not None:
                received, work = arriving
                work.wait()
                inputs = {"inputs_embeds": received.to(self.device)}
                arriving = stage.expect(shapes[number + 1], self.dtype) if number + 1 < len(shapes) else None
            outputs = self.model(
                **inputs,
                attention_mask=_mask_of(attention_mask, start, end, length),
                position_ids=None if position_ids is None else position_ids[..., start:end],
                past_key_values=past_key_values,
                use_cache=use_cache,
                **kwargs,
            )
            past_key_values = outputs.past_key_values
            if stage.is_last:
                states.append(outputs.last_hidden_state)
                continue
            if leaving is not None:
                leaving[1].wait()
            leaving = stage.send(outputs.last_hidden_state)
        if leaving is not None:
            leaving[1].wait()
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        if stage.is_last:
            with few_tokens.kernels(given, past_key_values):
                logits = self.lm_head(torch.cat(states, dim=1)[:, kept])
        else:
            num_kept = torch.empty(1, length, 0, device=self.device)[:, kept].shape[1]
            logits = torch.empty(rows, num_kept, self.vocab_size, dtype=self.dtype, device=self.device)
        logits = stage.broadcast(logits, len(stage.split) - 1)
        return MoeCausalLMOutputWithPast(logits=logits, past_key_values=past_key_values)

    def generate(self, inputs: Tensor | None = None, **kwargs: Any) -> Any:
        """As transformers' generate, called alike on every rank; only `streamer` may be one rank's own.

        Sampling continues stage 0's random numbers on every rank, so one process with its seed samples the same.
        `prefill_chunk_size` is how many tokens of a row go through the stages together.

        Raises:
            ValueError: the ranks were given different arguments; both are named.
        """
        values = {name: _describe(value) for name, value in kwargs.items() if name != "streamer"}
        values |= {
            "inputs": _describe(inputs),
            "the model's generation_config": _describe(self.generation_config),
        }
        self.stage.agree("generate", values)
        random: Any = torch if self.device.type == "cpu" else torch.get_device_module(self.device)
        random.set_rng_state(self.stage.broadcast(random.get_rng_state(), 0))
        chunk = kwargs.pop("prefill_chunk_size", None)
        usual, self.prefill_chunk = self.prefill_chunk, chunk or self.prefill_chunk
        try:
            return super().generate(inputs, **kwargs)
        finally:
            self.prefill_chunk = usual

    def _get_stopping_criteria(self, *args: Any, **kwargs: Any) -> StoppingCriteriaList:
        """generate's own criteria and the user's, with one answer for all ranks."""
        return _FirstStageDecides(super()._get_stopping_criteria(*args, **kwargs), self.stage)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Refused.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"A pipeline stage cannot be saved to {save_directory}: it has {len(self.stage.layers)} of "
            f"{sum(self.stage.split)} layers; load the whole checkpoint with KimiK2ForCausalLM instead."
        )


def load_stage(
    path: str | os.PathLike,
    process_group: ProcessGroup | None = None,
    split: Sequence[int] | None = None,
    prefill_chunk: int = PREFILL_CHUNK,
    **kwargs: Any,
) -> KimiK2StageForCausalLM:
    """This process's stage of a checkpoint in any published form; the weights of other stages are not read.

    Collective over the group: stage n is its rank n. A hub name downloads the whole checkpoint on each machine.

    Args:
        path: a folder or a hub name; every process may have a copy of its own.
        process_group: carries tensors of the CPU (gloo, or "cpu:gloo,cuda:nccl"); None: torch's default group. When a
            process dies or a machine falls silent, the others raise: at once if the connection was closed, else after the
            group's timeout, which must be longer than any stage works on a prompt or loads (30 minutes unless set).
        split: layers of every stage; None: so that the largest stage has as few bytes as possible.
        prefill_chunk: tokens of a row that go through the stages together.
        kwargs: of `KimiK2ForCausalLM.from_pretrained`, such as `dtype`, `device_map` and `quantization_config`.

    Raises:
        ValueError: no process group, more processes than layers, a split that does not add up, or another checkpoint,
            split or dtype on another process.
    """
    if not dist.is_initialized():
        raise ValueError(
            "load_stage needs the processes of all stages: start them with torchrun, and call "
            'torch.distributed.init_process_group("gloo") first.'
        )
    if type(prefill_chunk) is not int or prefill_chunk < 1:
        raise ValueError(f"prefill_chunk is {prefill_chunk!r}: expected a number of tokens >= 1.")
    config = resolve_config(KimiK2StageForCausalLM, path, kwargs.pop("config", None), kwargs)
    num_stages = dist.get_world_size(process_group)
    if split is None:
        split = even_split(stage_bytes(config, kwargs), num_stages)
    _check_split(split, config.num_hidden_layers, num_stages)
    stage = Stage(dist.get_rank(process_group), tuple(split), process_group)
    told = {
        "config.json": _describe(config.to_json_string()),
        "split": str(stage.split),
        "prefill_chunk": str(prefill_chunk),
    }
    stage.agree("load_stage", told)
    model = KimiK2StageForCausalLM.from_pretrained(path, stage, config=config, **kwargs)
    model.prefill_chunk = prefill_chunk
    stage.agree("load_stage", {"dtype": str(model.dtype)})
    return model


def stage_bytes(config: KimiK2Config, kwargs: Mapping[str, Any] | None = None) -> list[int]:
    """Bytes of every layer's weights in memory; the embedding counts with the first, norm and head with the last.

    Args:
        config: of the whole model, with the checkpoint's quantization_config.
        kwargs: of `from_pretrained`; `quantization_config` and `dequantize` are looked at.
    """
    kwargs = kwargs or {}
    hub = config.to_hub_dict()
    asked = kwargs.get("quantization_config") or hub.get("quantization_config")
    asked = asked if isinstance(asked, dict | None) else {"quant_method": asked.quant_method}
    packed = (asked or {}).get("quant_method") in (METHOD, "compressed-tensors") and not kwargs.get(
        "dequantize"
    )
    sizes = [0] * config.num_hidden_layers
    for name, (shape, dtype) in expected_tensors(hub, "int4" if packed else "none").items():
        layer = int(match[1]) if (match := _LAYER.match(name)) else -1
        if layer < len(sizes):  # no extra prediction layers
            place = 0 if name.startswith("model.embed_tokens.") else layer
            sizes[place] += torch.Size(shape).numel() * DTYPES[dtype].itemsize
    return sizes


def even_split(sizes: Sequence[int], num_stages: int) -> tuple[int, ...]:
    """How many consecutive layers each stage gets, so that the largest stage is as small as possible.

    Args:
        sizes: of `stage_bytes`.

    Raises:
        ValueError: more stages than layers.
    """
    if num_stages > len(sizes):
        raise ValueError(
            f"{num_stages} processes run, but the model has {len(sizes)} layers: expected at most one each."
        )
    ends = [0, *accumulate(sizes)]
    # best[n]: the largest stage, and the numbers of layers, of the first n layers over as many stages as were added.
    best: list[tuple[int, tuple[int, ...]]] = [(end, (number,)) for number, end in enumerate(ends)]
    for stages in range(2, num_stages + 1):
        best = [
            min(
                (
                    (max(best[cut][0], ends[number] - ends[cut]), (*best[cut][1], number - cut))
                    for cut in range(stages - 1, number)
                ),
                default=(0, ()),
            )
            for number in range(len(ends))
        ]
    return best[-1][1]


def _check_split(split: Sequence[int], num_layers: int, num_stages: int) -> None:
    problem = None
    if len(split) != num_stages:
        problem = (
            f"has {len(split)} stages, but {num_stages} processes run: expected a number of layers for each"
        )
    elif any(type(count) is not int or count < 1 for count in split):
        problem = "has a stage without layers: expected at least one in each"
    elif sum(split) != num_layers:
        problem = f"has {sum(split)} layers, but the model has {num_layers}: expected all of them, once"
    if problem:
        raise ValueError(f"split {tuple(split)} {problem}.")


def _can_be_cut(mask: Any, cache: Any) -> bool:
    """Whether tokens may go through the layers chunk by chunk: a cache hands over what came before."""
    if cache is None:
        return False
    # A 4D mask has one column for each place in a cache of fixed length; in another one it grows with the chunks.
    return mask is None or (isinstance(mask, Tensor) and (mask.ndim == 2 or cache.is_compileable))


def _mask_of(mask: Any, start: int, end: int, length: int) -> Any:
    """The part of an attention mask for tokens `start` to `end` of the `length` ones of a forward."""
    if not isinstance(mask, Tensor):
        return mask
    return mask[:, :, start:end] if mask.ndim == 4 else mask[:, : mask.shape[1] - length + end]


def _started(work: dist.Work | None) -> dist.Work:
    assert work is not None  # torch: on ranks outside of the group
    return work


def _checksum(tensor: Tensor) -> int:
    return zlib.crc32(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())


def _describe(value: Any) -> str:
    """A value of an argument in a few words, the same on two ranks if and only if the values are (objects: their types)."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)} with checksum {_checksum(value):08x}"
    if isinstance(value, GenerationConfig):
        value = value.to_json_string()
    if isinstance(value, str) and len(value) > 60:
        return f"a text with checksum {zlib.crc32(value.encode()):08x}"
    simple = value is None or isinstance(value, bool | int | float | str)
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_describe, value))}]"
    return repr(value) if simple else type(value).__name__


_HELP = """\
Generate with a checkpoint that is spread over several machines. Start the same command on each of them; rank 0 prints.

  two machines, 10.0.0.1 being the first (its firewall open for the second):
    torchrun --nnodes 2 --node-rank 0 --nproc-per-node 1 --master-addr 10.0.0.1 --master-port 29500 \\
        -m transformers_k2.parallel.stages /models/Kimi-K2-Thinking --prompt "Why is the sky blue?" --chat
    torchrun --nnodes 2 --node-rank 1 ...the rest as above

  two processes on one machine, to try it:
    torchrun --nproc-per-node 2 -m transformers_k2.parallel.stages CHECKPOINT --prompt "..."

GLOO_SOCKET_IFNAME=eth0 chooses the network interface, OMP_NUM_THREADS=32 (torchrun sets 1) the CPU threads of a process.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """The command of this module; see its --help."""
    parser = argparse.ArgumentParser(
        prog="torchrun ... -m transformers_k2.parallel.stages",
        description=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", help="a folder, which every machine has at this path, or a hub name")
    parser.add_argument(
        "--prompt", required=True, help="the text to continue, or with --chat the user's message"
    )
    parser.add_argument(
        "--chat", action="store_true", help="put the prompt into the checkpoint's chat template"
    )
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="0 takes the likeliest token (default)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of sampling (default: %(default)s)")
    parser.add_argument("--split", metavar="30,31", help="layers of every stage; by default even in bytes")
    parser.add_argument("--dtype", default="auto", help="of weights that are not packed, such as bfloat16")
    parser.add_argument(
        "--prefill-chunk", type=int, default=PREFILL_CHUNK, metavar="N",
        help="tokens of the prompt that go through the stages together (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--timeout", type=float, default=1800.0, metavar="SECONDS",
        help="how long to wait for another machine before giving up; loading counts (default: %(default)s)",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    if "RANK" not in os.environ:
        parser.error("start it with torchrun, which tells the processes of each other; see --help")
    try:
        split = None if options.split is None else [int(count) for count in options.split.split(",")]
    except ValueError:
        parser.error(f"--split is {options.split!r}: expected numbers of layers, as 30,31")
    if not options.temperature >= 0:
        parser.error(f"--temperature is {options.temperature}: expected 0 or more")
    if not options.prompt:
        parser.error("--prompt is empty: expected a text")
    dist.init_process_group("gloo", timeout=timedelta(seconds=options.timeout))
    try:
        _run(options, split)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    finally:
        dist.destroy_process_group()


def _run(options: argparse.Namespace, split: list[int] | None) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(options.checkpoint)
    model = load_stage(options.checkpoint, None, split, options.prefill_chunk, dtype=options.dtype)
    layers, held = model.stage.layers, sum(weight.nbytes for weight in model.parameters())
    print(
        f"stage {model.stage.rank}: layers {layers.start} to {layers.stop - 1}, {held / 1e9:,.2f} GB of weights",
        file=sys.stderr,
    )
    if options.chat:
        message = [{"role": "user", "content": options.prompt}]
        inputs = tokenizer.apply_chat_template(
            message, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        inputs = tokenizer(options.prompt, return_tensors="pt")
    inputs = {name: inputs[name].to(model.device) for name in ("input_ids", "attention_mask")}
    sampling: dict[str, Any] = {"do_sample": options.temperature > 0}
    if options.temperature > 0:
        sampling["temperature"] = options.temperature
    torch.manual_seed(options.seed)
    streamer = TextStreamer(tokenizer, skip_prompt=True) if model.stage.is_first else None
    started = time.perf_counter()
    tokens = model.generate(**inputs, **sampling, max_new_tokens=options.max_new_tokens, streamer=streamer)
    if model.stage.is_first:
        seconds, count = time.perf_counter() - started, tokens.shape[1] - inputs["input_ids"].shape[1]
        print(
            f"{count} tokens in {seconds:.1f} s, with a prompt of {inputs['input_ids'].shape[1]}",
            file=sys.stderr,
        )


if __name__ == "__main__":
    main()
