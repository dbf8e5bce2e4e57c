"""Selective recomputation by name, as the Kimi K2 report has it (arXiv 2507.20534, section 2.4), and CPU offload.

Checkpointing a norm frees nothing: the linear layer behind it saves the norm's output. So it is the output that has to
go. While the model's forward runs, a dispatch mode notes for the tensors made inside the chosen modules how they were
made: the operation and its arguments. Where autograd, or a custom function, then saves such a tensor or a view of it, a
saved-tensor hook keeps the note instead. In the backward pass the note is worked off once, for all that ask, out of the
same operations on the same values: the gradients are equal bit for bit. Cheap operations on noted tensors (casts,
concatenations, rotations: CHEAP) are noted too, so that with `mla_up` the queries, keys and values which attention saves
come from the latents again. Arguments that are not noted themselves are kept, and watched: changing one in place before
the backward pass is an error, as it is for autograd.

What is freed, by name:
  norms     all RMS norms with their inside; every norm's input stays (mostly saved anyhow)
  mla_up    q_b_proj, kv_b_proj and what is made of them up to the attention product; each product twice
  swiglu    the product of gate and up in the dense layers and shared experts; routed experts do so by themselves
  moe_down  the output of the routed experts' down projection: never kept by experts_implementation "k2", which is needed
  full      everything in a decoder layer but its input: transformers' gradient checkpointing, without re-entry

Given up: compiled models, DTensor activations (tensor parallelism) stay as they are, and a few microseconds of Python for
every operation of the forward pass. Offload copies on the stream of the computation: it saves memory, not time.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from transformers.modeling_layers import GradientCheckpointingLayer

from .experts import NAME as EXPERTS
from .quantization.packed_experts import PackedExperts

NAMES = ("norms", "swiglu", "mla_up", "moe_down", "full")
_NORMS = ("input_layernorm", "post_attention_layernorm", "q_a_layernorm", "kv_a_layernorm", "norm")
_UP = ("q_b_proj", "kv_b_proj")

_aten = torch.ops.aten
CHEAP = {
    operation
    for packet in (
        _aten.add,
        _aten.sub,
        _aten.mul,
        _aten.div,
        _aten.neg,
        _aten.cat,
        _aten.stack,
        _aten.clone,
        _aten._to_copy,
    )
    for operation in (getattr(packet, overload) for overload in packet.overloads())
}


def apply_recompute(model: nn.Module, names: Sequence[str], offload: bool = False) -> Recompute:
    """From now on compute again, in each backward pass, what `names` choose; see the top of this file.

    Apply it after sharding and adapters. It takes part in forwards of `model` for which gradients are enabled.

    Args:
        names: of NAMES; `full` excludes the others.
        offload: keep what autograd still saves, parameters aside, in the CPU's memory; pinned if the model is on a GPU.

    Returns:
        A handle; `.remove()` ends it.

    Raises:
        ValueError: an unknown name, `full` together with another one, a name that fits no module of the model, or
            `moe_down` or `swiglu` where the routed experts have another implementation than "k2".
    """
    for name in names:
        if name not in NAMES:
            raise ValueError(f"recompute: {name!r} is unknown, expected some of {', '.join(NAMES)}.")
    if "full" in names and len(set(names)) > 1:
        raise ValueError(
            f"recompute: {list(names)} has 'full', which contains the others: leave one or the other."
        )
    return Recompute(model, set(names), offload)


class Recompute:
    """The handle of apply_recompute."""

    def __init__(self, model: nn.Module, names: set[str], offload: bool) -> None:
        self._frames: list[_Frame] = []
        self._handles: list[Any] = []
        self._layers = [
            module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)
        ]
        self._full = "full" in names
        self._offload = offload
        chosen = [module for name in sorted(names - {"full"}) for module in _modules(model, name)]
        if self._full:
            if not self._layers:
                raise ValueError("recompute: 'full' fits no module of the model, expected decoder layers.")
            self._checkpoint(True)
        if chosen or offload:
            self._handles.append(model.register_forward_pre_hook(self._enter, prepend=True))
            self._handles.append(model.register_forward_hook(self._leave, always_call=True))
            # What a layer has made is consumed inside of it; notes that nobody asked for go with it.
            self._handles += [layer.register_forward_hook(self._forget) for layer in self._layers]
        if offload:
            # After FSDP's own hooks: by then the whole weights are in their places.
            owners = [
                module for module in model.modules() if next(module.parameters(False), None) is not None
            ]
            self._handles += [module.register_forward_pre_hook(self._own) for module in owners]
        for module in chosen:
            self._handles.append(module.register_forward_pre_hook(self._open))
            self._handles.append(module.register_forward_hook(self._close, always_call=True))

    def remove(self) -> None:
        """Save everything again, from the next forward on."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._full:
            self._checkpoint(False)
            self._full = False

    def _checkpoint(self, on: bool) -> None:
        layer: Any
        for layer in self._layers:
            layer.gradient_checkpointing = on
            layer._gradient_checkpointing_func = _checkpoint

    def _enter(self, module: nn.Module, args: Any) -> None:
        if torch.is_grad_enabled():
            self._frames.append(_Frame(self._offload))
            self._frames[-1].__enter__()

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """Also called, with no output, when the forward raised."""
        if self._frames:
            self._frames.pop().__exit__(None, None, None)

    def _forget(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._frames:
            self._frames[-1].notes.clear()

    def _own(self, module: nn.Module, args: Any) -> None:
        if self._frames:
            for weight in module.parameters(recurse=False):
                values = weight.to_local() if isinstance(weight, DTensor) else weight
                self._frames[-1].parameters.add(values.untyped_storage()._cdata)

    def _open(self, module: nn.Module, args: Any) -> None:
        if self._frames:
            self._frames[-1].depth += 1

    def _close(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._frames:
            self._frames[-1].depth -= 1


def _checkpoint(function: Any, *args: Any) -> Any:
    return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=False)


def _modules(model: nn.Module, name: str) -> list[nn.Module]:
    """The modules in which everything is computed again."""
    modules = dict(model.named_modules())
    ends = {path: path.rpartition(".")[2] for path in modules}
    experts = [path for path in modules if path.endswith("mlp.experts")]
    if name in ("swiglu", "moe_down"):
        for path in experts:
            # An adapter on the experts wraps them; the configuration is the inner module's.
            inner = list(modules[path].modules())
            if any(isinstance(module, PackedExperts) for module in inner):
                continue  # they keep neither, whatever the implementation of others
            config = next(module.config for module in inner if "config" in module.__dict__)
            found = config._experts_implementation
            if found != EXPERTS:
                raise ValueError(
                    f"recompute: {name!r} needs experts_implementation={EXPERTS!r} for {path}, which has {found!r}: call "
                    f"model.set_experts_implementation({EXPERTS!r}), or leave {name!r} out."
                )
    if name == "moe_down":
        chosen = []
    elif name == "norms":
        chosen = [path for path in modules if ends[path] in _NORMS]
    elif name == "mla_up":
        chosen = [path for path in modules if ends[path] in _UP]
    else:
        chosen = [path for path in modules if ends[path] == "act_fn" and "mlp.experts" not in path]
    if not chosen and not (name in ("swiglu", "moe_down") and experts):
        raise ValueError(f"recompute: {name!r} fits no module of {type(model).__name__}.")
    return [modules[path] for path in chosen]


# -- notes


class _Kept:
    """A tensor that stays as it is."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.version = tensor, tensor._version

    def unchanged(self) -> bool:
        return self.tensor._version == self.version

    def restore(self) -> Tensor:
        if not self.unchanged():
            raise RuntimeError(
                f"recompute: a tensor of shape {tuple(self.tensor.shape)} that the backward pass needs was changed in "
                "place since the forward pass."
            )
        return self.tensor


class _View:
    """Size, strides and offset over the storage of a tensor that is elsewhere, or not at all."""

    def __init__(self, source: _Note | _Offloaded, tensor: Tensor) -> None:
        self.source, self.dtype = source, tensor.dtype
        self.geometry = tensor.storage_offset(), tensor.shape, tensor.stride()

    def unchanged(self) -> bool:
        return self.source.unchanged()

    def restore(self) -> Tensor:
        whole = self.source.take()
        return torch.empty(0, dtype=self.dtype, device=whole.device).set_(
            whole.untyped_storage(), *self.geometry
        )


_Argument = _Kept | _View


class _Offloaded:
    """A storage that waits in the CPU's memory, for all its views."""

    def __init__(self, storage: torch.UntypedStorage) -> None:
        self.device, self.source = storage.device, StorageWeakRef(storage)
        values = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
        pinned = storage.device.type == "cuda"
        self.values = torch.empty(values.shape, dtype=torch.uint8, pin_memory=pinned)
        self.values.copy_(values, non_blocking=pinned)

    def unchanged(self) -> bool:
        return True

    def take(self) -> Tensor:
        return self.values.to(self.device, non_blocking=True)


class _Note:
    """How a tensor was made. Its value exists from the first use in a backward pass to the last."""

    def __init__(self, operation: Any, args: Any, kwargs: Any) -> None:
        self.operation, self.args, self.kwargs = operation, args, kwargs
        self.sealed = False  # asked for: its arguments count it among their uses
        self.uses = self.served = 0
        self.value: Tensor | None = None

    def arguments(self) -> list[_Argument]:
        return [value for value in _flat((self.args, self.kwargs)) if isinstance(value, _Argument)]

    def unchanged(self) -> bool:
        return self.sealed or all(argument.unchanged() for argument in self.arguments())

    def take(self) -> Tensor:
        value = self.value
        if value is None:
            args, kwargs = (_map(_restore, values) for values in (self.args, self.kwargs))
            guard = torch._C._DisableAutocast()  # the casts were noted too
            with torch.no_grad():
                value = self.operation(*args, **kwargs)
            del guard
        assert isinstance(value, Tensor)
        self.served = (self.served + 1) % self.uses
        self.value = value if self.served else None
        return value


def _restore(value: Any) -> Any:
    return value.restore() if isinstance(value, _Argument) else value


def _map(function: Any, value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_map(function, item) for item in value]
    if isinstance(value, dict):
        return {key: _map(function, item) for key, item in value.items()}
    return function(value)


def _flat(value: Any) -> list[Any]:
    if isinstance(value, (list, tuple)):
        return [leaf for item in value for leaf in _flat(item)]
    if isinstance(value, dict):
        return _flat(list(value.values()))
    return [value]


def _is_plain(value: Any) -> bool:
    return type(value) in (Tensor, nn.Parameter) and value.layout is torch.strided


class _Frame(TorchDispatchMode):
    """One forward of the model: what was noted, and the hooks on what autograd saves."""

    def __init__(self, offload: bool) -> None:
        super().__init__()
        self.offload = offload
        self.depth = 0  # how many of the chosen modules we are in
        # By storage: a weak reference (addresses are used again), the version of its values, how they were made.
        self.notes: dict[int, tuple[StorageWeakRef, int, _Note]] = {}
        self.parameters: set[int] = set()
        self.offloaded: dict[tuple[int, int], weakref.ref[_Offloaded]] = {}
        self.hooks = saved_tensors_hooks(self.pack, _restore)

    def __enter__(self) -> _Frame:
        super().__enter__()
        self.hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.hooks.__exit__(*error)
        super().__exit__(*error)
        self.notes.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        considered = self.depth > 0 or func in CHEAP
        if not considered:
            return output
        tensors = [value for value in _flat((args, kwargs)) if isinstance(value, Tensor)]
        if (
            not func._schema.is_mutable
            and torch.Tag.nondeterministic_seeded not in func.tags
            and all(map(_is_plain, (output, *tensors)))
            and (self.depth > 0 or any(self.find(value) for value in tensors))
        ):
            storage = output.untyped_storage()
            if all(storage._cdata != value.untyped_storage()._cdata for value in tensors):
                note = _Note(func, _map(self.argument, args), _map(self.argument, kwargs))
                self.notes[storage._cdata] = StorageWeakRef(storage), output._version, note
        return output

    def find(self, tensor: Tensor) -> _Note | None:
        """How the values in the tensor's storage were made, if that was noted and they have not changed since."""
        found = self.notes.get(tensor.untyped_storage()._cdata)
        if found is None or found[0].expired() or found[1] != tensor._version:
            return None
        return found[2]

    def argument(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        note = self.find(value)
        return _Kept(value) if note is None else _View(note, value)

    def pack(self, tensor: Tensor) -> _Argument:
        """What autograd keeps in the place of a tensor that it saves."""
        note = self.find(tensor) if _is_plain(tensor) else None
        if note is None or not note.unchanged():
            return self.keep(tensor)
        self.seal(note)
        note.uses += 1
        return _View(note, tensor)

    def seal(self, note: _Note) -> None:
        if note.sealed:
            return
        note.sealed = True

        def seal(value: Any) -> Any:
            if isinstance(value, _Kept):
                return self.keep(value.tensor)
            if isinstance(value, _View) and isinstance(value.source, _Note):
                value.source.uses += 1
                self.seal(value.source)
            return value

        note.args, note.kwargs = _map(seal, note.args), _map(seal, note.kwargs)

    def keep(self, tensor: Tensor) -> _Argument:
        """The tensor itself or, with offload and not a parameter's, its values in the CPU's memory."""
        if not self.offload or not _is_plain(tensor) or type(tensor) is nn.Parameter:
            return _Kept(tensor)
        storage = tensor.untyped_storage()
        if storage._cdata in self.parameters or isinstance(tensor._base, nn.Parameter):
            return _Kept(tensor)
        key = storage._cdata, tensor._version
        known = self.offloaded.get(key)
        values = None if known is None else known()
        if values is None or values.source.expired():
            with _disable_current_modes():
                values = _Offloaded(storage)
            self.offloaded[key] = weakref.ref(values)
        return _View(values, tensor)
