"""Any layout of this family into any other, from file to file: `convert`.

Everything is planned and checked first: the layout of the source is recognised, every tensor claimed, every shape proven,
the space on the disk counted. Then files are streamed (engine.py).
"""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from ..lazy_tensors import OpenFiles
from ..manifest import FP8, Quantization, base_dtype, quantization_of
from ..quantization import int4
from . import hub
from . import layout as layouts
from .configs import linear_modules, target_config
from .dcp import is_dcp
from .engine import MEMORY, Share, write_files
from .found import CONFIG, side_files
from .layout import Layout
from .opened import Model, open_model
from .plan import Plan, Target, make_plan
from .staging import STAGING, check_destination, fingerprint, is_complete
from .tasks import SHARD_BYTES
from .verify import distance
from .weights import affine_encoder, fp8_encoder, int4_encoder

CONTAINERS = ("safetensors", "dcp")
_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "float64": "F64"}


class Summary(NamedTuple):
    """What a run writes, or would write.

    Attributes:
        num_tensors: in all files.
        num_bytes: of their data.
        num_changed: tensors that are no copies.
        num_shards: files.
        num_resumed: files that an earlier run had written.
        lines: what happens to what, for people.
    """

    num_tensors: int
    num_bytes: int
    num_changed: int
    num_shards: int
    num_resumed: int
    lines: tuple[str, ...] = ()

    def text(self, destination: Path | str, dry_run: bool) -> str:
        """For people: the lines, and one that sums up."""
        resumed = f" ({self.num_resumed} by an earlier run)" if self.num_resumed else ""
        last = (
            f"{destination}{' would hold' if dry_run else ':'} {self.num_tensors:,} tensors, {self.num_changed:,} of them "
            f"converted, {self.num_bytes:,} bytes in {self.num_shards:,} files{resumed}"
        )
        return "\n".join((*self.lines, last))


@dataclass(frozen=True)
class Coding:
    """How weights are quantised.

    Attributes:
        codec: of layout.CODECS; None: the source's if the layout holds that, else the layout's first.
        group_size: inputs that share a scale, of INT4.
        convention: of int4.CONVENTIONS.
        recover: take weights that lie on a grid back to its codes and scales, and refuse others; nothing is rounded.
        modules: the modules to quantise, chosen from the linear ones; None: as the published checkpoints do.
        dtype: of unquantised weights, as torch spells it without `torch.`; None: the layout's, or as they are.
    """

    codec: str | None = None
    group_size: int = int4.GROUP_SIZE
    convention: str = "kimi"
    recover: bool = False
    modules: Callable[[Sequence[str]], Iterable[str]] | None = None
    dtype: str | None = None


@dataclass(frozen=True)
class Output:
    """Where and how the files are written.

    Attributes:
        shard_bytes: that a file may have, unless a single tensor has more.
        memory: bytes that the work may take beside Python and its libraries.
        num_ranks: of a layout with a file for each model-parallel rank.
        dry_run: plan and check only.
        overwrite: replace what the destination holds, or drop an unfinished run of another kind.
        quiet: no progress bar; there is none either where stderr is no terminal.
        container: of CONTAINERS: safetensors files with an index, or a folder of torch.distributed.checkpoint.
    """

    shard_bytes: int = SHARD_BYTES
    memory: int = MEMORY
    num_ranks: int = 1
    dry_run: bool = False
    overwrite: bool = False
    quiet: bool = False
    container: str = CONTAINERS[0]


