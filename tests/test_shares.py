"""The shares in which CI runs large grids of cases."""

from __future__ import annotations

import itertools

import pytest

from tests import shares


@pytest.mark.parametrize("emulated", [True, False])
@pytest.mark.parametrize("cases", [1, 2, 3, 7, 8, 9, 12, 54])
def test_the_turns_of_a_round_run_every_case_once_and_none_runs_nothing(cases, emulated):
    items, count = [("test", i) for i in range(cases)], shares.shares(cases, emulated)
    runs = [set(items) - set(shares.left_to_others(items, lambda i: i[0], t, emulated)) for t in range(7, 7 + count)]
    assert all(runs)
    assert sorted(itertools.chain(*runs)) == items
    assert count == (1 if cases < (3 if emulated else 8) else 3 if emulated else 2)


def test_without_a_turn_everything_runs():
    assert shares.left_to_others(range(100), lambda _: 0, None, True) == []


def test_what_is_no_grid_always_runs():
    assert shares.left_to_others(range(100), lambda _: None, 0, True) == []


def test_each_grid_is_divided_by_itself():
    items = [(name, i) for i in range(9) for name in "ab"] + [("alone", 0)]
    left = shares.left_to_others(items, lambda item: item[0], 4, True)
    assert sorted(left) == sorted((name, i) for name in "ab" for i in range(9) if shares.share_of(i, 3) != 1)


@pytest.mark.parametrize("count", [2, 3])
def test_a_share_has_every_value_of_every_parameter(count):
    grid = list(itertools.product("abc", (1, 2), "xyz", (3, 4)))
    for share in range(count):
        some = [case for i, case in enumerate(grid) if shares.share_of(i, count) == share]
        for i in range(4):
            assert {case[i] for case in some} == {case[i] for case in grid}
