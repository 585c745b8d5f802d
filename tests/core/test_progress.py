import io
import logging
import sys

from vidistill.progress import Bar, console, track


class Terminal(io.StringIO):
    def isatty(self):
        return True


def a_terminal(monkeypatch):
    """A terminal in place of stderr; a fixture would lose it to pytest's own capturing."""
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    return sys.stderr


def test_items_are_counted_on_a_terminal(monkeypatch):
    terminal = a_terminal(monkeypatch)
    assert list(track("abc", "letters [of] the alphabet", total=3, unit="letter")) == ["a", "b", "c"]
    shown = terminal.getvalue()
    assert "letters [of] the alphabet" in shown and "3/3 letter" in shown


def test_nothing_is_written_into_a_file(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert list(track([1, 2], "numbers")) == [1, 2]
    assert sys.stderr.getvalue() == ""


def test_a_hidden_bar_shows_nothing(monkeypatch):
    terminal = a_terminal(monkeypatch)
    with Bar(2, "rank one", shown=False) as bar:
        bar.update()
    assert terminal.getvalue() == ""


def test_a_resumed_count_and_a_note_are_shown(monkeypatch):
    terminal = a_terminal(monkeypatch)
    with Bar(None, "steps", "step", done=5) as bar:
        bar.describe("longer steps")
        bar.note("loss=0.25")
        bar.update(2)
    shown = terminal.getvalue()
    assert "7 step" in shown and "longer steps" in shown and "loss=0.25" in shown


def test_bars_inside_bars_end_in_any_order(monkeypatch):
    terminal = a_terminal(monkeypatch)
    for _ in track(range(2), "outer", 2):
        inner = track(range(2), "inner", 2)
        next(inner)
        inner.close()
    assert "inner" in terminal.getvalue() and "2/2" in terminal.getvalue()
    assert sys.stderr is terminal and console().file is terminal


def test_log_records_go_above_the_bar_and_prints_stay_in_their_file(monkeypatch):
    terminal = a_terminal(monkeypatch)
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    handler = logging.StreamHandler(terminal)
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        with Bar(1, "steps"):
            root.warning("step 1: loss 0.25")
            print("a figure")
            assert handler.stream is not terminal
        root.warning("the end")
    finally:
        root.removeHandler(handler)
    assert handler.stream is terminal
    assert "step 1: loss 0.25\n" in terminal.getvalue() and "the end\n" in terminal.getvalue()
    assert sys.stdout.getvalue() == "a figure\n"