def convert(
    src: str | Path,
    dst: str | Path,
    to: str,
    *,
    codec: str | None = None,
    dtype: str | None = None,
    group_size: int = int4.GROUP_SIZE,
    convention: str = "kimi",
    recover: bool = False,
    layout: str | None = None,
    config: str | Path | None = None,
    num_ranks: int = 1,
    container: str = CONTAINERS[0],
    shard_bytes: int = SHARD_BYTES,
    memory: int = MEMORY,
    dry_run: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
    revision: str | None = None,
    discard_source: bool = False,
) -> Summary:
    """Write the checkpoint `src` to the folder `dst` in another layout.

    Args:
        src: a folder (of safetensors, or as torch.distributed.checkpoint writes it), a .safetensors file with its
            config.json beside it, the id of a hub repository, or, for a dry run, an index.
        to: a layout, the stem of a file in conversion/.
        codec: "bf16", "fp8", "int4" or "affine" (MLX); by default the source's if the layout holds it, else the layout's
            first.
        dtype: "bfloat16", "float16" or "float32" for what is not quantised; by default as it is, and bfloat16 in the hub's
            layouts for what has the model's own dtype.
        group_size: inputs that share a scale, when weights are quantised to INT4.
        convention: of `int4.CONVENTIONS`.
        recover: weights were dequantised: find the codes and scales they came from, round nothing, refuse others.
        layout: of the source, if its names are not to be trusted.
        config: config.json of the model, or a name in configs/, if none stands beside the weights.
        num_ranks: of a layout with a file for each model-parallel rank.
        container: "safetensors", or "dcp" for a folder that torch.distributed.checkpoint loads (unquantised weights only,
            written by one process, not resumed).
        shard_bytes: that a file may have, unless a single tensor has more.
        memory: bytes that the work may take beside Python and its libraries.
        dry_run: plan and check only.
        overwrite: replace what `dst` holds, or drop an unfinished run of another kind.
        quiet: no progress bar.
        revision: of a hub repository: a branch, tag or commit.
        discard_source: of a hub repository: delete each shard when everything made of it is on the disk. If not, it is
            downloaded to the hub's cache and stays there.

    Returns:
        Tensors, bytes and files written, or to be written.

    Raises:
        ValueError: a source that is broken or incomplete, tensors that nothing claims, a layout or codec that does not
            exist or does not fit, an unusable destination; all before a byte is written.
    """
    dst = Path(dst)
    target = layouts.load(to)
    output = Output(shard_bytes, memory, num_ranks, dry_run, overwrite, quiet, container)
    coding = Coding(codec, group_size, convention, recover, dtype=dtype)
    options = {"command": "convert", "to": to}
    found = hub.repository_id(src)
    if found is None:
        if revision is not None or discard_source:
            raise ValueError(
                f"{src} is no id of a hub repository: expected one with revision or discard_source."
            )
        src = Path(src)
        check_destination(src, dst, overwrite)
        with OpenFiles() as files:
            model = open_model(src, files, layout=layout, config=config, names_only=dry_run)
            return write_model(model, dst, target, coding, output, files, options)
    repository = hub.open_repository(found[0], revision or found[1])
    if not dry_run and not discard_source:
        folder = hub.download(repository)
        check_destination(folder, dst, overwrite)
        with OpenFiles() as files:
            model = open_model(folder, files, layout=layout, config=config)
            return write_model(model, dst, target, coding, output, files, options)
    with ExitStack() as stack:
        if dry_run:
            folder = Path(stack.enter_context(TemporaryDirectory()))
        else:
            folder = dst.with_name(f".{dst.name}.source.{Share.of_environment().rank}")
            check_destination(folder, dst, overwrite)
        files = stack.enter_context(hub.StreamedFiles(repository, folder))
        model = open_model(folder, files, layout=layout, config=config)
        summary = write_model(
            model,
            dst,
            target,
            coding,
            output,
            files,
            options,
            source={"repository": repository.id, "revision": repository.revision},
        )
    if not dry_run:
        shutil.rmtree(folder)
    return summary


