"""Smaller forms of what a training step keeps for backward, exact and lossy.

Each form is a pair of ``mopt::`` operators, ``squeeze`` before it is kept and ``restore`` in
backward. Exact: ``bits`` (one bit for a truth value) and ``int16``/``int32`` (places within a
pooling window's plane). Lossy: ``int8``, ``int4`` (least value and step for each group of 128) and
``fp8`` (E4M3, largest value of each group at the end of its range), and ``rows``, an unbiased
sample of rows for weights' gradients (``mopt.row_sampling``). Groups run over the values in
memory order. Further lossy families have files of their own, see ``_FAMILIES``. Both operators
work in pieces, so that they need little besides their results.

Importing this module registers the operators; nothing else happens.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from mopt import derivative_codes, mixed_fp8, row_sampling, running_ranges
from mopt.flops import shape_of
from mopt.recompute import Item
from mopt.row_sampling import form_of, only_sums_rows, sample, sampled_bytes, spread_out

if TYPE_CHECKING:
    from mopt.joint_graph import Joint

aten = torch.ops.aten
EXACT = ("bits", "int16", "int32")
LOSSY = ("int8", "int4", "fp8", "rows", "int8-running", "derivative", "fp8-mixed")
GROUP = 128
_PIECE = 512 * GROUP
_LEAST = 1024
_FP8_TOP = 448.0
# What takes long to compute again and is therefore worth an approximation.
_HEAVY = (
    aten.mm.default, aten.addmm.default, aten.bmm.default, aten.convolution.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
)  # fmt: skip


# What restores is no approximation of the value, but as good for those who read it in backward.
_STAND_INS = (row_sampling.PREFIX, derivative_codes.PREFIX)


class Family(NamedTuple):
    """Forms whose names begin alike: bytes of a count of values, and both directions."""

    packed_bytes: Callable[[str, int], int]
    encode: Callable[[Tensor, str], Tensor]
    decode: Callable[[Tensor, str, list[int], torch.dtype], Tensor]


_FAMILIES = {
    row_sampling.PREFIX: Family(sampled_bytes, sample, spread_out),
    **{
        file.PREFIX: Family(file.packed_bytes, file.encode, file.decode)
        for file in (derivative_codes, running_ranges, mixed_fp8)
    },
}


def _family(form: str) -> Family | None:
    return next((f for prefix, f in _FAMILIES.items() if form.startswith(prefix)), None)


def squeezed_bytes(form: str, count: int) -> int:
    """Bytes of ``count`` values in a form."""
    family = _family(form)
    if family is not None:
        return family.packed_bytes(form, count)
    groups = -(-count // GROUP)
    if form == "bits":
        return -(-count // 8)
    if form in ("int16", "int32"):
        return count * (2 if form == "int16" else 4)
    return groups * GROUP // (2 if form == "int4" else 1) + groups * (4 if form == "fp8" else 8)


@torch.library.custom_op("mopt::squeeze", mutates_args=())
def squeeze(value: Tensor, form: str) -> Tensor:
    """``value`` in a form, as uint8 of one dimension."""
    family = _family(form)
    if family is not None:
        return family.encode(value, form)
    flat = value.reshape(-1)
    count = flat.numel()
    if form in ("int16", "int32"):
        return flat.to(getattr(torch, form)).view(torch.uint8)
    out = torch.zeros(squeezed_bytes(form, count), dtype=torch.uint8, device=value.device)
    if form == "bits":
        for start in range(0, count, _PIECE):
            piece = flat[start : start + _PIECE].view(torch.uint8)
            for bit in range(8):
                part = piece[bit::8]
                place = out[start // 8 : start // 8 + part.numel()]
                place |= part << bit
        return out
    groups = -(-count // GROUP)
    codes, rest = _parts(out, form, groups)
    for start in range(0, groups, _PIECE // GROUP):
        end = min(groups, start + _PIECE // GROUP)
        part = flat[start * GROUP : end * GROUP].float()
        if part.numel() < (end - start) * GROUP:
            # The last value again: a filler must not widen its group's range.
            last = part[-1:].expand((end - start) * GROUP - part.numel())
            part = torch.cat((part, last))
        rows = part.view(-1, GROUP)
        if form == "fp8":
            scale = (rows.abs().amax(1, keepdim=True) / _FP8_TOP).clamp_min_(1e-30)
            codes[start:end] = (rows / scale).to(torch.float8_e4m3fn).view(torch.uint8)
            rest[start:end] = scale
            continue
        top = 255 if form == "int8" else 15
        low, high = rows.aminmax(dim=1, keepdim=True)
        step = ((high - low) / top).clamp_min_(1e-30)
        rest[start:end, :1], rest[start:end, 1:] = low, step
        found = rows.sub(low).div_(step).round_().clamp_(0, top).to(torch.uint8)
        codes[start:end] = found if form == "int8" else found[:, ::2] | (found[:, 1::2] << 4)
    return out


@squeeze.register_fake
def _(value: Tensor, form: str) -> Tensor:
    return value.new_empty(squeezed_bytes(form, value.numel()), dtype=torch.uint8)


@torch.library.custom_op("mopt::restore", mutates_args=())
def restore(packed: Tensor, form: str, shape: list[int], dtype: torch.dtype) -> Tensor:
    """What :func:`squeeze` was given; for lossy forms, the nearest values of the form."""
    family = _family(form)
    if family is not None:
        return family.decode(packed, form, shape, dtype)
    count = 1
    for size in shape:
        count *= size
    if form in ("int16", "int32"):
        return packed.view(getattr(torch, form)).to(dtype).view(shape)
    if form == "bits":
        whole = torch.empty(8 * packed.numel(), dtype=torch.uint8, device=packed.device)
        for bit in range(8):
            torch.bitwise_right_shift(packed, bit, out=whole[bit::8]).bitwise_and_(1)
        return whole.view(torch.bool)[:count].view(shape).to(dtype)
    groups = -(-count // GROUP)
    codes, rest = _parts(packed, form, groups)
    out = torch.empty(groups * GROUP, dtype=dtype, device=packed.device)
    rows = out.view(groups, GROUP)
    for start in range(0, groups, _PIECE // GROUP):
        end = min(groups, start + _PIECE // GROUP)
        part = codes[start:end]
        if form == "fp8":
            rows[start:end] = part.view(torch.float8_e4m3fn).float() * rest[start:end]
            continue
        if form == "int4":
            part = torch.stack((part & 15, part >> 4), dim=-1).flatten(1)
        rows[start:end] = part.float().mul_(rest[start:end, 1:]).add_(rest[start:end, :1])
    return out[:count].view(shape)


@restore.register_fake
def _(packed: Tensor, form: str, shape: list[int], dtype: torch.dtype) -> Tensor:
    return packed.new_empty(shape, dtype=dtype)


def _parts(packed: Tensor, form: str, groups: int) -> tuple[Tensor, Tensor]:
    """The codes [groups, bytes] and the group's numbers [groups, 1 or 2] within the bytes."""
    width = GROUP // 2 if form == "int4" else GROUP
    numbers = 1 if form == "fp8" else 2
    codes = packed[: groups * width].view(groups, width)
    return codes, packed[groups * width :].view(torch.float32).view(groups, numbers)


