"""A Llama-8B-shaped block that decodes one token: int4 kernels beside bf16 in CUDA graphs."""

from __future__ import annotations

from typing import Any

# isort: off
from triton_clock import Bench  # first: it makes mopt importable
import torch
import triton_checks as checked
from mopt.backends.triton.kernel import problem
from mopt.backends.triton.kernels import flash_attention, linear_codes, rms_norm, rotary, swiglu
from mopt.backends.triton.lowerings.attention import FLASH_ATTENTION
from mopt.backends.triton.lowerings.linear_codes import LINEAR_CODES
from triton_sections import attention_facts
# isort: on

_functional = torch.nn.functional


class _Int4:
    """A linear layer by the kernel, with the first tile by estimate that fits."""

    def __init__(self, bench: Bench, outputs: int, columns: int, rows: int) -> None:
        self.run = bench.run
        self.weight, self.values = checked.random_weight(
            "int4", outputs, columns, bench.device, torch.bfloat16
        )
        facts = problem("linear-codes", kind="int4", outputs=outputs, columns=columns,
                        group=self.weight.group, units=self.weight.units, zeros=False, bias=False,
                        itemsize=2, rows=rows)  # fmt: skip
        self.counters = torch.zeros(
            linear_codes.counters_needed(self.weight), dtype=torch.int32, device=bench.device
        )
        x = bench.randn(rows, columns)
        name = bench.tuned(LINEAR_CODES, facts, lambda t: [lambda: self._call(x, t)])[1]
        self.tile = next(t for t in bench.fitting(LINEAR_CODES, facts) if str(t) == name)

    def _call(self, x: torch.Tensor, tile: Any) -> torch.Tensor:
        return linear_codes.call(self.run, tile, x, self.weight, None, self.counters)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._call(x, self.tile)


class Block:
    """Weights of one block and a cache of keys and values."""

    def __init__(self, bench: Bench, rows: int, keys: int) -> None:
        self.run, self.rows, self.keys = bench.run, rows, keys
        self.width, self.inner = bench.size(4096, 128), bench.size(14_336, 256)
        self.heads, self.group, self.head = bench.size(8, 1), 4, bench.size(128, 32)
        self.queries = self.heads * self.group * self.head
        kept = self.heads * self.head
        # One product for q, k and v, and one for gate and up: few rows leave launches to be paid.
        shapes = {"qkv": (self.queries + 2 * kept, self.width), "out": (self.width, self.queries),
                  "up": (2 * self.inner, self.width), "down": (self.width, self.inner)}  # fmt: skip
        self.layers = {name: _Int4(bench, *shape, rows) for name, shape in shapes.items()}
        self.dense = {name: layer.values.bfloat16() for name, layer in self.layers.items()}
        self.norm = bench.randn(self.width)
        self.cache = bench.randn(rows, self.heads, keys, self.head)
        angle = torch.rand(rows, self.head // 2, device=bench.device)
        self.cos, self.sin = angle.cos(), angle.sin()
        facts = attention_facts(rows, self.heads, 4, 1, keys, self.head, 2, False)
        self.tile = bench.fitting(FLASH_ATTENTION, facts)[0]

    def bytes(self) -> float:
        """Bytes of codes, scales and cache that one token reads."""
        codes = sum(layer.weight.bytes for layer in self.layers.values())
        return codes + 4.0 * self.cache.numel()

    def _split(self, mixed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        turned = mixed[:, : self.queries + self.heads * self.head].contiguous()
        return turned.view(self.rows, -1, self.head), mixed

    def ours(self, x: torch.Tensor) -> torch.Tensor:
        """The block by mopt's kernels."""
        y = rms_norm.forward(self.run, x, self.norm, 1e-5)[0]
        turned, _ = self._split(self.layers["qkv"](y))
        turned = rotary.call(self.run, turned, self.cos, self.sin)
        q = turned[:, : self.heads * self.group].unsqueeze(2)
        self.cache[:, :, -1] = turned[:, self.heads * self.group :]
        mixed = flash_attention.call(self.run, self.tile, q, self.cache, self.cache)[0]
        x = x + self.layers["out"](mixed.reshape(self.rows, -1))
        y = rms_norm.forward(self.run, x, self.norm, 1e-5)[0]
        gate, up = self.layers["up"](y).chunk(2, -1)
        middle = swiglu.forward(self.run, gate.contiguous(), up.contiguous())
        return x + self.layers["down"](middle)

    def eager(self, x: torch.Tensor) -> torch.Tensor:
        """The block by PyTorch in bf16."""
        y = _functional.rms_norm(x, (self.width,), self.norm, 1e-5)
        turned, _ = self._split(_functional.linear(y, self.dense["qkv"]))
        turned = rotary.reference(turned, self.cos.bfloat16(), self.sin.bfloat16())
        q = turned[:, : self.heads * self.group].unsqueeze(2)
        self.cache[:, :, -1] = turned[:, self.heads * self.group :]
        mixed = _functional.scaled_dot_product_attention(q, self.cache, self.cache, enable_gqa=True)
        x = x + _functional.linear(mixed.reshape(self.rows, -1), self.dense["out"])
        y = _functional.rms_norm(x, (self.width,), self.norm, 1e-5)
        gate, up = _functional.linear(y, self.dense["up"]).chunk(2, -1)
        return x + _functional.linear(_functional.silu(gate) * up, self.dense["down"])


def llama_block(bench: Bench) -> None:
    """One token for each of 1 and 16 sequences, with a cache of 1024 tokens."""
    for rows in (1, 16):
        block = Block(bench, bench.size(rows, 2), bench.size(1024, 33))
        x = bench.randn(block.rows, block.width)
        found, right = block.ours(x).double(), block.eager(x).double()
        error = float((found - right).abs().max() / right.abs().max())
        seconds = bench.seconds([lambda b=block, x=x: b.ours(x)])  # type: ignore[misc]
        theirs = bench.seconds([lambda b=block, x=x: b.eager(x)])  # type: ignore[misc]
        bench.row(f"Llama-8B block, int4, {block.rows} sequences", seconds, bytes=block.bytes(),
                  peer=theirs, against="bf16 eager in a CUDA graph",
                  note=f"differs by {error:.1e}", least_ratio=2.5)  # fmt: skip
        if not error <= 5e-2:
            raise AssertionError(f"the block differs from bf16 eager by {error:.1e}")