def write_model(
    model: Model,
    dst: Path,
    layout: Layout,
    coding: Coding,
    output: Output,
    files: OpenFiles,
    options: Mapping[str, Any],
    *,
    source: Mapping[str, Any] | None = None,
) -> Summary:
    """Plan and write a model; what `convert` and its relatives (quantize, merge, slice) share.

    Args:
        options: what the result depends on beside `coding` and `output`, as JSON types; an unfinished run is resumed if all
            are the same.
        source: what tells whether the source is still the same; by default its files' sizes and times.
    """
    target = make_target(model, layout, coding, output.num_ranks)
    _check_container(dst, target, output, files)
    plan = make_plan(model, target, files, output.shard_bytes)
    summary = _summary(model, target, plan)
    if output.dry_run:
        return summary
    check_repeated(model, layout)
    config = target_config(model, target, coding.group_size)
    told = {
        **options,
        "layout": layout.name,
        "codec": target.codec,
        "dtype": target.dtype,
        "group_size": coding.group_size,
        "convention": coding.convention,
        "recover": coding.recover,
        "num_ranks": output.num_ranks,
        "shard_bytes": output.shard_bytes,
        "container": output.container,
    }
    record = {
        "from": {**(source or {"folder": model.folder.name}), "layout": model.layout, "codec": model.codec},
        "to": told,
        "dropped": [{"name": name, "why": why, "tensors": num} for name, why, num in model.dropped],
    }
    common: dict[str, Any] = {
        "source": {**(source or fingerprint(model.folder, model.files)), "config": _digest(model.config)},
        "options": told,
        "beside": {**side_files(model.folder), CONFIG: (json.dumps(config, indent=2) + "\n").encode()},
        "record": record,
        "overwrite": output.overwrite,
        "quiet": output.quiet,
    }
    if output.container == "dcp":
        from .dcp_writer import write_dcp

        write_dcp(plan.files, dst, **common)
        return summary
    streamed = files if isinstance(files, hub.StreamedFiles) else None
    if streamed is not None:
        share = Share.of_environment()
        done = {path.name for path in (dst / STAGING).glob("*.safetensors")}
        streamed.plan([file for file in plan.files[share.rank :: share.num_ranks] if file.name not in done])
    num_resumed = write_files(
        plan.files,
        dst,
        **common,
        index=layout.files is None,
        memory=output.memory,
        finished=streamed.written if streamed is not None else None,
    )
    return summary._replace(num_resumed=num_resumed)


def _digest(config: Mapping[str, Any]) -> str:
    """Tells one config.json from another, wherever it came from (`config`)."""
    return f"{zlib.crc32(json.dumps(config, sort_keys=True).encode()):08x}"


def make_target(model: Model, layout: Layout, coding: Coding, num_ranks: int = 1) -> Target:
    """What is to be made of a model, every choice checked.

    Raises:
        ValueError: a choice that does not exist, or that layout or model cannot follow.
    """
    codec = coding.codec
    if codec is None:
        like = {"int4": "affine", "affine": "int4"}.get(model.codec)
        codec = next((one for one in (model.codec, like) if one in layout.codecs), layout.codecs[0])
    if codec not in layout.codecs:
        raise ValueError(
            f"codec is {codec!r}: expected one of {', '.join(layout.codecs)}, which {layout.name} holds."
        )
    if coding.convention not in int4.CONVENTIONS:
        raise ValueError(
            f"convention is {coding.convention!r}: expected one of {', '.join(int4.CONVENTIONS)}."
        )
    if coding.recover and coding.convention != "kimi":
        raise ValueError(
            f"convention is {coding.convention!r}, but recover finds the grid itself: expected 'kimi' with recover."
        )
    if coding.dtype is not None and coding.dtype not in _DTYPES:
        raise ValueError(f"dtype is {coding.dtype!r}: expected one of {', '.join(_DTYPES)}.")
    if num_ranks < 1 or (num_ranks > 1 and layout.files is None):
        ranked = [name for name in layouts.names() if layouts.load(name).files]
        raise ValueError(
            f"num_ranks is {num_ranks}: expected 1 for {layout.name}; layouts with a file for each rank are "
            f"{', '.join(ranked)}."
        )
    dtype = _DTYPES[coding.dtype] if coding.dtype else layout.dtype
    base = base_dtype(model.text)
    common = {
        "layout": layout,
        "codec": codec,
        "dtype": dtype,
        "cast_all": coding.dtype is not None,
        "base": base,
        "num_ranks": num_ranks,
    }
    if codec == "bf16":
        return Target(**common)
    if codec == "fp8":
        spec = model.text.get("quantization_config") if model.codec == "fp8" else FP8
        rule = quantization_of({"quantization_config": spec or FP8})
        chosen = _by_rule(model, rule) if coding.modules is None else coding.modules(linear_modules(model))
        return Target(**common, encoder=fp8_encoder(rule.block, coding.recover), coded=frozenset(chosen))
    make = int4_encoder if codec == "int4" else affine_encoder
    encoder = make(coding.group_size, coding.convention, coding.recover)
    linear = linear_modules(model)
    if coding.modules is not None:
        coded = frozenset(coding.modules(linear))
    elif model.codec in ("int4", "affine"):
        coded = frozenset()  # those that are packed already
    else:
        coded = frozenset(name for name in linear if ".mlp.experts." in name)
    return Target(**common, encoder=encoder, coded=coded)


