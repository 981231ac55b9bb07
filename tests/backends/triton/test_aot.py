"""Every kernel compiles without a GPU, fits its chip and spills nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mopt.backends.triton import aot
from mopt.backends.triton.architectures import ARCHITECTURES
from mopt.backends.triton.catalogue import Entry, catalogue, empty, empty_weight
from mopt.backends.triton.kernels import linear_codes
from mopt.backends.triton.launch import Launch, Recorder, Tile, tile
from mopt.backends.triton.layers import table_key
from mopt.backends.triton.lowerings._masks import Band
from mopt.backends.triton.lowerings.attention import Attention
from mopt.backends.triton.lowerings.linear_codes import LINEAR_CODES, CodesLinear
from mopt.backends.triton.tiles import chip_of, choose, ranked, seconds
from mopt.backends.triton.tuning import LayerTimer
from mopt.cache import Cache
from mopt.device import find_device
from mopt.errors import LoweringError


def launches() -> dict[str, Launch]:
    """Every launch of the catalogue, equal ones once."""
    found = {}
    for entry in catalogue():
        for launch in entry.launches():
            found.setdefault(launch.key(), (f"{entry.name}: {launch.name}", launch))
    return dict(found.values())


ALL = launches()


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_every_kernel_compiles(name: str, arch: str) -> None:
    binary = aot.compile_launch(ALL[name], ARCHITECTURES[arch])
    assert binary.code[:4] == b"\x7fELF" and binary.registers > 0
    assert binary.refusal(ARCHITECTURES[arch]) is None


def layer(kind: str = "int4") -> CodesLinear:
    """A layer that holds nothing."""
    return CodesLinear(empty_weight(kind, 1024, 1024, 128), None)


def test_a_block_that_takes_too_much_memory_is_refused() -> None:
    huge = tile(8, 8, BM=128, BN=128, SPLIT=1)
    (launch,) = layer().launches(512, torch.bfloat16, huge)
    binary = aot.compile_launch(launch, ARCHITECTURES["sm_89"])
    reason = binary.refusal(ARCHITECTURES["sm_89"])
    assert reason is not None and "shared memory, sm_89 has 101376" in reason


def test_a_refused_tile_is_reported_and_gives_way_to_another() -> None:
    found, arch = layer(), ARCHITECTURES["sm_89"]
    huge, small = tile(8, 8, BM=128, BN=128, SPLIT=1), tile(4, 2, BM=32, BN=64, SPLIT=1)
    kernel = type(LINEAR_CODES)(
        "linear-codes", lambda problem: [huge, small], lambda config, problem: None,
        LINEAR_CODES.work,
    )  # fmt: skip
    problems = {512: found.problem(512, torch.bfloat16)}
    chip = chip_of(find_device("l4"))

    def make(rows: int, config: object) -> list[Launch]:
        return found.launches(rows, torch.bfloat16, config)  # type: ignore[arg-type]

    choice = choose(problems, kernel, make, arch, chip, None)
    assert choice.tiles == {512: small} and len(choice.binaries) == 1
    if ranked(problems[512], kernel, chip)[0] == huge:
        assert "shared memory" in choice.rejected[0].reason
    only = type(kernel)("linear-codes", lambda problem: [huge], kernel.legal, kernel.work)
    with pytest.raises(LoweringError) as caught:
        choose(problems, only, make, arch, chip, None)
    assert caught.value.code == "no-legal-tile" and "shared memory" in str(caught.value.hint)


def test_with_a_gpu_the_fastest_of_the_first_few_is_taken() -> None:
    found, arch = layer(), ARCHITECTURES["sm_90"]
    slow, fast, huge = (
        tile(4, 2, BM=32, BN=64, SPLIT=1), tile(4, 2, BM=32, BN=32, SPLIT=1),
        tile(8, 8, BM=128, BN=128, SPLIT=1),
    )  # fmt: skip
    kernel = type(LINEAR_CODES)(
        "linear-codes", lambda problem: [slow, huge, fast], lambda config, problem: None,
        LINEAR_CODES.work,
    )  # fmt: skip
    calls: list[tuple[int, str]] = []

    def clock(call: Callable[[], object]) -> float:
        call()
        return {str(slow): 3e-5, str(fast): 2e-5}[calls[-1][1]]

    recorder = Recorder()
    timer = LayerTimer(found, torch.bfloat16, recorder, "meta", clock)

    def timed(rows: int, config: Tile) -> float:
        calls.append((rows, str(config)))
        return timer(rows, config)

    choice = choose(
        {32: found.problem(32, torch.bfloat16)}, kernel,
        lambda rows, config: found.launches(rows, torch.bfloat16, config), arch,
        chip_of(find_device("h200")), None, timed,
    )  # fmt: skip
    assert choice.tiles == {32: fast} and choice.measured == {
        32: {str(slow): 3e-5, str(fast): 2e-5}
    }
    # A tile that does not fit is not run; both others ran once with their own sizes.
    assert {rows for rows, _ in calls} == {32} and len(calls) == 2
    assert {one.constants["BN"] for one in recorder.launches.values()} == {32, 64}
    assert len(choice.binaries) == 1


def test_a_kernel_the_compiler_refuses_is_named() -> None:
    (launch,) = layer().launches(16, torch.bfloat16, tile(4, 2, BM=8, BN=24, SPLIT=1))
    with pytest.raises(LoweringError) as caught:
        aot.compile_launch(launch, ARCHITECTURES["sm_90"])
    assert caught.value.code == "kernel-compile" and "linear_codes" in str(caught.value)


def test_an_old_triton_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aot, "version", lambda name: "3.1.0")
    with pytest.raises(LoweringError) as caught:
        aot.triton_version()
    assert caught.value.code == "triton-version" and "3.1.0" in str(caught.value)


def test_what_is_assumed_about_sizes_is_part_of_the_key() -> None:
    weight, counters = empty_weight("int4", 1024, 1024, 128), empty(1024, dtype=torch.int32)
    config = tile(4, 2, BM=16, BN=64, SPLIT=1)

    def keys(columns: int, rows: int) -> set[str]:
        x = empty(rows, columns)[:, :1024]
        entry = Entry("", lambda run: linear_codes.call(run, config, x, weight, None, counters))
        return {launch.key() for launch in entry.launches()}

    assert keys(1024, 3) == keys(1024, 16)  # rows change from call to call
    assert keys(1024, 3) != keys(1030, 3)  # rows of an odd length are read in smaller pieces


def test_estimates_prefer_small_blocks_for_few_rows_and_large_ones_for_many() -> None:
    chip = chip_of(find_device("h200"))
    found = CodesLinear(empty_weight("int4", 28_672, 8192, 128), None)
    few, many = (found.problem(rows, torch.bfloat16) for rows in (1, 4096))
    assert ranked(few, LINEAR_CODES, chip)[0]["BM"] == 16
    assert ranked(many, LINEAR_CODES, chip)[0]["BM"] == 128
    # 117 MB of codes and scales at 4.8 TB/s.
    best = seconds(ranked(few, LINEAR_CODES, chip)[0], few, LINEAR_CODES, chip)
    assert 24e-6 < best < 60e-6


def test_a_binary_from_the_cache_is_the_one_that_was_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (launch,) = layer().launches(512, torch.bfloat16, tile(4, 2, BM=32, BN=64, SPLIT=1))
    cache = Cache(tmp_path, worth_seconds=0)
    made = aot.compile_launch(launch, ARCHITECTURES["sm_90"], cache)
    monkeypatch.setattr(aot, "_compile", lambda *a: pytest.fail("compiled again"))
    assert aot.compile_launch(launch, ARCHITECTURES["sm_90"], cache) == made
    assert len(made.assembly) > 4096 and len(made.code) > 4096


def test_a_problem_finds_the_tile_of_its_rows_however_the_sizes_follow() -> None:
    attention = Attention(heads=2, group=4, width=64, band=Band(True), scale=None, batch=3)
    keys = {table_key(attention.problem(rows, torch.bfloat16)) for rows in (1, 16, 64, 4096)}
    assert len(keys) == 1
