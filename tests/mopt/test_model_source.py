"""MODEL on the command line: every form, and what is said when it is wrong."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from mopt.errors import InputError, MoptError, UsageError
from mopt.frontend import capture
from mopt.model_source import load_calibration, load_evaluate, load_source, parse_source


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty current folder; modules imported from it are forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]


def write(name: str, text: str) -> str:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("import torch\nfrom torch import nn\n" + text)
    return name


GOOD = """
def factory():
    return {"model": nn.Linear(4, 2), "example_inputs": (torch.zeros(3, 4),)}
"""


# ---- the forms


def test_zoo() -> None:
    source = load_source("zoo:digits-cnn")
    assert source.name == "digits-cnn"
    assert isinstance(source.model, nn.Module)
    assert source.evaluate is not None
    assert source.calibration is not None
    first, again = (next(iter(source.calibration))[0] for _ in range(2))
    assert torch.equal(first, again)
    assert source.dynamic_shapes is not None


def test_file_with_a_dict_of_everything() -> None:
    write("app/net.py", """
from beside import WIDTH

def make_small():
    return {
        "model": nn.Linear(WIDTH, 2),
        "example_inputs": {"input": torch.zeros(3, WIDTH)},
        "dynamic_shapes": {"input": {0: torch.export.Dim("batch")}},
        "calibration": [{"input": torch.ones(3, WIDTH)}],
        "evaluate": lambda run: 0.5,
    }
""")  # fmt: skip
    write("app/beside.py", "WIDTH = 4\n")
    source = load_source("app/net.py:make_small")
    assert source.name == "make_small"
    assert list(source.example_inputs) == ["input"]
    assert source.calibration is not None and len(list(source.calibration)) == 1
    assert source.evaluate is not None and source.evaluate(None) == 0.5


def test_module_is_found_in_the_current_folder() -> None:
    write("some_package/__init__.py", "")
    write("some_package/nets.py", GOOD)
    source = load_source("some_package.nets:factory")
    assert source.name == "nets"  # "factory" says nothing


def test_a_module_may_carry_its_own_inputs() -> None:
    write("net.py", """
def factory():
    model = nn.Linear(4, 2)
    model.example_input_array = torch.zeros(3, 4)
    return model

class Namespace:
    ready = nn.Linear(4, 2)
    ready.example_inputs = (torch.zeros(1, 4),)
""")  # fmt: skip
    (example,) = load_source("net.py:factory").example_inputs
    assert example.shape == (3, 4)
    assert load_source("net.py:Namespace.ready").name == "ready"


def test_inputs_from_a_file_serve_a_factory_that_gives_none() -> None:
    np.savez("x.npz", input=np.zeros((3, 4), np.float32))
    source = load_source("torch.nn:Identity", inputs="x.npz")
    assert source.example_inputs["input"].shape == (3, 4)
    with pytest.raises(InputError, match="without example inputs") as raised:
        load_source("torch.nn:Identity")
    assert raised.value.code == "missing-example-inputs"
    assert "--inputs" in str(raised.value.hint)


class Two(nn.Module):
    """Takes one input by position and one by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor, *, y: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"sum": self.layer(x) + y}


def save_pt2(name: str) -> Two:
    model = Two().eval()
    batch = torch.export.Dim("batch")
    exported = torch.export.export(
        model, (torch.randn(2, 4),), {"y": torch.randn(2, 3)},
        dynamic_shapes={"x": {0: batch}, "y": {0: batch}},
    )  # fmt: skip
    torch.export.save(exported, name)
    return model


def test_pt2_is_refused_unless_trusted() -> None:
    save_pt2("saved.pt2")
    with pytest.raises(UsageError, match="runs code that the file brings along") as raised:
        load_source("saved.pt2")
    assert raised.value.code == "untrusted-file"
    assert "--trust" in str(raised.value.hint)


def test_a_trusted_pt2_keeps_inputs_and_dynamic_sizes() -> None:
    model = save_pt2("saved.pt2")
    source = load_source("saved.pt2", trust=True)
    assert "ran code" in source.trust_note
    program = capture(source.model, source.example_inputs, source.dynamic_shapes)
    assert program.coverage.is_whole
    x, y = torch.randn(5, 4), torch.randn(5, 3)
    with torch.no_grad():
        torch.testing.assert_close(program.run(x, y)["sum"], model(x, y=y)["sum"])


def test_a_damaged_pt2_is_an_input_error() -> None:
    Path("broken.pt2").write_bytes(b"PK not really")
    with pytest.raises(InputError) as raised:
        load_source("broken.pt2", trust=True)
    assert raised.value.code == "bad-pt2"


# ---- what is wrong, said so that it can be mended


@pytest.mark.parametrize(
    ("text", "code", "said"),
    [
        ("zoo:brt", "unknown-model", "did you mean 'bert'?"),
        ("bert", "bad-model", "did you mean zoo:bert?"),
        ("weights.pth", "bad-model", "write a factory"),
        ("what is this", "bad-model", "zoo:NAME"),
        ("nett.py:factory", "file-not-found", "did you mean net.py?"),
        ("net.py", "bad-reference", "in the file: factory, other"),
        ("net.py:not a name", "bad-reference", "write package.module:factory"),
        ("saved.pt2", "file-not-found", "no file 'saved.pt2'"),
        ("hf:nowhere", "folder-not-found", "nothing is downloaded"),
        ("folder", "bad-model", "did you mean hf:folder?"),
    ],
)
def test_names_that_name_nothing(text: str, code: str, said: str) -> None:
    write("net.py", GOOD + "def other(): pass\n")
    write("folder/config.json", "")
    with pytest.raises(MoptError) as raised:
        parse_source(text)
    assert raised.value.code == code
    assert said in str(raised.value)
    assert raised.value.exit_code == 2


