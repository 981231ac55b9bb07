"""Memory plans as C headers and as TensorFlow Lite Micro's metadata."""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from mopt.errors import InputError
from mopt.memory_files import c_header, plan_offsets, tflm_metadata
from mopt.pipeline import Pipeline
from mopt.registry import make_pass
from tests.case import Sample
from tests.tiny import normal


def plan() -> dict[str, Any]:
    """The device plan of two linears with an activation between."""
    net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)).eval()
    program = Sample(net, (normal(2, 16),)).capture()
    found = Pipeline([make_pass("plan-memory", {})]).run(program).plan["memory"]
    assert isinstance(found, dict)
    return found


def test_the_header_states_every_buffer() -> None:
    text = c_header(plan(), "tiny net */ 1")
    assert "#define TINY_NET____1_ARENA_BYTES 384u" in text
    assert "/* relu */" in text and "TINY_NET____1_RELU = 2," in text
    assert text.count("*/") == 5  # four buffers and the head: the name could not end a comment


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_the_header_compiles(tmp_path: Path) -> None:
    (tmp_path / "plan.h").write_text(c_header(plan(), "net"))
    (tmp_path / "main.c").write_text(
        '#include "plan.h"\n#include <stdio.h>\nint main(void) { printf("%u %u", NET_ARENA_BYTES,'
        " net_buffers[NET_RELU].bytes); return 0; }\n"
    )
    subprocess.run(["cc", "-std=c99", "-Wall", "-Werror", "-pedantic", "main.c", "-o", "main"],
                   cwd=tmp_path, check=True)  # fmt: skip
    out = subprocess.run([tmp_path / "main"], capture_output=True, text=True, check=True).stdout
    assert out == "384 256"


def test_metadata_is_what_tensorflow_lite_micro_reads() -> None:
    found = plan()
    offsets = plan_offsets(found, ["input", "weight", "linear", "relu", "linear_1"])
    assert offsets[1] is None and offsets[2] == offsets[3] != offsets[4]
    data = tflm_metadata([64, None, 0])
    assert struct.unpack("<6i", data) == (1, 0, 3, 64, -1, 0)


def test_what_no_device_can_use_is_refused() -> None:
    with pytest.raises(InputError, match="tensor 1 does not fit in 31 bits"):
        tflm_metadata([0, 1 << 31])
    outside = plan()
    outside["buffers"][0]["where"] = "beside"
    with pytest.raises(InputError, match="1 buffers of the plan lie outside"):
        c_header(outside, "net")
