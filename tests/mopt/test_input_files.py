"""Inputs from npz files: one call, and calibration batches in each layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mopt.errors import InputError
from mopt.input_files import (
    convert,
    named_arrays,
    nest_inputs,
    read_batches,
    read_call,
    read_flat,
)
from mopt.signature import Signature, TensorSpec


class Pair(nn.Module):
    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        return ids if mask is None else ids * mask


EXAMPLES = {"ids": torch.zeros(2, 3, dtype=torch.int64), "mask": torch.ones(2, 3)}


@pytest.fixture
def file(tmp_path: Path) -> Any:
    def save(**arrays: Any) -> Path:
        path = tmp_path / "x.npz"
        np.savez(path, **arrays)
        return path

    return save


def test_one_call_by_the_names_of_forward(file: Any) -> None:
    found = read_call(file(ids=np.zeros((2, 3), np.int64)), Pair())
    assert list(found) == ["ids"]
    found = read_call(file(anything=np.zeros((2, 3), np.int64)), Pair())
    assert list(found) == ["ids"]  # one array, one input that is needed
    with pytest.raises(InputError, match="lacks 'ids' and has 'idz'") as raised:
        read_call(file(idz=np.zeros(3), mask=np.ones(3)), Pair())
    assert raised.value.code == "input-names"
    assert "rename 'idz'" in str(raised.value.hint)


def test_samples_along_the_first_axis_are_cut_into_batches(file: Any) -> None:
    ids = np.arange(15).reshape(5, 3)
    found = read_batches(file(ids=ids, mask=np.ones((5, 3))), Pair(), EXAMPLES)
    assert len(found) == 2  # the fifth sample does not fill a batch
    assert found[1]["ids"].tolist() == ids[2:4].tolist()
    assert found[1]["mask"].dtype == torch.float32


def test_one_more_axis_holds_batches(file: Any) -> None:
    ids = np.arange(24).reshape(4, 2, 3)
    found = read_batches(file(ids=ids, mask=np.ones((4, 2, 3))), Pair(), EXAMPLES)
    assert len(found) == 4
    assert found[3]["ids"].tolist() == ids[3].tolist()


def test_numbered_arrays_are_batches_of_any_size(file: Any) -> None:
    arrays = {f"ids.{i}": np.full((i + 1, 3), i) for i in range(11)}
    arrays |= {f"mask.{i}": np.ones((i + 1, 3)) for i in range(11)}
    found = read_batches(file(**arrays), Pair(), EXAMPLES)
    assert [batch["ids"].shape[0] for batch in found] == list(range(1, 12))
    del arrays["mask.3"]
    with pytest.raises(InputError, match="lacks 'mask'"):
        read_batches(file(**arrays), Pair(), EXAMPLES)


def test_positional_inputs_come_back_as_tuples(file: Any) -> None:
    path = file(images=np.zeros((4, 2, 3), np.int64))
    found = read_batches(path, Pair(), (EXAMPLES["ids"],))
    assert [type(batch) for batch in found] == [tuple] * 4
    numbered = file(**{"images.0": np.zeros((7, 3), np.int64)})
    ((batch,),) = read_batches(numbered, Pair(), (EXAMPLES["ids"],))
    assert batch.shape == (7, 3)


@pytest.mark.parametrize(
    ("arrays", "code", "said"),
    [
        ({"ids": np.zeros((4, 3), np.int64)}, "input-names", "lacks 'mask'"),
        ({"ids": np.zeros(3, np.int64), "mask": np.ones((4, 3))}, "calibration-shape",
         r"shape \(3,\), the model takes \(2, 3\)"),
        ({"ids": np.zeros((1, 3), np.int64), "mask": np.ones((1, 3))}, "calibration-empty",
         "holds 1 samples, one batch takes 2"),
        ({"ids": np.zeros((4, 3), np.int64), "mask": np.ones((8, 3))}, "calibration-shape",
         "ids 2, mask 4"),
        ({"ids": np.zeros((4, 3)), "mask": np.ones((4, 3))}, "input-dtype",
         "is float64, the model takes int64"),
    ],
)  # fmt: skip
def test_calibration_that_does_not_fit(
    file: Any, arrays: dict[str, np.ndarray], code: str, said: str
) -> None:
    with pytest.raises(InputError, match=said) as raised:
        read_batches(file(**arrays), Pair(), EXAMPLES)
    assert raised.value.code == code


def test_inputs_that_no_file_can_hold(file: Any) -> None:
    with pytest.raises(InputError, match="is a list"):
        read_batches(file(ids=np.zeros(3)), Pair(), {"ids": [torch.zeros(1)]})


def test_conversion_may_lose_precision_but_no_values() -> None:
    assert convert(np.array([0.1]), torch.float32, "x").dtype == torch.float32
    assert convert(np.array([7]), torch.int32, "x").tolist() == [7]
    for array, dtype in (
        (np.array([2**40]), torch.int32),
        (np.array([0.5]), torch.int64),
        (np.array([1]), torch.float32),
        (np.array([2]), torch.bool),
    ):
        with pytest.raises(InputError, match="the model takes"):
            convert(array, dtype, "x")


SIGNATURE = Signature(
    inputs=(TensorSpec("a", "float32", (2,)), TensorSpec("b", "int64", ("n",))),
    outputs=(),
    args=({"tuple": [{"leaf": 1}, {"value": 3}]},),
    kwargs={"a": {"leaf": 0}},
    result={"tuple": []},
)


def test_flat_inputs_find_their_nesting(file: Any) -> None:
    flat = read_flat(file(b=np.array([1, 2]), a=np.zeros(2)), SIGNATURE)
    assert [tensor.dtype for tensor in flat] == [torch.float32, torch.int64]
    args, kwargs = nest_inputs(SIGNATURE, flat)
    assert args[0][0].tolist() == [1, 2]
    assert args[0][1] == 3
    assert list(kwargs) == ["a"]
    assert SIGNATURE.flatten(args, kwargs)[1] is flat[1]


def test_outputs_are_named_by_their_place() -> None:
    one, two = torch.zeros(1), torch.zeros(2, dtype=torch.bfloat16)
    assert list(named_arrays(one)) == ["output_0"]
    assert list(named_arrays((one, two))) == ["output_0", "output_1"]
    nested = named_arrays({"logits": one, "past": [(one, two)], "none": None})
    assert list(nested) == ["logits", "past.0.0", "past.0.1"]
    assert nested["past.0.1"].dtype == np.float32
