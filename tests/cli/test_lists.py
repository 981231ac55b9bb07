"""The commands that say what there is."""

from __future__ import annotations

from mopt.recipe import Recipe, preset_files
from mopt.registry import list_passes
from tests.cli.command_line import Call


def test_passes_are_listed_with_family_and_numerics(mopt: Call) -> None:
    done = mopt("passes", "list")
    assert done.code == 0
    assert done.err == ""
    lines = {line.split()[1]: line.split() for line in done.out.splitlines()[1:]}
    assert lines.keys() == list_passes().keys()
    assert lines["fold-constants"][:3] == ["simplify", "fold-constants", "exact"]
    rows = mopt("passes", "list", "--json").document["passes"]
    assert {row["name"] for row in rows} == set(list_passes())
    assert all(row["summary"] and row["numerics"] for row in rows)


def test_explain_prints_the_docstring_and_every_option(mopt: Call) -> None:
    done = mopt("passes", "explain", "quantize_weights")
    assert done.code == 0
    for heading in ("When to use", "Accuracy", "Limits", "Example", "Options"):
        assert f"\n{heading}\n" in done.out
    options = done.out.partition("\nOptions\n")[2].splitlines()
    row = next(line for line in options if line.startswith("group "))
    assert row.split()[:3] == ["group", "int", "32"]
    assert "0, 16, 32, 64, 128" in row
    assert "weights that share a scale" in row
    data = mopt("passes", "explain", "quantize-weights", "--json").document
    known = {option["name"]: option for option in data["options"]}
    assert known["bits"]["choices"] == [2, 3, 4, 8]
    assert known["min_size"]["min"] == 0
    assert known["skip"]["default"] == ""


def test_an_unknown_pass_names_the_nearest(mopt: Call) -> None:
    done = mopt("passes", "explain", "fold-constant")
    assert done.code == 2
    assert "did you mean 'fold-constants'?" in done.err


def test_models_say_whether_they_are_trained(mopt: Call) -> None:
    done = mopt("models", "list")
    assert done.code == 0
    kinds = {line.split()[0]: line.split()[1] for line in done.out.splitlines()[1:]}
    assert kinds["zoo:digits-cnn"] == "trained"
    assert kinds["zoo:bert"] == "random"
    rows = {row["name"]: row for row in mopt("models", "list", "--json").document["models"]}
    assert rows["digits-cnn"]["trained"] is True


def test_recipes_list_and_show_gives_toml_back(mopt: Call) -> None:
    listed = {row["name"]: row for row in mopt("recipes", "list", "--json").document["recipes"]}
    assert listed.keys() == preset_files().keys()
    assert "int8-dynamic" in mopt("recipes", "list").out
    shown = mopt("recipes", "show", "int4-weight")
    assert shown.code == 0
    assert Recipe.from_toml(shown.out) == Recipe.load("int4-weight")
    full = Recipe.from_toml(mopt("recipes", "show", "int4-weight", "--full").out)
    (weights,) = [spec for spec in full.specs if spec.name == "quantize-weights"]
    assert weights.options["activations"] == "int8"
    assert "did you mean 'int4-weight'?" in mopt("recipes", "show", "int4-weigth").err


def test_a_table_nobody_watches_keeps_one_row_a_line(mopt: Call) -> None:
    lines = mopt("passes", "list").out.splitlines()
    assert len(lines) == 1 + len(list_passes())
    assert not any(line != line.rstrip() for line in lines)
