"""Which storages are alive: what a forward pass keeps for its backward pass, as bytes."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Live(TorchDispatchMode):
    """The storages made in its time that are still there."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for value in tree_leaves(output):
            if type(value) is Tensor:
                storage = value.untyped_storage()
                self.storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return output

    def bytes(self, model: nn.Module) -> int:
        """Of those that are no parameter of `model`."""
        own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        alive = [(key, size) for key, (ref, size) in self.storages.items() if not ref.expired()]
        return sum(size for key, size in alive if key not in own)
