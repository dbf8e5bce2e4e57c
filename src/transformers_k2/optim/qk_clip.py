"""QK-Clip: which weight rows carry each head's queries and keys, and how far they shrink (arXiv 2507.20534, Alg. 1).

A head whose largest pre-softmax logit S exceeded tau is multiplied by gamma = tau / S. In MLA the rope part of the key is
one vector for all heads, so it is left alone and the rope rows of the query take the whole factor; the parts that belong
to the head alone share it, sqrt(gamma) each. The same reasoning covers other attention: `HeadRows` declares, per
projection, runs of rows and the power of gamma each run takes. What this gives up: heads whose query or key passes through
a norm after the projection (Qwen3's q_norm) cannot be scaled by weights, and are refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

Runs = tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class HeadRows:
    """One attention module's heads. A run is (number of rows, power of gamma); a head's runs follow each other.

    Args:
        num_heads: query heads.
        query, query_runs: the projection that makes the queries, and one head's runs of its output rows.
        key, key_runs: the same for keys; an empty key means that keys are shared between heads and stay as they are.
    """

    num_heads: int
    query: str
    query_runs: Runs
    key: str = ""
    key_runs: Runs = ()

    @property
    def projections(self) -> tuple[tuple[str, Runs], ...]:
        """The projections whose rows are scaled."""
        return tuple(
            (name, runs) for name, runs in ((self.query, self.query_runs), (self.key, self.key_runs)) if name
        )


@dataclass(frozen=True)
class Attention:
    """An attention module and its declaration. Weights are looked up when they are needed: sharding replaces them."""

    module: nn.Module
    rows: HeadRows


def mla(module: nn.Module) -> HeadRows:
    """DeepSeek's latent attention: q_b_proj (or q_proj where queries are not compressed) and kv_b_proj."""
    nope, rope, value = (
        int(getattr(module, name)) for name in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    )
    children = dict(module.named_children())
    query = "q_b_proj" if "q_b_proj" in children else "q_proj"
    return HeadRows(
        num_heads=_rows(module, "kv_b_proj") // (nope + value),
        query=query,
        query_runs=((nope, 0.5), (rope, 1.0)),
        key="kv_b_proj",
        key_runs=((nope, 0.5), (value, 0.0)),
    )


def gqa(module: nn.Module) -> HeadRows:
    """q_proj and k_proj with one key head per query head (MHA), or shared by several: then the query takes it all."""
    size = int(getattr(module, "head_dim"))  # noqa: B009 - nn.Module's attributes are not typed
    num_heads, num_keys = _rows(module, "q_proj") // size, _rows(module, "k_proj") // size
    if num_heads == num_keys:
        return HeadRows(num_heads, "q_proj", ((size, 0.5),), "k_proj", ((size, 0.5),))
    return HeadRows(num_heads, "q_proj", ((size, 1.0),))


# Which submodules tell a kind of attention, and its declaration. The first row that fits counts.
KINDS: Mapping[str, tuple[frozenset[str], Callable[[nn.Module], HeadRows]]] = {
    "mla": (frozenset({"kv_b_proj", "o_proj"}), mla),
    "gqa": (frozenset({"q_proj", "k_proj", "v_proj"}), gqa),
}
# Normalising after the projection undoes any scaling of its rows.
_NORMS_AFTER = frozenset(
    {"q_norm", "k_norm", "q_layernorm", "k_layernorm", "query_layernorm", "key_layernorm"}
)


