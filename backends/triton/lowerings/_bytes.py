"""A linear layer of 8-bit products: the weight as ``linear_bytes`` reads it."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from mopt.backends.triton.kernel import Kernel, Problem, problem
from mopt.backends.triton.kernels import linear_bytes
from mopt.backends.triton.launch import Runner, Tile
from mopt.backends.triton.layers import KernelLayer

LINEAR_BYTES = Kernel("linear-bytes", linear_bytes.space, linear_bytes.legal, linear_bytes.work)


class BytesLinear(KernelLayer):
    """Integers times integers, in the type of the output; what the input is a subclass knows."""

    kernel = LINEAR_BYTES

    def __init__(
        self, codes: Tensor, scales: Tensor, bias: Tensor | None, activation: str = "none"
    ) -> None:
        super().__init__()
        self.outputs, self.columns = codes.shape
        self.activation = activation
        multiple = linear_bytes.PADDED
        rows, columns = -self.outputs % multiple, -self.columns % multiple
        padded = nn.functional.pad(codes, (0, columns, 0, rows))
        self.register_buffer("codes", padded)
        self.register_buffer("scales", nn.functional.pad(scales.float(), (0, rows)))
        self.register_buffer("sums", padded.sum(1, dtype=torch.int32))
        self.register_buffer("bias", bias)

    @abstractmethod
    def quantized(self, run: Runner, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Codes (rows, columns), scale (rows or 1) and zero point (1) of an input."""

    def compute(self, run: Runner, config: Tile, *inputs: Tensor) -> Tensor:
        """The product over the last axis."""
        x = inputs[0]
        codes, scale, zero = self.quantized(run, x.reshape(-1, self.columns).contiguous())
        out = linear_bytes.call(
            run, config, codes, self.codes, scale, self.scales, self.bias, self.outputs,
            zero=zero, sums=self.sums, activation=self.activation, dtype=self.output_type(x),
        )  # fmt: skip
        return out.reshape(*x.shape[:-1], self.outputs)

    def output_type(self, x: Tensor) -> torch.dtype:
        """The type of the output for an input."""
        return x.dtype

    def rows_of(self, *inputs: Tensor) -> tuple[int, torch.dtype]:
        return inputs[0].numel() // self.columns, self.output_type(inputs[0])

    def problem(self, rows: int, dtype: torch.dtype) -> Problem:
        return problem(
            self.kernel.name, kind="int8", outputs=self.outputs, columns=self.columns,
            units=-(-self.columns // linear_bytes.PADDED), bias=self.bias is not None,
            **self.facts(), itemsize=dtype.itemsize, rows=rows,
        )  # fmt: skip

    def facts(self) -> dict[str, Any]:
        """What else tells its kernels from others."""
        return {"activation": self.activation}

    def example(self, rows: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
        return (torch.empty(rows, self.columns, dtype=dtype, device="meta"),)