def check_repeated(model: Model, layout: Layout) -> None:
    """Prove that what the layout leaves out because it repeats another tensor does repeat it.

    Raises:
        ValueError: it does not.
    """
    for name in model.names:
        if (other := layout.repeated(name)) is not None and distance(
            model.read(name).values(), model.read(other).values()
        )[0]:
            raise ValueError(
                f"{name} differs from {other}, which {layout.name} has in its place: expected a copy, or a layout with "
                "room for both."
            )


def _check_container(dst: Path, target: Target, output: Output, files: OpenFiles) -> None:
    """Raises: ValueError: no such container, one that cannot hold the target, or a destination that holds another."""
    if output.container not in CONTAINERS:
        raise ValueError(f"container is {output.container!r}: expected one of {', '.join(CONTAINERS)}.")
    if output.container == "dcp":
        if target.codec != "bf16" or target.num_ranks > 1:
            what = f"{target.num_ranks} ranks" if target.num_ranks > 1 else target.codec
            raise ValueError(f"container is 'dcp', but the weights are of {what}: expected bf16, and 1 rank.")
        if isinstance(files, hub.StreamedFiles) and not output.dry_run:
            raise ValueError(
                "container is 'dcp', which is not resumed: expected a source that is not deleted while it is read."
            )
        if others := sorted(path.name for path in dst.glob("*.safetensors")):
            raise ValueError(
                f"{dst} holds {others[0]}: expected another folder for torch.distributed.checkpoint's files."
            )
    published = is_dcp(dst) and not is_complete(dst / STAGING)
    if published and (output.container != "dcp" or not output.overwrite):
        more = ", or overwrite (--overwrite)" if output.container == "dcp" else ""
        raise ValueError(
            f"{dst} holds a checkpoint of torch.distributed.checkpoint: expected another folder{more}."
        )


def _by_rule(model: Model, rule: Quantization) -> Iterable[str]:
    for name in linear_modules(model):
        rows, columns = model.names[f"{name}.weight"]
        if f"{name}.weight_scale_inv" in rule.stores(name, rows, columns, "BF16"):
            yield name


def _summary(model: Model, target: Target, plan: Plan) -> Summary:
    words = {
        "copy": "copied",
        "pass": "put together, bits unchanged",
        "arrange": "rearranged",
        "encode": f"quantised to {target.codec}",
        "decode": f"decoded from {model.codec}",
        "cast": f"rounded to {target.dtype}",
    }
    told = ", ".join(f"{plan.counts[how]:,} {word}" for how, word in words.items() if plan.counts.get(how))
    lines = [f"{model.layout} ({model.codec}) -> {target.layout.name} ({target.codec}): {told}"]
    lines += [f"left out: {num:,} x {name} ({why})" for name, why, num in model.dropped]
    unknown = sum(extra is None for extra in model.extras.values())
    if unknown and target.layout.config == "k25":
        lines.append(
            f"not counted: {unknown:,} tensors beside the language model, whose sizes an index does not say"
        )
    if model.extras and target.layout.config != "k25":
        lines.append(
            f"left out: {len(model.extras):,} tensors beside the language model ({target.layout.name} has no place)"
        )
    if repeated := [name for name in model.names if target.layout.repeated(name) is not None]:
        lines.append(f"left out: {', '.join(repeated)} (copies of what the model has once)")
    if target.layout.mtp is None and model.text.get("num_nextn_predict_layers"):
        lines.append(
            f"left out: the multi-token-prediction layers ({target.layout.name} has no place for them)"
        )
    num_changed = plan.num_tensors - plan.counts.get("copy", 0)
    return Summary(plan.num_tensors, plan.num_bytes, num_changed, len(plan.files), 0, tuple(lines))
