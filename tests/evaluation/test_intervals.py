"""Intervals cover what they say, differences are paired, and too few rooms get none."""

import numpy as np
import pytest
import torch

from vidistill.evaluation.intervals import LEAST_ROOMS, add_intervals, bootstrap, compare, interval, mean_of
from vidistill.evaluation.report import Metric, differences, number


def drawn(values, rooms=None, count=200):
    """Draws of the mean of a row's values [N]."""
    rooms = torch.arange(len(next(iter(values.values())))) if rooms is None else rooms
    return bootstrap(rooms, lambda index, rng: {k: {"x": float(v[index].mean())} for k, v in values.items()}, count)


def test_nineteen_of_twenty_intervals_of_a_mean_hold_it():
    rng = torch.Generator().manual_seed(0)
    hits = []
    for _ in range(100):
        x = torch.randn(40, generator=rng)
        low, high = interval(float(x.mean()), [d["row/x"] for d in drawn({"row": x})])
        hits.append(low < 0 < high)
    assert 0.88 <= np.mean(hits) <= 0.99


def test_items_of_a_room_are_drawn_together():
    x = torch.randn(20, generator=torch.Generator().manual_seed(1)).repeat_interleave(8)
    apart, together = (drawn({"row": x}, rooms) for rooms in (None, torch.arange(20).repeat_interleave(8)))
    wide, narrow = (np.std([d["row/x"] for d in draws]) for draws in (together, apart))
    assert wide == pytest.approx(narrow * 8**0.5, rel=0.25)


def test_a_paired_difference_is_seen_where_the_rows_alone_overlap():
    rooms = 3 * torch.randn(60, generator=torch.Generator().manual_seed(2))
    other = rooms + 0.5 + 0.1 * torch.randn(60, generator=torch.Generator().manual_seed(3))
    draws = drawn({"one": rooms, "other": other})
    result = {"one": {"x": float(rooms.mean())}, "other": {"x": float(other.mean())}}
    for row in result:
        add_intervals(result[row], draws, row)
    assert result["one"]["x_interval"][1] > result["other"]["x_interval"][0]
    found = {
        best: compare({"x": Metric(best=best)}, result, draws, "one", "other")["x"] for best in ("low", "high", "")
    }
    assert found["low"]["verdict"] == "better" and found["high"]["verdict"] == "worse"
    assert "verdict" not in found[""] and found[""]["interval"][0] < -0.5 < found[""]["interval"][1] < 0
    same = compare(
        {"x": Metric(best="low")},
        {**result, "other": result["one"]},
        drawn({"one": rooms, "other": rooms}),
        "one",
        "other",
    )
    assert same["x"] == {"value": 0.0, "interval": [0.0, 0.0], "verdict": "not distinguishable"}


def test_a_ratio_is_better_where_it_is_nearer_to_one():
    x = torch.full((20,), 1.1) + 0.01 * torch.randn(20, generator=torch.Generator().manual_seed(4))
    draws = drawn({"one": x, "other": x - 0.4})
    result = {"one": {"x": 1.1}, "other": {"x": 0.7}}
    assert compare({"x": Metric(best="one")}, result, draws, "one", "other")["x"]["verdict"] == "better"


def test_figures_with_parts_get_intervals_with_parts():
    row = {"parts": {"1": 2.0, "2": 3.0}, "name": "x", "none": None}
    add_intervals(row, [{"row/parts/1": 2.0 + k / 100, "row/parts/2": 3.0} for k in range(-9, 10)], "row")
    assert row["parts_interval"]["1"] == pytest.approx([1.914, 2.086], abs=0.01) and "name_interval" not in row
    assert number(row, "parts/2") == "3.000 (3.000 to 3.000)" and number(row, "none") == "-"


def test_no_interval_of_a_share_begins_below_zero():
    draws = [{"row/share": x, "row/drift": x - 0.1} for x in (0.0, 0.0, 0.0, 0.0, 0.3)]
    row = {"share": 0.01, "drift": -0.09}
    add_intervals(row, draws, "row")
    assert row["share_interval"][0] == 0 < row["share_interval"][1] and row["drift_interval"][0] < -0.09


def test_no_interval_of_a_share_ends_above_one():
    draws = [{"row/share": x, "row/ratio": x + 0.01} for x in (1.0, 1.0, 1.0, 1.0, 0.7)]
    row = {"share": 0.99, "ratio": 1.0}
    add_intervals(row, draws, "row")
    assert row["share_interval"][0] < row["share_interval"][1] == 1 and row["ratio_interval"][1] > 1


def test_too_few_rooms_get_no_interval_and_a_word(caplog):
    assert drawn({"row": torch.zeros(LEAST_ROOMS - 1)}) == []
    assert f"at least {LEAST_ROOMS}" in caplog.text
    row = {"x": 0.0}
    add_intervals(row, [], "row")
    assert row == {"x": 0.0}
    assert interval(1.0, [float("nan")] * 9 + [1.0]) is None


def test_figures_of_several_runs_are_averaged_part_by_part():
    assert mean_of([{"a": 1.0, "b": {"c": 2.0}}, {"a": 3.0, "b": {"c": 4.0}}]) == {"a": 2.0, "b": {"c": 3.0}}
    assert mean_of([{"offset": 3}]) == {"offset": 3}


def test_people_see_every_difference_with_its_interval_and_those_that_are_clear_first():
    clear = {"value": -0.2, "interval": [-0.3, -0.1], "verdict": "better"}
    found = {"a": clear, "b": {**clear, "verdict": "not distinguishable"}, "c": {"value": 1.0, "interval": None}}
    found = {"b": found["b"], "c": found["c"], "a": found["a"], "d": {"value": None, "interval": None}}
    assert differences({"difference": {"student - teacher": found}}) == [
        "student - teacher: a -0.2 (-0.3 to -0.1): better",
        "student - teacher: b -0.2 (-0.3 to -0.1): not distinguishable",
        "student - teacher: c +1 (no interval): no verdict",
    ]
    assert differences({}) == []