@pytest.mark.parametrize(
    ("text", "code", "said"),
    [
        ("net.py:factry", "unknown-factory", "did you mean 'factory'?"),
        ("absent_package.net:factory", "module-not-found", "no module 'absent_package.net'"),
        ("net:factory", None, ""),
    ],
)
def test_objects_that_are_not_there(text: str, code: str | None, said: str) -> None:
    write("net.py", GOOD)
    if code is None:
        load_source(text)
        return
    with pytest.raises(MoptError, match=said.replace("?", r"\?")) as raised:
        load_source(text)
    assert raised.value.code == code


@pytest.mark.parametrize(
    ("body", "code", "said"),
    [
        ("return [1, 2]", "bad-factory", "returned [1, 2]"),
        ("return {'example_inputs': 1}", "bad-factory", "'model' is missing"),
        ("return {'model': 3}", "bad-factory", "'model' is a int"),
        ("return {'model': nn.Linear(1, 1), 'example_input': 1}", "unknown-factory-key",
         "did you mean 'example_inputs'?"),
        ("return {'model': nn.Linear(1, 1)}", "missing-example-inputs", "without example inputs"),
        ("return {'model': nn.Linear(1, 1), 'example_inputs': 'x'}", "bad-example-inputs", "'x'"),
        ("return {'model': nn.Linear(1, 1), 'example_inputs': ()}", "bad-example-inputs", "()"),
        ("return {'model': nn.Linear(1, 1), 'example_inputs': (torch.zeros(1),), "
         "'calibration': 3}", "bad-calibration", "is a int"),
        ("return {'model': nn.Linear(1, 1), 'example_inputs': (torch.zeros(1),), "
         "'evaluate': 3}", "bad-evaluate", "is a int"),
    ],
)  # fmt: skip
def test_factories_that_return_something_else(body: str, code: str, said: str) -> None:
    write("net.py", f"def factory():\n    {body}\n")
    with pytest.raises(MoptError) as raised:
        load_source("net.py:factory")
    assert raised.value.code == code
    assert said in str(raised.value)


def test_a_factory_that_raises_shows_only_the_users_frames() -> None:
    write("net.py", """
def inner(width):
    return nn.Linear(width, "wide")

def factory():
    return inner(3)
""")  # fmt: skip
    with pytest.raises(InputError) as raised:
        load_source("net.py:factory")
    text = raised.value.message
    assert raised.value.code == "factory-failed"
    assert text.startswith("factory 'net.py:factory' failed")
    assert "net.py:8 in factory" in text
    assert "return inner(3)" in text
    assert "net.py:5 in inner" in text
    assert "TypeError" in text
    assert "user_code.py" not in text
    assert "torch/nn" not in text
    assert "frames of mopt and torch are hidden" in text
    assert raised.value.__cause__ is not None


def test_a_factory_that_leaves_python_is_an_error_of_the_factory() -> None:
    write("net.py", "import sys\ndef factory():\n    sys.exit(0)\n")
    with pytest.raises(InputError, match="SystemExit"):
        load_source("net.py:factory")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("def factory(:\n", "SyntaxError"),
        ("import package_that_is_not_there\n", "install 'package_that_is_not_there'"),
        ("1 / 0\n", "ZeroDivisionError"),
    ],
)
def test_a_file_that_cannot_be_imported_says_where(text: str, said: str) -> None:
    write("net.py", text)
    for reference in ("net.py:factory", "net:factory"):
        with pytest.raises(InputError) as raised:
            load_source(reference)
        assert raised.value.code == "import-failed"
        assert said in str(raised.value)
        assert "net.py" in str(raised.value)


# ---- calibration and evaluation named beside MODEL


def test_calibration_from_a_function_starts_anew_each_time() -> None:
    write("net.py", GOOD + """
def batches():
    for i in range(3):
        yield (torch.full((3, 4), float(i)),)

once = batches()
""")  # fmt: skip
    source = load_source("net.py:factory")
    batches = load_calibration("net.py:batches", source)
    assert [len(list(batches)) for _ in range(2)] == [3, 3]
    once = load_calibration("net.py:once", source)
    assert iter(once) is once  # so that a reader knows to keep what it read


def test_calibration_that_fails_half_way_shows_the_users_frames() -> None:
    write("net.py", GOOD + """
def batches():
    yield (torch.zeros(3, 4),)
    raise OSError("no such image")
""")  # fmt: skip
    batches = load_calibration("net.py:batches", load_source("net.py:factory"))
    with pytest.raises(InputError, match="no such image") as raised:
        list(batches)
    assert raised.value.code == "calibration-failed"
    assert "in batches" in raised.value.message


def test_evaluate_keeps_its_attributes_and_shows_the_users_frames() -> None:
    write("net.py", """
def accuracy(run):
    return run(3)
accuracy.higher_is_better = False
""")  # fmt: skip
    evaluate = load_evaluate("net.py:accuracy")
    assert evaluate.__name__ == "accuracy"
    assert evaluate.higher_is_better is False
    assert evaluate(lambda x: x + 1) == 4

    def fails(x: int) -> None:
        raise ValueError("bad batch")

    with pytest.raises(InputError, match="bad batch") as raised:
        evaluate(fails)
    assert raised.value.code == "evaluate-failed"

    def refused(x: int) -> None:
        raise InputError("wrong shape", code="input-shape")

    with pytest.raises(InputError) as raised:
        evaluate(refused)  # what mopt says itself stays as it is
    assert raised.value.code == "input-shape"
