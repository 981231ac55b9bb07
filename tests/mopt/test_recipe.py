"""Recipes are data: presets load, settings apply, text goes round, mistakes are named."""

from __future__ import annotations

import pytest

from mopt.errors import MoptError, UsageError
from mopt.recipe import Recipe, preset_files


@pytest.mark.parametrize("name", sorted(preset_files()))
def test_every_preset_builds_and_goes_round(name: str) -> None:
    recipe = Recipe.load(name)
    passes = recipe.passes()
    assert recipe.name == name and recipe.summary
    again = Recipe.from_toml(recipe.to_toml(full=True))
    assert again.passes() == passes
    assert Recipe.from_toml(recipe.to_toml()).passes() == passes


def test_settings_reach_the_pass() -> None:
    recipe = Recipe.load("int4-weight").with_settings(
        ["quantize_weights.group=64", "quantize-weights.skip=head,*.q"]
    )
    chosen = next(p for p in recipe.passes() if p.pass_name == "quantize-weights")
    assert chosen.options()["group"] == 64
    assert not chosen.selects("head") and not chosen.selects("a.q") and chosen.selects("a.k")


@pytest.mark.parametrize(
    ("setting", "code", "says"),
    [
        ("quantize-weights.group", "bad-set", "pass.option=value"),
        ("quantize-wieghts.group=3", "unknown-pass", "'quantize-weights'"),
        ("store-half.skip=x", "pass-not-in-recipe", "the recipe runs"),
        ("quantize-weights.grup=32", "unknown-option", "'group'"),
        ("quantize-weights.bits=many", "bad-option", "expected int"),
    ],
)
def test_wrong_settings(setting: str, code: str, says: str) -> None:
    with pytest.raises(UsageError) as caught:
        Recipe.load("int4-weight").with_settings([setting]).passes()
    assert caught.value.code == code
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("name = 3", "bad-recipe"),
        ("nmae = 'x'", "unknown-recipe-key"),
        ("[pass]\nname = 'x'", "bad-recipe"),
        ("[[pass]]\nbits = 4", "bad-recipe"),
        ("extends = 'nothing-like-it'", "unknown-recipe"),
        ("name = 'x", "toml-syntax"),
    ],
)
def test_wrong_files(text: str, code: str) -> None:
    with pytest.raises(MoptError) as caught:
        Recipe.from_toml(text)
    assert caught.value.code == code


def test_unknown_names_suggest_the_nearest() -> None:
    with pytest.raises(UsageError, match="did you mean 'int8-dynamic'"):
        Recipe.load("int8-dynamc")
    with pytest.raises(UsageError, match="no recipe file"):
        Recipe.load("missing/recipe.toml")
