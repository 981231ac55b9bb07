"""Store weights in 16 bits and compute in 32."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from mopt.formats.base import require_finite, shared_weight
from mopt.formats.half import Half, widen_argument
from mopt.layers import EMBEDDING
from mopt.pass_base import Numerics, Pass, PassContext, PassResult, Skip, option, register_pass
from mopt.passes.quantize._weights import relative_error
from mopt.program import Program, module_path, source_line


@register_pass("store-half", numerics=Numerics.LOSSY)
@dataclass(frozen=True, kw_only=True)
class StoreHalf(Pass):
    """Store weights in 16 bits and compute in 32.

    ## When to use
    To halve the size of a file without any risk to quality, for example where int8 is not good
    enough. Speed and memory at run time stay about the same: a runtime widens most weights when it
    loads the model.

    ## Accuracy
    float16 keeps 11 bits of each weight. A weight whose values float16 cannot hold (above 65504,
    or so small that they would become zero) is stored in bfloat16, which keeps 8 bits.

    ## Limits
    float32 weights of at least `min_size` values; biases and norms are not worth it.

    ## Example
    A linear of 384 x 384 becomes 295 kB instead of 590 kB.
    """

    dtype: str = option("fp16", choices=("fp16", "bf16"), help="what to store")
    kinds: str = option("all", choices=("all", "embeddings"), help="which weights")
    min_size: int = option(1024, min=0, help="leave weights with fewer values alone")

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        readers: dict[str, list[fx.Node]] = {}
        for node in program.nodes:
            if node.op == "get_attr" and node.users and not _is_part_of_format(node):
                readers.setdefault(str(node.target), []).append(node)
        formats: dict[str, str] = {}
        error: dict[str, float] = {}
        skipped: list[Skip] = []
        for target, nodes in readers.items():
            weight = program.weight(nodes[0])
            users = [user for node in nodes for user in node.users]
            paths = list(dict.fromkeys(_path(program, target, user) for user in users))
            path = paths[0]
            if not weight.is_floating_point() or not self.selects(path):
                continue
            if self.kinds == "embeddings" and not any(u.target in EMBEDDING for u in users):
                continue
            require_finite(weight, path, source_line(users[0]))
            if weight.numel() < self.min_size:
                continue
            chosen = self._choose(weight)
            if isinstance(chosen, str):
                skipped.append(Skip(path, chosen))
                continue
            encoded = chosen.encode(weight)
            _place(program, nodes, encoded.tensors[chosen.name])
            formats.update(dict.fromkeys(paths, chosen.name))
            error[path] = relative_error(weight, chosen.decode(encoded))
        program.plan.setdefault("formats", {}).update(formats)
        return PassResult(
            changed=bool(formats),
            stats={"layers": len(formats), "formats": formats, "weight_error": error},
            skipped=skipped,
        )

    def _choose(self, weight: torch.Tensor) -> Half | str:
        reason = ""
        for name in (self.dtype, "bf16"):
            chosen = Half(name)
            found = chosen.range_reason(weight)
            if found is None:
                return chosen
            reason = reason or found
        return reason


def _place(program: Program, readers: list[fx.Node], stored: torch.Tensor) -> None:
    first = readers[0]
    half = shared_weight(program, f"{first.target}_half", stored, first)
    for reader in readers:
        for call in list(reader.users):
            widen_argument(program, call, reader, half)
        program.graph.erase_node(reader)


def _is_part_of_format(node: fx.Node) -> bool:
    """Whether a weight is a scale or a code table of an operator that has its own storage."""
    return any(str(user.target).startswith("mopt.") for user in node.users)


def _path(program: Program, target: str, user: fx.Node) -> str:
    path = module_path(user) or target.rpartition(".")[0] or target
    return f"{program.path}.{path}" if program.path else path
