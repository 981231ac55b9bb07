"""plan-tiers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mopt.device import find_device
from mopt.errors import UsageError
from mopt.pass_base import PassContext
from mopt.pipeline import Pipeline
from mopt.registry import make_pass
from tests.case import Case, Sample
from tests.tiny import Apply, normal, sample


def of(function: Any, *inputs: Tensor) -> Sample:
    """A sample of ``function(x, ...)`` without weights."""
    return sample(Apply(lambda m, *xs: function(*xs)), *(inputs or (normal(16, 16),)))


def two_large_ones_together(x: Tensor) -> Tensor:
    large = x.repeat(8, 8), x.repeat(8, 8)
    small = large[0].sum(0), large[1].sum(0)
    return small[0] + small[1]


def written_between(x: Tensor) -> Tensor:
    y = x.repeat(4, 4)
    before = y.repeat(2, 2).sum(0)
    y.add_(1)
    return before + y.repeat(2, 2).sum(0)


def block() -> nn.Module:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(64, 256), nn.Linear(256, 64)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.down(torch.relu(self.up(x)))

    return Block().eval()


CASES = [
    Case("one-large-one-at-a-time", of(two_large_ones_together), changed=True,
         options={"fast_memory": "70KiB"}),
    Case("room-for-everything", of(two_large_ones_together), changed=False,
         options={"fast_memory": "100%"}),
    Case("writes-stay-in-place", of(written_between), changed=False,
         options={"fast_memory": "20KiB", "fuse": False}),
]  # fmt: skip


def planned(source: Sample, device: str | None = None, **options: Any) -> dict[str, Any]:
    """What plan-tiers stores."""
    context = PassContext(device=find_device(device) if device else None)
    program = Pipeline([make_pass("plan-tiers", options)]).run(source.capture(), context)
    data: dict[str, Any] = program.plan["tiers"]
    return data


def test_a_plan_tells_what_it_moves_and_what_a_cache_would() -> None:
    data = planned(of(two_large_ones_together), fast_memory="70KiB")
    assert data["extra_bytes"] == data["extra_bound_bytes"] == 0
    assert data["least_recently_used_extra_bytes"] > 0
    assert data["compulsory_bytes"] == 16 * 16 * 4 + 128 * 4
    assert data["estimated"]["seconds"] >= data["estimated"]["compute_seconds"] > 0


def test_elementwise_calls_belong_to_what_makes_their_input() -> None:
    source = Sample(block(), (normal(8, 64),))
    fused = planned(source, fast_memory="50%")
    assert [step["calls"] for step in fused["steps"]] == [["linear", "relu"], ["linear_1", "add"]]
    apart = planned(source, fast_memory="50%", fuse=False)
    assert len(apart["steps"]) == 4


def test_one_factor_of_a_product_lies_in_the_fast_memory() -> None:
    source = Sample(block(), (normal(8, 64),))
    data = planned(source, fast_memory="24KiB")
    # 64 KiB of weights stream by while the 2 KiB input of the first and the 8 KiB of the second
    # product lie there.
    streamed = {window["value"] for window in data["windows"]}
    assert {"up_weight", "down_weight"} <= streamed
    assert data["extra_bytes"] == 0


def test_weights_may_lie_elsewhere() -> None:
    source = Sample(block(), (normal(8, 64),))
    data = planned(source, fast_memory="100%", weights=False)
    assert data["compulsory_bytes"] == 2 * 8 * 64 * 4
    assert not any("weight" in value["id"] for value in data["values"])


def test_tables_are_read_by_the_rows_looked_up() -> None:
    table = nn.Sequential(nn.Embedding(1000, 16), nn.Linear(16, 4)).eval()
    data = planned(Sample(table, (torch.tensor([[1, 2, 3]]),)), fast_memory="100%")
    sizes = {value["id"]: value["bytes"] for value in data["values"]}
    assert min(size for name, size in sizes.items() if "weight" in name) == 3 * 16 * 4
    assert sum(sizes.values()) < 1000


def test_a_microcontroller_reads_its_weights_from_flash() -> None:
    data = planned(Sample(block(), (normal(8, 64),)), "cortex-m7")
    assert (data["fast"], data["slow"]) == ("sram", "flash")
    assert data["fast_bytes"] == 256 * 1024
    assert not data["spills"]


def test_a_gpu_reads_from_its_host() -> None:
    data = planned(Sample(block(), (normal(8, 64),)), "h200", fast_memory="50%")
    assert (data["fast"], data["slow"]) == ("hbm", "host")
    assert data["link"]["bandwidth"] == pytest.approx(55.4e9)


def test_time_may_count_instead_of_bytes() -> None:
    source = Sample(block(), (normal(8, 64),))
    few = planned(source, fast_memory="40%")
    fast = planned(source, fast_memory="40%", minimise="time")
    assert fast["estimated"]["seconds"] <= few["estimated"]["seconds"]


def test_the_size_of_the_fast_memory_is_needed() -> None:
    with pytest.raises(UsageError, match="needs the size") as caught:
        planned(of(two_large_ones_together))
    assert caught.value.code == "fast-memory"
    with pytest.raises(UsageError, match="one memory") as caught:
        planned(of(two_large_ones_together), "cpu-avx2")
    assert caught.value.code == "no-tiers"
