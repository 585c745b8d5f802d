import itertools
from collections import Counter
from dataclasses import replace
from random import Random

import pytest

from vidistill.schedules import Pass, ScheduleConfig, context_level, endless, evaluations, finite, training

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


def test_a_pattern_may_be_written_with_dashes_and_its_last_number_never_ends():
    dashed = ScheduleConfig(levels=(1.0, 0.9, 0.8, 0.7, 0.4), pattern="5-4-3-2-2-2-2")
    assert [len(steps) for steps in dashed.lists] == [5, 4, 3, 2, 2, 2, 2]
    assert dashed.lists == ScheduleConfig(levels=dashed.levels, pattern="5432222").lists
    many = ScheduleConfig(levels=tuple(1 - k / 12 for k in range(12)), pattern="12-2")
    assert evaluations(many, 5) == [13, 3, 3, 3, 3]


def test_a_chunk_of_fewer_steps_keeps_the_first_levels_and_the_last():
    cfg = ScheduleConfig(levels=(1.0, 0.8, 0.6, 0.4), pattern="4321")
    assert cfg.lists == ((1.0, 0.8, 0.6, 0.4), (1.0, 0.8, 0.4), (1.0, 0.4), (1.0,))


def test_the_chunks_after_a_switch_walk_the_first_lists_again():
    assert evaluations(replace(DIAGONAL, rewarm=2), 9, switches=(4,)) == [4, 3, 2, 2, 4, 3, 2, 2, 2]
    assert evaluations(replace(DIAGONAL, rewarm=1), 9, switches=(4, 7)) == [4, 3, 2, 2, 4, 2, 2, 4, 2]
    assert evaluations(DIAGONAL, 6, switches=(4,)) == [4, 3, 2, 2, 2, 2]
    given = replace(DIAGONAL, rewarm=3, given_chunks=1)
    assert evaluations(given, 6, switches=(2,)) == [4, 4, 3, 2, 2, 2]
    passes = finite(endless(replace(DIAGONAL, rewarm=2), 5, (5,)), 7)
    assert [p.sigma[0] for p in passes] == [1.0, 0.9, 0.7, 0.4, 1.0, 0.9, 0.4]


@pytest.mark.parametrize(
    ("cfg", "level"),
    [
        (SELF_FORCING, (0.0, 0.0)),
        (replace(SELF_FORCING, context_sigma=0.1), (0.0, 0.1)),
        (replace(SELF_FORCING, context_sigma=0.1, context="noised"), (0.1, 0.1)),
        (DIAGONAL, (0.4, 0.4)),
        (ScheduleConfig(steps=((1.0, 0.7),), timesteps=((1.0, 0.71),), context="last_step"), (0.7, 0.71)),
    ],
)
def test_the_context_level_is_that_of_the_pass_that_commits(cfg, level):
    assert context_level(cfg) == level
    last = [p for p in finite(endless(cfg), 4) if p.commit][-1]
    assert (last.sigma[0], (last.timesteps or last.sigma)[0]) == level


def test_rolling_fills_its_window_then_finishes_one_chunk_a_pass():
    cfg = ScheduleConfig(name="rolling", levels=(1.0, 0.6, 0.3))
    assert list(itertools.islice(endless(cfg), 5)) == [
        Pass(0, (1.0,), (0.6,)),
        Pass(0, (0.6, 1.0), (0.3, 0.6)),
        Pass(0, (0.3, 0.6, 1.0), (0.0, 0.3, 0.6), emit=True),
        Pass(0, (0.0,), None, commit=True),
        Pass(1, (0.3, 0.6, 1.0), (0.0, 0.3, 0.6), emit=True),
    ]


def test_rolling_tells_each_chunk_the_level_that_belongs_to_its_own():
    cfg = ScheduleConfig(name="rolling", steps=((1.0, 0.6, 0.3),), timesteps=((0.9, 0.5, 0.2),))
    assert [p.timesteps for p in itertools.islice(endless(cfg), 5)] == [
        (0.9,),
        (0.5, 0.9),
        (0.2, 0.5, 0.9),
        None,
        (0.2, 0.5, 0.9),
    ]
    ends = [p for p in training(cfg, 4, Random(0)) if p.next_sigma is not None]
    assert all(len(p.timesteps) == len(p.sigma) for p in ends) and ends[-1].timesteps == (0.2,)


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
    cfg = ScheduleConfig(steps=((1.0, 0.71), (1.0,)), timesteps=((1.0, 0.7), (1.0,)), context="last_step")
    passes = list(finite(endless(cfg), 3))
    assert [(p.sigma, p.timesteps) for p in passes] == [
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


def test_training_stops_at_a_shared_exit_and_runs_on_past_an_exit_of_one_chunk_or_with_last_step_context():
    stops = list(training(SELF_FORCING, 1, Random(3)))
    assert [p.grad for p in stops].count(True) == 1 and stops[-1].commit and stops[-2].emit and stops[-2].grad
    runs = list(training(DIAGONAL, 1, Random(3)))
    assert len(runs) == 4 and runs[-1].commit and [p.emit for p in runs] == [p.grad for p in runs]
    alone = list(training(replace(SELF_FORCING, exit="per_chunk"), 1, Random(3)))
    assert [p.next_sigma for p in alone] == [(0.8,), (0.5,), (0.0,), None] and alone[-1].commit
    assert [p.emit for p in alone] == [p.grad for p in alone] and [p.grad for p in alone].count(True) == 1


@pytest.mark.parametrize(
    ("kw", "message"),
    [
        ({"name": "spiral"}, "schedule.name"),
        ({"context": "dirty"}, "schedule.context"),
        ({"exit": "later"}, "schedule.exit"),
        ({"levels": (0.9, 0.5)}, "pure noise"),
        ({"levels": (1.0, 0.5, 0.5)}, "falls strictly"),
        ({"pattern": "5"}, "asks for 5 steps"),
        ({"pattern": "4,3,2"}, "schedule.pattern"),
        ({"pattern": "4-"}, "schedule.pattern"),
        ({"rewarm": -1}, "schedule.rewarm"),
        ({"rewarm": 1, "name": "rolling"}, "schedule.rewarm"),
        ({"pattern": "32", "name": "rolling"}, "schedule.pattern empty"),
        ({"steps": ((1.0, 0.5), (1.0,)), "name": "rolling"}, "schedule.rewarm.*list"),
        ({"context": "last_step", "name": "rolling"}, "schedule.rewarm.*noised"),
        ({"context_sigma": 1.0}, "context_sigma"),
        ({"context": "noised"}, "context_sigma above 0"),
        ({"context": "last_step", "context_sigma": 0.1}, "no pass"),
        ({"given_chunks": -1}, "given_chunks"),
        ({"steps": ((1.0, 0.5),), "timesteps": ((1.0,),)}, "schedule.timesteps"),
    ],
)
def test_impossible_schedules_say_what_is_wrong(kw, message):
    with pytest.raises(ValueError, match=message):
        ScheduleConfig(**kw)
