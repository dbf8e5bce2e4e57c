"""A conversation that computes each token once: what the turns so far have in common with the next one stays cached.

`generate` starts over with every call, though a chat or an agent sends the same text with a little more at its end. A
session keeps the cache of latents and the ids it holds, cuts it back to the longest common prefix with what it is given, and
feeds only the rest. The ids returned are those of `model.generate` on the whole input, but for the last bits of the
arithmetic: tokens fed in other portions are summed in another order.

What this gives up: one conversation at a time (batches and beams share no prefix), and a change early in the history
recomputes all after it: MLA's latents depend on everything before them. It does not notice that the model's weights or its
active adapter changed: call `reset` then.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import Cache, GenerationMixin, PreTrainedConfig, PreTrainedTokenizerBase

from .checkpoint import read_header
from .files import replacing
from .latent_cache import Int8LatentLayer, LatentCache, LatentLayer, adopt

PREFILL_CHUNK = 4096
_FORMAT = "transformers_k2 session 1"
# What the latents of a token depend on, beside the weights.
_CONFIG_KEYS = (
    "vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers",
    "num_attention_heads", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim",
    "n_routed_experts", "n_shared_experts", "num_experts_per_tok", "n_group", "topk_group", "first_k_dense_replace",
    "norm_topk_prob", "routed_scaling_factor", "rms_norm_eps", "rope_parameters", "rope_interleave",
)  # fmt: skip
# Options of generate that a session needs as they are here: one sequence, with this cache.
_FIXED: dict[str, Any] = {
    "num_beams": 1,
    "num_return_sequences": 1,
    "use_cache": True,
    "token_healing": False,
    "cache_implementation": None,
}
_OWN = ("past_key_values", "inputs", "inputs_embeds", "position_ids")
# Between latents of the same tokens in two runs: rounding, other kernels, 8 bits. Other weights are about 1.4 away.
_SAME_WEIGHTS = 0.25


class Turn(NamedTuple):
    """What a call of `generate` did."""

    num_reused: int  # tokens of the prompt that were cached
    num_prefilled: int  # tokens of the prompt that were not
    num_generated: int
    prefill_seconds: float  # until the first of the new tokens could be chosen
    decode_seconds: float


class Reply(NamedTuple):
    """What `chat` returns: the new text without special tokens, and the new ids [n] with them."""

    text: str
    ids: Tensor


class GenerationSession:
    """`session.generate(ids)` again and again, each time on the whole conversation.

    Args:
        model: a causal language model with full attention in every layer, or a PEFT model around one.
        cache: None for latents as the model computes them, "int8" for 8 bits, or an empty LatentCache or DynamicCache.
        prefill_chunk_size: how many tokens a forward takes at most; None: all new ones at once.
        progress: show a bar while a prompt goes in chunks.

    Attributes:
        cache: belongs to the session; what a call returns as `past_key_values` is this cache, and changes with the next.
        last: statistics of the last call; None before it.

    Raises:
        ValueError: the model generates from an encoder, its layers do not all attend to everything, or the cache is
            static, quantised by another package or not empty.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        cache: Cache | Literal["int8"] | None = None,
        prefill_chunk_size: int | None = PREFILL_CHUNK,
        progress: bool = False,
    ) -> None:
        self.model = model
        self._generator = _generator(model)
        self.cache = _checked_cache(cache, self._generator.config.get_text_config(decoder=True))
        self.prefill_chunk_size = _checked_chunk(prefill_chunk_size)
        self.progress = progress
        self.last: Turn | None = None
        self._ids = torch.empty(0, dtype=torch.int64)  # of the tokens that every layer holds; on the CPU

    @property
    def num_cached_tokens(self) -> int:
        """How many tokens the cache holds."""
        return len(self._ids)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({type(self.model).__name__}, num_cached_tokens={self.num_cached_tokens})"
        )

    @torch.no_grad()
    def generate(self, input_ids: Tensor, **kwargs: Any) -> Any:
        """What `model.generate(input_ids, **kwargs)` returns, computed from the first token that is not cached.

        At least the last token of the prompt is fed again, because its logits are not kept. Hidden states and attentions,
        if asked for, are those of the tokens that were fed. After an error the session holds what was certain: at most
        the prompt.

        Args:
            input_ids: [1, n], everything from the conversation's start.
            kwargs: `model.generate`'s, such as `max_new_tokens`, `streamer`, `prompt_lookup_num_tokens`.

        Raises:
            ValueError: more than one sequence, beams, padding, or a cache among the options.
        """
        ids = self._checked_ids(input_ids, kwargs)
        chunk = _checked_chunk(kwargs.pop("prefill_chunk_size", self.prefill_chunk_size))
        num_reused = min(_common_prefix(self._ids, ids), len(ids) - 1)
        start = time.perf_counter()
        try:
            self._keep(num_reused)
            self._ids = ids
            self._prefill(num_reused, chunk)
            with _FirstForward(self._generator, self.cache, len(ids)) as first:
                generate: Any = self.model.generate
                outputs = generate(
                    input_ids=input_ids,
                    attention_mask=torch.ones_like(input_ids),
                    past_key_values=self.cache,
                    prefill_chunk_size=None,
                    **kwargs,
                )
        except BaseException:
            self._keep(len(ids))
            raise
        sequence = _sequences(outputs)[0].cpu()
        if self.cache.get_seq_length() >= len(sequence):
            num_cached = self.cache.get_seq_length()
            self.reset()
            raise ValueError(
                f"The cache holds {num_cached} tokens after a sequence of {len(sequence)}, expected fewer: an adapter that "
                f"adds tokens of its own cannot be told from the conversation."
            )
        self._ids = sequence
        self._keep(len(sequence))
        self.last = Turn(
            num_reused,
            len(ids) - num_reused,
            len(sequence) - len(ids),
            first.ended - start,
            time.perf_counter() - first.ended,
        )
        return outputs

    def chat(
        self,
        messages: list[dict[str, Any]],
        tokenizer: PreTrainedTokenizerBase,
        tools: list[Any] | None = None,
        template_options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Reply:
        """The assistant's next message, by the tokenizer's chat template.

        Append it to `messages` and call again: the tokens of all turns are found in the cache, the reply's too, as long as
        the template writes the message back as it was generated, and the tokenizer cuts it as the model did. The instruct
        template does: content and the text of a tool call's arguments stay as they are, so keep `arguments` the string that
        was generated. The thinking template drops the reasoning of a finished turn, by K2's format; all after it is then
        computed again (within a turn, however many tools it calls, nothing is).
        `template_options={"preserve_thinking": True}` keeps reasoning and cache.

        Args:
            messages: the whole conversation, as for `apply_chat_template`.
            tokenizer: the model's.
            tools: their JSON schemas.
            template_options: further options of `apply_chat_template`.
            kwargs: `model.generate`'s. It ends where generate ends: at the `eos_token_id`s of the generation config.
        """
        prompt: Any = tokenizer.apply_chat_template(
            messages,
            tools=tools,
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
            **(template_options or {}),
        )
        input_ids = prompt["input_ids"]
        if kwargs.get("stop_strings") is not None:
            kwargs["tokenizer"] = tokenizer
        new = _sequences(self.generate(input_ids, **kwargs))[0, input_ids.shape[1] :]
        return Reply(str(tokenizer.decode(new, skip_special_tokens=True)), new)

    def fork(self) -> GenerationSession:
        """An independent session that holds a copy of the same tokens, on the same model."""
        other = copy.copy(self)
        other.cache = copy.deepcopy(self.cache)
        return other

    def reset(self) -> None:
        """Forget all tokens."""
        self.cache.reset()
        self._ids = self._ids[:0]

    def save(self, path: str | Path) -> None:
        """Write the tokens and their latents to one safetensors file, which is complete or not there.

        Raises:
            ValueError: there is nothing to save.
        """
        if not self.num_cached_tokens:
            raise ValueError("The session holds 0 tokens, expected at least 1: generate before you save it.")
        tensors = {_name(*place): part.contiguous() for place, part in self._stored()}
        metadata = {"format": _FORMAT, "cache": self._kind, "config": json.dumps(self._fingerprint())}
        with replacing(path) as temporary:
            save_file(tensors | {"ids": self._ids}, temporary, metadata)

    @classmethod
    def load(
        cls,
        path: str | Path,
        model: nn.Module,
        *,
        prefill_chunk_size: int | None = PREFILL_CHUNK,
        progress: bool = False,
    ) -> GenerationSession:
        """The session that `save` wrote, on the model that computed it.

        The model is run on the first tokens, and its latents are compared with the file's: other weights are refused, a
        slightly different adapter cannot be told from rounding.

        Raises:
            ValueError: the file is no session, or that of a model with another shape, dtype, kind of layers or weights.
        """
        path = Path(path)
        _, metadata = read_header(path)
        if metadata.get("format") != _FORMAT:
            raise ValueError(
                f"{path} has format {metadata.get('format')!r}, expected {_FORMAT!r}: not a saved session."
            )
        kind = metadata["cache"]
        session = cls(
            model,
            cache="int8" if kind == "int8" else None,
            prefill_chunk_size=prefill_chunk_size,
            progress=progress,
        )
        saved, ours = json.loads(metadata["config"]), session._fingerprint()
        if saved != ours:
            differing = [
                f"{key} {saved.get(key)} (the model: {ours[key]})"
                for key in ours
                if saved.get(key) != ours[key]
            ]
            raise ValueError(f"{path} was saved by another model: {', '.join(differing)}.")
        session._restore(path)
        return session

    def _checked_ids(self, input_ids: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """[n] on the CPU; takes the mask, which is known, from the options."""
        if not isinstance(input_ids, Tensor):
            raise ValueError(f"input_ids is a {type(input_ids).__name__}, expected a tensor of shape (1, n).")
        if input_ids.dim() != 2 or input_ids.shape[0] != 1 or input_ids.shape[1] == 0:
            raise ValueError(
                f"input_ids has shape {tuple(input_ids.shape)}, expected (1, n): a session is one sequence."
            )
        mask = kwargs.pop("attention_mask", None)
        if mask is not None and (mask.shape != input_ids.shape or not bool((mask == 1).all())):
            raise ValueError(
                f"attention_mask has shape {tuple(mask.shape)} and sum {int(mask.sum())}, expected {tuple(input_ids.shape)} "
                f"and only ones: a session has no padding."
            )
        if given := [name for name in _OWN if kwargs.get(name) is not None]:
            raise ValueError(
                f"{', '.join(given)} was given, expected input_ids alone: the session has its own cache."
            )
        configs = kwargs.get("generation_config"), self._generator.generation_config
        for name, expected in _FIXED.items():
            values = [kwargs.get(name), *(getattr(config, name) for config in configs if config is not None)]
            value = next((value for value in values if value is not None), expected)
            if value != expected:
                raise ValueError(
                    f"{name} is {value!r}, expected {expected!r}: a session is one sequence with its own cache."
                )
        return input_ids[0].cpu()

    def _prefill(self, num_cached: int, chunk: int | None) -> None:
        """Feed all tokens but the last ones, at most a chunk, which `generate` feeds itself."""
        if chunk is None:
            return
        starts = range(num_cached, len(self._ids) - chunk, chunk)
        for start in tqdm(starts, desc="prefill", unit="chunk", disable=not (self.progress and starts)):
            ids = self._ids[None, start : start + chunk].to(self._generator.device)
            self._generator(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)

    def _keep(self, num_tokens: int) -> None:
        """Cut every layer back to so many tokens, or to those that all hold."""
        lengths = [layer.get_seq_length() for layer in self.cache.layers]
        num_tokens = min(num_tokens, *lengths)
        for layer, length in zip(self.cache.layers, lengths, strict=True):
            layer.crop(num_tokens - length)
        self._ids = self._ids[:num_tokens]

    @property
    def _kind(self) -> str:
        return "int8" if isinstance(self.cache.layers[0], Int8LatentLayer) else "auto"

    def _fingerprint(self) -> dict[str, Any]:
        config = self._generator.config.get_text_config(decoder=True).to_dict()
        return json.loads(json.dumps({key: config.get(key) for key in _CONFIG_KEYS}))

    def _stored(self) -> Iterator[tuple[tuple[int, int], Tensor]]:
        for index, layer in enumerate(self.cache.layers):
            for part, tensor in enumerate(layer.stored()):
                yield (index, part), tensor

    @torch.no_grad()
    def _restore(self, path: Path) -> None:
        tensors = load_file(path)
        ids = tensors.pop("ids")
        # Shows what each layer holds, where, and what it is for this model.
        probe = ids[None, :2].to(self._generator.device)
        self._generator(input_ids=probe, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        expected = {_name(*place) for place, _ in self._stored()}
        if expected != tensors.keys():
            raise ValueError(f"{path} holds {len(tensors)} tensors of latents, expected {len(expected)}.")
        errors = []
        for index, layer in enumerate(self.cache.layers):
            fresh = layer.latents(0, probe.shape[1])
            parts = [tensors[_name(index, part)] for part in range(len(layer.stored()))]
            if any(part.shape[-2] != len(ids) for part in parts):
                raise ValueError(
                    f"{path} holds {[part.shape[-2] for part in parts]} rows in layer {index}, expected {len(ids)}."
                )
            try:
                layer.restore(tuple(parts))
            except ValueError as error:
                raise ValueError(f"{path} does not fit layer {index} of this model: {error}") from error
            saved = layer.latents(0, probe.shape[1])
            difference = sum(
                (a.double() - b.double()).square().sum() for a, b in zip(fresh, saved, strict=True)
            )
            errors.append(difference / sum(part.double().square().sum() for part in fresh))
        error = torch.stack([error.cpu() for error in errors]).sqrt().median().item()
        if not error < _SAME_WEIGHTS:
            raise ValueError(
                f"{path} was saved by a model with other weights: latents of its first tokens are {error:.2g} away "
                f"(relative, median of the layers), expected less than {_SAME_WEIGHTS}."
            )
        self._ids = ids


class _FirstForward:
    """Watches `generate` for its first forward with the session's cache: when it ends, and what it is given.

    Assisted decoding feeds the whole prompt then, though a part is cached (transformers' other loops leave that out).
    """

    def __init__(self, generator: Any, cache: Cache, num_tokens: int) -> None:
        self.ended = 0.0
        self._generator, self._cache, self._num_tokens = generator, cache, num_tokens
        self._handles: list[Any] = []

    def __enter__(self) -> _FirstForward:
        self._handles = [
            self._generator.register_forward_pre_hook(self._before, with_kwargs=True),
            self._generator.register_forward_hook(self._after, with_kwargs=True),
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # An assistant can be the same model, with a cache of its own.
        if self.ended or kwargs.get("past_key_values") is not self._cache:
            return None
        num_cached, ids = self._cache.get_seq_length(), kwargs["input_ids"]
        if num_cached == 0 or ids.shape[1] < self._num_tokens:
            return None
        sliced = {
            name: kwargs[name][..., num_cached:]
            for name in ("input_ids", "position_ids")
            if kwargs.get(name) is not None
        }
        return args, kwargs | sliced

    def _after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if not self.ended and kwargs.get("past_key_values") is self._cache:
            if self._generator.device.type != "cpu":
                torch.accelerator.synchronize()
            self.ended = time.perf_counter()


def _generator(model: nn.Module) -> Any:
    """The transformers model: the given one, or what an adapter is wrapped around."""
    for module in model.modules():
        if isinstance(module, GenerationMixin):
            if module.config.is_encoder_decoder:
                raise ValueError(
                    f"{type(module).__name__} has an encoder, expected a model that is only a decoder."
                )
            return module
    raise ValueError(
        f"{type(model).__name__} cannot generate, expected a causal language model of transformers."
    )


def _checked_cache(cache: Cache | str | None, config: PreTrainedConfig) -> Cache:
    if cache is None or cache == "int8":
        return LatentCache(config, dtype="auto" if cache is None else "int8")
    if not isinstance(cache, Cache):
        raise ValueError(f"cache is {cache!r}, expected None, 'int8' or a LatentCache.")
    adopt(cache)
    if cache.layer_class_to_replicate is not None:
        # So that a forward that fails in its middle shows in the layers' lengths.
        cache.layers += [
            cache.layer_class_to_replicate() for _ in range(len(cache), config.num_hidden_layers)
        ]
    others = {type(layer).__name__ for layer in cache.layers if not isinstance(layer, LatentLayer)}
    if others or cache.get_seq_length():
        raise ValueError(
            f"cache is a {type(cache).__name__} of {cache.get_seq_length()} tokens with layers {sorted(others)}, "
            f"expected an empty LatentCache or DynamicCache with full attention in every layer."
        )
    return cache


def _checked_chunk(size: int | None) -> int | None:
    if size is not None and size < 1:
        raise ValueError(f"prefill_chunk_size is {size}, expected None or at least 1.")
    return size


def _common_prefix(a: Tensor, b: Tensor) -> int:
    length = min(len(a), len(b))
    differing = (a[:length] != b[:length]).nonzero()
    return int(differing[0]) if len(differing) else length


def _sequences(outputs: Any) -> Tensor:
    return outputs if isinstance(outputs, Tensor) else outputs.sequences


def _name(layer: int, part: int) -> str:
    return f"layers.{layer}.{part}"