SQUEEZE = torch.ops.mopt.squeeze.default
RESTORE = torch.ops.mopt.restore.default


@dataclass(frozen=True)
class Form:
    """A value of forward and the form it may be kept in."""

    value: fx.Node
    name: str


def exact_forms(nodes: Iterable[fx.Node]) -> list[Form]:
    """Values that can be kept smaller without any loss: truth values, places in pooling planes."""
    found = []
    for node in nodes:
        value = node.meta.get("val")
        if not _suits(value):
            continue
        if value.dtype == torch.bool:
            found.append(Form(node, "bits"))
        source = node.args[0] if node.args else None
        if (
            value.dtype == torch.int64
            and isinstance(source, fx.Node)
            and source.target is aten.max_pool2d_with_indices.default
            and node.args[1] == 1
        ):
            image = source.args[0]
            assert isinstance(image, fx.Node)
            height, width = shape_of(image.meta["val"])[-2:]
            if height * width < 1 << 31:
                found.append(Form(node, "int16" if height * width < 1 << 15 else "int32"))
    return found


def lossy_forms(nodes: Iterable[fx.Node], form: str) -> list[Form]:
    """Results of matrix products, convolutions and attention, which ``form`` may stand for.

    With ``rows``: what backward only multiplies with gradients, summed over rows; with
    ``derivative``: what it reads for the derivative of GELU or SiLU only.
    """
    found = []
    for node in nodes:
        value = node.meta.get("val")
        if _suits(value) and value.is_floating_point():
            name = _lossy_form(node, form)
            if name is not None:
                found.append(Form(node, name))
    return found


def _lossy_form(node: fx.Node, form: str) -> str | None:
    """The form of a family that suits a value, or None."""
    shape = shape_of(node.meta["val"])
    if form == "rows":
        return form_of(shape[-1]) if only_sums_rows(node) else None
    if form == "derivative":
        return derivative_codes.form_for(node)
    maker = node.args[0] if node.target is operator.getitem else node
    if not isinstance(maker, fx.Node) or maker.target not in _HEAVY:
        return None
    if form == "int8-running":
        return running_ranges.form_for(shape)
    return mixed_fp8.form_for(node) if form == "fp8-mixed" else form


def _suits(value: object) -> bool:
    if not isinstance(value, Tensor) or not all(isinstance(n, int) for n in value.shape):
        return False
    own = value.untyped_storage().nbytes() == value.numel() * value.dtype.itemsize
    return own and value.is_contiguous() and value.numel() >= _LEAST


def offer(module: fx.GraphModule, forms: Iterable[Form]) -> None:
    """Write the squeezing of each form behind its value; what no plan keeps is dead code."""
    for form in forms:
        node = form.value
        with module.graph.inserting_after(node):
            packed = module.graph.call_function(SQUEEZE, (node, form.name))
        value = node.meta["val"]
        fakes = [v for v in pytree.tree_leaves(value) if isinstance(v, Tensor)]
        mode = fakes[0].fake_mode  # type: ignore[attr-defined]
        with mode:
            meta = torch.empty(
                squeezed_bytes(form.name, value.numel()), dtype=torch.uint8, device=value.device
            )
        packed.meta = {
            key: node.meta[key] for key in ("nn_module_stack", "fwd_nn_module_stack")
            if key in node.meta
        } | {"val": meta, "partitioner_tag": "is_forward"}  # fmt: skip


def withdraw(joint: Joint, items: Iterable[Item]) -> int:
    """Take back stand-ins that a plan repeats other calls with: only backward's readers bear them.

    Returns how many were taken back: the graph is another one then.
    """
    stands: dict[int, fx.Node] = {}
    wrong: set[fx.Node] = set()
    for item in items:
        if not item.repeat:
            continue
        again, node = joint.problem.forward[item.index].again, joint.forward[item.index]
        assert again is not None
        wrong.update(stands[s] for s in again.reads if s in stands)
        for s in again.makes:
            stands.pop(s, None)
            if node.target is SQUEEZE and str(node.args[1]).startswith(_STAND_INS):
                stands[s] = node
    for node in wrong:
        joint.module.graph.erase_node(node)
    return len(wrong)
