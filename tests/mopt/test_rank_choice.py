"""One option per layer under a budget: never over it, and as good as trying everything."""

from __future__ import annotations

from itertools import product

from hypothesis import given, settings
from hypothesis import strategies as st

from mopt.rank_choice import Option, pick

numbers = st.integers(1, 20).map(float)
options = st.lists(st.builds(Option, numbers, numbers), min_size=1, max_size=4)
problems = st.dictionaries(st.sampled_from("abc"), options, min_size=1)


def spent(found: dict[str, list[Option]], chosen: dict[str, int]) -> tuple[float, float]:
    own = [found[name][at] for name, at in chosen.items()]
    return sum(one.cost for one in own), sum(one.loss for one in own)


@settings(max_examples=40)
@given(problems, st.integers(1, 60))
def test_the_budget_holds_and_at_most_one_step_is_lost(
    found: dict[str, list[Option]], budget: int
) -> None:
    cost, loss = spent(found, pick(found, budget))
    every = [
        spent(found, dict(zip(found, at, strict=True)))
        for at in product(*(range(len(own)) for own in found.values()))
    ]
    possible = [one for one in every if one[0] <= budget]
    if not possible:
        assert cost == min(one[0] for one in every)
        return
    assert cost <= budget
    step = max(max(o.loss for o in own) - min(o.loss for o in own) for own in found.values())
    assert loss <= min(one[1] for one in possible) + step


def test_losses_that_fall_by_less_and_less_are_chosen_best() -> None:
    layer = [Option(cost, 100 / cost) for cost in (1.0, 2.0, 3.0, 4.0)]
    other = [Option(cost, 10 / cost) for cost in (1.0, 2.0, 3.0, 4.0)]
    assert pick({"much": layer, "little": other}, 5) == {"much": 3, "little": 0}
    assert pick({"much": layer, "little": other}, 8) == {"much": 3, "little": 3}
    assert pick({"a": layer, "b": layer}, 4) == {"a": 1, "b": 1}
