"""The trained models reach their recorded quality, and the measures mean what they say."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from mopt import models
from mopt.models import digits_cnn, pydoc_gpt

CHECKPOINTS = Path(models.__file__).parent / "checkpoints"

# Measured once with the stored checkpoints, on one thread.
DIGITS_RIGHT = 538
PYDOC_BITS = 1.59175
# Sums in another order move the mean of 65,536 losses by far less.
PYDOC_TOLERANCE = 0.002


@cache
def built(name: str) -> nn.Module:
    return models.load(name).build()


def runs_at_example_shapes(name: str, seen: list[Tensor]) -> Iterator[bool]:
    wanted = models.load(name).example_inputs()[0]
    return ((x.shape, x.dtype) == (wanted.shape, wanted.dtype) for x in seen)


def test_checkpoints_stay_small_and_in_half_precision() -> None:
    files = [path for path in CHECKPOINTS.iterdir() if path.suffix != ".py" and path.is_file()]
    assert sum(path.stat().st_size for path in files) < 16_000_000
    for name in ("digits-cnn", "pydoc-gpt"):
        kinds = {tensor.dtype for tensor in load_file(CHECKPOINTS / f"{name}.safetensors").values()}
        assert kinds <= {torch.float16, torch.int64}


def test_digits_accuracy() -> None:
    result = digits_cnn.evaluate(built("digits-cnn"))
    assert (result["metric"], result["higher_is_better"]) == ("accuracy", True)
    # One image may change sides when convolutions round differently.
    assert result["value"] == pytest.approx(DIGITS_RIGHT / 540, abs=1.01 / 540)


def test_digits_accuracy_of_a_constant_answer_is_its_share() -> None:
    seen: list[Tensor] = []

    def always_three(images: Tensor) -> Tensor:
        seen.append(images)
        return torch.eye(10)[3].expand(len(images), 10)

    labels = digits_cnn.split("heldout")[1]
    result = digits_cnn.evaluate(always_three)
    assert result["value"] == pytest.approx((labels == 3).float().mean().item())
    assert all(runs_at_example_shapes("digits-cnn", seen))


def test_digits_parts_share_no_image_by_index_and_are_all_used() -> None:
    training, heldout = (digits_cnn.split(part)[0] for part in ("training", "heldout"))
    assert (len(training), len(heldout)) == (1257, 540)
    stored = load_file(CHECKPOINTS / "digits-images.safetensors")["images"].float() / 16
    together = torch.cat((training, heldout)).flatten(1)
    assert sorted(together.tolist()) == sorted(stored.flatten(1).tolist())
    calibration = torch.cat([batch for (batch,) in digits_cnn.calibration()])
    known = {tuple(row) for row in training.flatten(1).tolist()}
    assert {tuple(row) for row in calibration.flatten(1).tolist()} <= known


def test_pydoc_bits_per_byte() -> None:
    result = pydoc_gpt.evaluate(built("pydoc-gpt"))
    assert (result["metric"], result["higher_is_better"]) == ("bits per byte", False)
    assert result["value"] == pytest.approx(PYDOC_BITS, abs=PYDOC_TOLERANCE)


def test_pydoc_bits_of_a_uniform_guess_are_eight() -> None:
    seen: list[Tensor] = []

    def uniform(ids: Tensor) -> Tensor:
        seen.append(ids)
        return torch.zeros(*ids.shape, 256)

    assert pydoc_gpt.evaluate(uniform)["value"] == pytest.approx(8.0, abs=1e-5)
    assert all(runs_at_example_shapes("pydoc-gpt", seen))
    assert sum(ids.numel() for ids in seen) == 65_536


def test_pydoc_bits_count_each_byte_once_against_its_successor() -> None:
    """A run that knows the next byte with probability 1/2 + 1/512 costs log2 of that."""
    text = load_file(pydoc_gpt.TEXT)["heldout"]
    following = iter(pydoc_gpt.windows(text)[:, 1:].split(pydoc_gpt.BATCH))

    def half_sure(ids: Tensor) -> Tensor:
        right = nn.functional.one_hot(next(following), 256).float()
        return (0.5 * right + 0.5 / 256).log()

    cost = -math.log2(0.5 + 0.5 / 256)
    assert pydoc_gpt.evaluate(half_sure)["value"] == pytest.approx(cost, abs=1e-5)


def test_pydoc_text_held_out_is_not_in_calibration() -> None:
    texts = load_file(pydoc_gpt.TEXT)
    heldout, calibration = (
        " ".join(bytes(texts[part].tolist()).decode(errors="replace").split())
        for part in ("heldout", "calibration")
    )
    assert len(texts["heldout"]) == 65_537
    assert len(texts["calibration"]) == 131_073
    runs = {heldout[i : i + 80] for i in range(len(heldout) - 79)}
    assert not any(calibration[i : i + 80] in runs for i in range(len(calibration) - 79))


def test_generated_text_is_greedy() -> None:
    model = built("pydoc-gpt")
    prompt = b"The for statement is used to "
    text = pydoc_gpt.generate(model, prompt, 8)
    for count in range(8):
        seen = torch.tensor([list(prompt + text[:count])])
        with torch.no_grad():
            assert int(model(seen)[0, -1].argmax()) == text[count]


def test_generated_text_comes_from_the_last_window_of_a_long_prompt() -> None:
    model = built("pydoc-gpt")
    tail = bytes(range(32, 96)) * 4
    assert pydoc_gpt.generate(model, b"other text " + tail, 1) == pydoc_gpt.generate(model, tail, 1)


def test_generating_needs_a_prompt() -> None:
    with pytest.raises(ValueError, match="at least one byte"):
        pydoc_gpt.generate(built("pydoc-gpt"), b"", 1)


def test_sample_is_one_line_that_starts_with_the_prompt() -> None:
    sample = models.load("pydoc-gpt").sample
    assert sample is not None
    line = sample(built("pydoc-gpt"))
    assert line.startswith("The for statement is used to ")
    assert len(line) > 60
    assert "\n" not in line