def find_attention(
    model: nn.Module, declarations: Mapping[str, str | HeadRows] | None = None
) -> dict[str, Attention]:
    """The attention modules of a model, by name, in the model's order.

    Args:
        declarations: regular expressions for module names (matched whole) with a kind (`mla`, `gqa`) or a `HeadRows`.
            None: modules are told by the names of their submodules.

    Raises:
        ValueError: nothing found, an unknown kind, rows that do not add up, or queries normalised after projection.
    """
    found: dict[str, Attention] = {}
    for name, module in model.named_modules():
        name = public_name(name)
        if (rows := _declared(name, module, declarations)) is None:
            continue
        if norms := sorted(_NORMS_AFTER & dict(module.named_children()).keys()):
            raise ValueError(
                f"{name} normalises queries and keys after their projection ({', '.join(norms)}): QK-Clip cannot act on "
                "such heads, and they do not need it; set qk_clip_tau=None."
            )
        for projection, runs in rows.projections:
            expected = rows.num_heads * sum(size for size, _ in runs)
            if (given := _rows(module, projection)) != expected:
                raise ValueError(
                    f"{name}.{projection} has {given} rows: expected {expected}, {rows.num_heads} heads of "
                    f"{'+'.join(str(size) for size, _ in runs)} rows."
                )
        found[name] = Attention(module, rows)
    if not found:
        wanted = f"no module matches {sorted(declarations)}" if declarations else "no module looks like one"
        raise ValueError(
            f"QK-Clip found no attention in {type(model).__name__}: {wanted}. Expected submodules "
            f"{' or '.join('/'.join(sorted(names)) for names, _ in KINDS.values())}; declare others with attention=, or "
            "set qk_clip_tau=None."
        )
    return found


def public_name(name: str) -> str:
    """A module's or parameter's name without what DDP, FSDP, checkpointing and torch.compile put into it."""
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    return ".".join(parts)


_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


def clip_factors(max_logit: Float[Tensor, "*heads"], tau: float) -> Float[Tensor, "*heads"]:
    """gamma = tau / S where S > tau, else exactly 1."""
    return torch.where(max_logit > tau, tau / max_logit, torch.ones_like(max_logit))


def row_factors(gamma: Float[Tensor, " heads"], runs: Runs) -> Float[Tensor, " rows"]:
    """The factor of every row of a projection: gamma to the power of the row's run."""
    columns = [_power(gamma, power).unsqueeze(1).expand(-1, size) for size, power in runs]
    return torch.cat(columns, dim=1).flatten()


def scale_rows(tensor: Tensor, factors: Float[Tensor, " rows"]) -> None:
    """Multiply the rows of a weight [rows, in] or bias [rows] in place; shards of DTensors take their own rows."""
    factors = factors.to(tensor.device)
    if isinstance(tensor, DTensor):
        mesh = tensor.device_mesh
        column = factors if tensor.ndim == 1 else factors[:, None].expand(tensor.shape)
        whole = DTensor.from_local(column, mesh, [Replicate()] * mesh.ndim, run_check=False)
        mine = whole.redistribute(mesh, tensor.placements).to_local()  # every rank has all: only slicing
        tensor.to_local().mul_(mine)
    else:
        tensor.mul_(factors if tensor.ndim == 1 else factors[:, None])


def _power(gamma: Tensor, power: float) -> Tensor:
    """torch.sqrt rounds correctly, so that powers of 4 stay powers of 2; `**` promises nothing."""
    if power == 0.5:
        return gamma.sqrt()
    return torch.ones_like(gamma) if power == 0 else gamma**power if power != 1 else gamma


def _declared(
    name: str, module: nn.Module, declarations: Mapping[str, str | HeadRows] | None
) -> HeadRows | None:
    children = dict(module.named_children()).keys()
    if declarations is None:
        fitting = [kind for kind, (names, _) in KINDS.items() if names <= children]
        return KINDS[fitting[0]][1](module) if fitting else None
    for pattern, declared in declarations.items():
        if re.fullmatch(pattern, name) is None:
            continue
        if isinstance(declared, HeadRows):
            return declared
        if declared not in KINDS:
            raise ValueError(
                f"attention={{{pattern!r}: {declared!r}}}: expected one of {sorted(KINDS)} or a HeadRows."
            )
        return KINDS[declared][1](module)
    return None


def _rows(module: nn.Module, projection: str) -> int:
    linear: Any = module.get_submodule(projection)
    return int(linear.weight.shape[0])
