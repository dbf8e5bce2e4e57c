"""torch's pickles, read without running them: those of torch.distributed.checkpoint, and of single tensors in torch.save.

A pickle is a program that imports and calls. Here it imports nothing: the few classes and functions that such files name
become inert records of what was called with what, and any other name is an error.
"""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from typing import Any

import torch

from ..checkpoint import CheckpointError
from ..lazy_tensors import DTYPES

DTYPE_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}
STORAGES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
}  # fmt: skip
# Classes and functions that DCP's pickles and those of single tensors name; none of them is imported.
_RECORDS = {
    "torch.distributed.checkpoint.metadata": "Metadata MetadataIndex TensorStorageMetadata BytesStorageMetadata "
    "ChunkStorageMetadata TensorProperties StorageMeta _MEM_FORMAT_ENCODING",
    "torch.distributed._shard.sharded_tensor.metadata": "TensorProperties MEM_FORMAT_ENCODING",  # until 2.2
    "torch.distributed.checkpoint.filesystem": "_StorageInfo",
    "torch.serialization": "_get_layout",
    "torch._utils": "_rebuild_tensor_v2 _rebuild_tensor_v3",
    "torch.storage": "UntypedStorage",
    "torch": " ".join(STORAGES),
    "pathlib": "Path PosixPath WindowsPath PurePath PurePosixPath PureWindowsPath",
    "pathlib._local": "Path PosixPath WindowsPath PurePath PurePosixPath PureWindowsPath",
}


class _Record:
    """An object that a pickle describes: its class by name, what it was called with, its state. Nothing of it runs."""

    kind = ""
    args: tuple[Any, ...] = ()
    state: Any = None

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Unpickler(pickle.Unpickler):
    """Reads the pickles of DCP and of single tensors; imports nothing."""

    def __init__(self, data: bytes, what: str) -> None:
        super().__init__(io.BytesIO(data))
        self.what = what

    def find_class(self, module: str, name: str) -> Any:
        if name in _RECORDS.get(module, "").split():
            return type(name, (_Record,), {"kind": name})  # one of its own, that a pickle may spoil
        if (module, name) == ("torch", "Size"):
            return tuple
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and isinstance(vars(torch).get(name), torch.dtype):
            return name
        raise CheckpointError(
            f"{self.what} is a pickle that names {module}.{name}, which was not run: expected only what "
            "torch.distributed.checkpoint writes."
        )

    def persistent_load(self, pid: Any) -> Any:
        return pid


def unpickled(data: bytes, what: str) -> Any:
    """What a pickle describes: objects as records with `kind`, `args` and `state`, shapes as tuples, dtypes by name.

    Args:
        what: the pickle, for messages.

    Raises:
        CheckpointError: it is broken, or names anything but what torch's own have.
    """
    try:
        return _Unpickler(data, what).load()
    except CheckpointError:
        raise
    except Exception as error:  # a broken pickle raises whatever its operations do
        raise CheckpointError(
            f"{what} cannot be read ({type(error).__name__}: {error}): expected a pickle of torch's, whole."
        ) from None
