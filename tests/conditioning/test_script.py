"""Timed prompts and scripts of actions as people type them: read as meant, or refused with the line."""

import logging

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vidistill.conditioning.script import SWITCH_NAMES, Cue, parse_cues, parse_script
from vidistill.conditioning.text import NgramConfig, Ngrams
from vidistill.streaming.prompt_switch import SWITCHES


def test_the_policies_of_cues_are_those_of_streams():
    assert set(SWITCH_NAMES) == set(SWITCHES)


@pytest.mark.parametrize(
    ("line", "cue"),
    [
        ("a red ball", Cue(0, "a red ball")),
        ("5: a blue ball", Cue(5, "a blue ball")),
        ("5s: a blue ball", Cue(5, "a blue ball")),
        ("  9.5  cut :  a green ball ", Cue(9.5, "a green ball", "cut")),
        ("note: 5 balls", Cue(0, "note: 5 balls")),
        ("3 red balls: a story", Cue(0, "3 red balls: a story")),
        ("a ball\nthat rolls", Cue(0, "a ball that rolls")),
        ("6: one: two", Cue(6, "one: two")),
    ],
)
def test_a_cue_is_read_as_it_is_meant(line, cue):
    assert parse_cues([line]) == [cue]


@pytest.mark.parametrize(
    "line", ["12:30 sunset", "-1: x", "+1: x", "nan: x", "inf: x", "1e3: x", "1,5: x", ".5: x", "1..2: x", "5:6: x"]
)
def test_a_line_that_begins_like_a_time_is_no_prompt(line):
    with pytest.raises(ValueError, match="begins"):
        parse_cues([line])


@pytest.mark.parametrize("line", ["", "  ", "\n", "5:", "5 cut:  "])
def test_a_line_without_words_says_nothing(line):
    with pytest.raises(ValueError, match="says nothing"):
        parse_cues([line])


@pytest.mark.parametrize(("line", "message"), [("5 fade: x", "policy 'fade'"), ("90000: x", "latest")])
def test_a_policy_or_time_that_no_stream_knows_is_refused(line, message):
    with pytest.raises(ValueError, match=message):
        parse_cues([line])


FUZZ = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
LINES = st.one_of(
    st.text(max_size=30), st.from_regex(r"[-+0-9.,einfa]{0,6}s?( [a-z]{0,7})?:? ?[a-z :0-9]{0,9}", fullmatch=True)
)


def check_line(line):
    try:
        (cue,) = parse_cues([line])
    except ValueError as error:
        assert "\n" not in str(error)
        return
    assert cue.prompt == " ".join(cue.prompt.split()) != "" and 0 <= cue.seconds < float("inf")
    assert cue.prompt in " ".join(line.split()) and cue.switch in (None, *SWITCH_NAMES)
    assert cue.seconds or cue.switch or cue.prompt == " ".join(line.split()) or line.lstrip()[0] in "0123456789"


@settings(max_examples=50, **FUZZ)
@given(LINES)
def test_any_line_is_a_cue_or_refused(line):
    check_line(line)


@pytest.mark.slow
@settings(max_examples=1000, **FUZZ)
@given(LINES)
def test_any_line_is_a_cue_or_refused_often(line):
    check_line(line)


@pytest.mark.parametrize(
    "text", ["forward", "forward:0", "forward:-3", "forward:x", ":5", "forward:" + "9" * 12, "a:1e3"]
)
def test_a_script_of_another_form_is_refused(text):
    with pytest.raises(ValueError, match="ACTION:FRAMES"):
        parse_script(text)


def test_words_beyond_the_limit_of_the_encoder_are_said(caplog):
    encode = Ngrams(NgramConfig(dim=8, length=3)).encode
    with caplog.at_level(logging.WARNING, logger="vidistill"):
        encode(["one two three"])
        assert not caplog.text
        encode(["one two three four five"])
    assert "3" in caplog.text and "four five" in caplog.text


def test_a_prompt_without_letters_is_refused_and_an_empty_one_is_not():
    encode = Ngrams(NgramConfig(dim=8, length=3)).encode
    assert not encode([""]).any()
    with pytest.raises(ValueError, match="no letters"):
        encode(["\U0001f600!"])
