"""Interpreting kernels leaves nothing behind in the process."""

from __future__ import annotations

import os

import torch
import triton.language as tl
from triton.runtime.jit import JITFunction

from mopt.backends.triton.aot import compile_launch
from mopt.backends.triton.architectures import ARCHITECTURES
from mopt.backends.triton.interpreter import run_interpreted
from mopt.backends.triton.kernels import linear_codes
from mopt.backends.triton.launch import Recorder, tile
from mopt.backends.triton.planes import pack_blocks

CONFIG = tile(4, 2, BM=16, BN=32, SPLIT=1)


def arguments() -> tuple:
    codes = torch.randint(0, 255, (32, 2, 16), dtype=torch.uint8)
    weight = pack_blocks(codes, torch.rand(32, 2), None, 4, 64)
    return weight, torch.zeros(linear_codes.counters_needed(weight), dtype=torch.int32)


def test_the_language_is_as_before_and_compiles() -> None:
    modules = (tl, tl.core, tl.math, tl.standard, tl.core.tensor)
    before = [dict(vars(module)) for module in modules]
    weight, counters = arguments()
    linear_codes.call(run_interpreted, CONFIG, torch.randn(2, 64), weight, None, counters)
    assert [dict(vars(module)) for module in modules] == before
    assert isinstance(tl.sum, JITFunction) and isinstance(linear_codes.linear_codes, JITFunction)
    assert "TRITON_INTERPRET" not in os.environ

    recorder = Recorder()
    x = torch.empty(2, 64, device="meta")
    linear_codes.call(recorder, CONFIG, x, weight.to("meta"), None, counters.to("meta"))
    (launch,) = recorder.launches.values()
    assert compile_launch(launch, ARCHITECTURES["sm_90"]).registers > 0


def test_sixteen_bit_outputs_are_rounded_to_nearest() -> None:
    weight, counters = arguments()
    x = torch.randn(5, 64).bfloat16()
    out = linear_codes.call(run_interpreted, CONFIG, x, weight, None, counters)
    wide = linear_codes.call(run_interpreted, CONFIG, x.float(), weight, None, counters)
    assert out.dtype == torch.bfloat16 and torch.equal(out, wide.bfloat16())
