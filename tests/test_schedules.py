import itertools
from collections import Counter
from random import Random

import pytest

from vidistill.schedules import Pass, ScheduleConfig, endless, evaluations, finite, training

SELF_FORCING = ScheduleConfig(levels=(1.0, 0.8, 0.5))
DIAGONAL = ScheduleConfig(levels=(1.0, 0.9, 0.7, 0.4), pattern="4322222", context="last_step")


def test_self_forcing_walks_all_levels_and_shows_the_clean_chunk():
    assert list(finite(endless(SELF_FORCING), 2)) == [
        Pass(0, (1.0,), (0.8,)),
        Pass(0, (0.8,), (0.5,)),
        Pass(0, (0.5,), (0.0,), emit=True),
        Pass(0, (0.0,), None, commit=True),
        Pass(1, (1.0,), (0.8,)),
        Pass(1, (0.8,), (0.5,)),
        Pass(1, (0.5,), (0.0,), emit=True),
        Pass(1, (0.0,), None, commit=True),
    ]


def test_diagonal_walks_fewer_levels_in_later_chunks_and_leaves_its_last_step_in_memory():
    assert list(finite(endless(DIAGONAL), 3)) == [
        Pass(0, (1.0,), (0.9,)),
        Pass(0, (0.9,), (0.7,)),
        Pass(0, (0.7,), (0.4,)),
        Pass(0, (0.4,), (0.0,), commit=True, emit=True),
        Pass(1, (1.0,), (0.9,)),
        Pass(1, (0.9,), (0.4,)),
        Pass(1, (0.4,), (0.0,), commit=True, emit=True),
        Pass(2, (1.0,), (0.4,)),
        Pass(2, (0.4,), (0.0,), commit=True, emit=True),
    ]


def test_evaluations_of_seven_chunks_are_those_of_the_papers():
    four = ScheduleConfig()
    assert sum(evaluations(four, 7)) == 35
    assert evaluations(DIAGONAL, 7) == [4, 3, 2, 2, 2, 2, 2] and sum(evaluations(DIAGONAL, 7)) == 17


def test_rolling_fills_its_window_then_finishes_one_chunk_a_pass():
    cfg = ScheduleConfig(name="rolling", levels=(1.0, 0.6, 0.3))
    assert list(itertools.islice(endless(cfg), 5)) == [
        Pass(0, (1.0,), (0.6,)),
        Pass(0, (0.6, 1.0), (0.3, 0.6)),
        Pass(0, (0.3, 0.6, 1.0), (0.0, 0.3, 0.6), emit=True),
        Pass(0, (0.0,), None, commit=True),
        Pass(1, (0.3, 0.6, 1.0), (0.0, 0.3, 0.6), emit=True),
    ]


def test_given_chunks_are_shown_clean_and_emitted_as_they_are():
    cfg = ScheduleConfig(levels=(1.0, 0.5), given_chunks=1, context="noised", context_sigma=0.1)
    assert list(finite(endless(cfg), 2)) == [
        Pass(0, (0.0,), None, commit=True, emit=True),
        Pass(1, (1.0,), (0.5,)),
        Pass(1, (0.5,), (0.0,), emit=True),
        Pass(1, (0.1,), None, commit=True),
    ]


def test_a_clean_context_pass_may_tell_a_level_it_does_not_have():
    cfg = ScheduleConfig(levels=(1.0,), context="clean", context_sigma=0.06)
    assert list(finite(endless(cfg), 1))[-1] == Pass(0, (0.0,), None, (0.06,), commit=True)


def test_told_levels_follow_the_step_lists():
    cfg = ScheduleConfig(steps=((1.0, 0.71), (1.0,)), told=((1.0, 0.7), (1.0,)), context="last_step")
    passes = list(finite(endless(cfg), 3))
    assert [(p.sigma, p.told) for p in passes] == [
        ((1.0,), (1.0,)),
        ((0.71,), (0.7,)),
        ((1.0,), (1.0,)),
        ((1.0,), (1.0,)),
    ]


@pytest.mark.parametrize("cfg", [SELF_FORCING, DIAGONAL, ScheduleConfig(name="rolling", levels=(1.0, 0.5))])
def test_a_finite_schedule_is_the_prefix_of_the_endless_one(cfg):
    short = list(finite(endless(cfg), 4))
    assert short == list(itertools.islice(endless(cfg), len(short)))
    assert list(finite(endless(cfg, start=2), 4)) == [p for p in short if p.chunk >= 2] or cfg.name == "rolling"


@pytest.mark.parametrize("exit_rule", ["shared", "per_chunk"])
def test_every_step_of_every_list_is_an_exit_equally_often(exit_rule):
    cfg = ScheduleConfig(levels=DIAGONAL.levels, pattern="432", context="last_step", exit=exit_rule)
    counts: dict[int, Counter] = {c: Counter() for c in range(3)}
    for seed in range(600):
        for p in training(cfg, 3, Random(seed)):
            if p.grad:
                counts[p.chunk][p.sigma] += 1
    for chunk, n in enumerate((4, 3, 2)):
        expected = 600 / n
        chi2 = sum((k - expected) ** 2 / expected for k in counts[chunk].values())
        assert len(counts[chunk]) == n and chi2 < 16


def test_training_stops_at_the_exit_step_and_last_step_context_runs_on():
    stops = list(training(SELF_FORCING, 1, Random(3)))
    assert [p.grad for p in stops].count(True) == 1 and stops[-1].commit and stops[-2].emit and stops[-2].grad
    runs = list(training(DIAGONAL, 1, Random(3)))
    assert len(runs) == 4 and runs[-1].commit and [p.emit for p in runs] == [p.grad for p in runs]


@pytest.mark.parametrize(
    ("kw", "message"),
    [
        ({"name": "spiral"}, "schedule.name"),
        ({"context": "dirty"}, "schedule.context"),
        ({"exit": "later"}, "schedule.exit"),
        ({"levels": (0.9, 0.5)}, "starts from pure noise"),
        ({"levels": (1.0, 0.5, 0.5)}, "falls strictly"),
        ({"pattern": "5"}, "asks for 5 steps"),
        ({"context_sigma": 1.0}, "context_sigma"),
        ({"given_chunks": -1}, "given_chunks"),
        ({"steps": ((1.0, 0.5),), "told": ((1.0,),)}, "schedule.told"),
    ],
)
def test_impossible_schedules_say_what_is_wrong(kw, message):
    with pytest.raises(ValueError, match=message):
        ScheduleConfig(**kw)
