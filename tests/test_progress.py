"""Bars show in terminals, and elsewhere only when asked for."""

from __future__ import annotations

import pytest

from wmpo_gym.utils.progress import progress_bar


@pytest.mark.parametrize(
    ("wish", "terminal", "shown"),
    [("auto", True, True), ("auto", False, False), ("always", False, True), ("never", True, False)],
)
def test_when_a_bar_shows(monkeypatch, capsys, wish, terminal, shown):
    monkeypatch.setenv("WMPO_PROGRESS", wish)
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal, raising=False)
    assert list(progress_bar(range(3), desc="episodes")) == [0, 1, 2]
    captured = capsys.readouterr()
    assert ("episodes" in captured.err) is shown and captured.out == ""


def test_a_resumed_run_starts_where_it_stopped(monkeypatch, capsys):
    monkeypatch.setenv("WMPO_PROGRESS", "always")
    with progress_bar(total=10, initial=4, desc="steps") as bar:
        bar.update(6)
        assert bar.n == 10
    assert "10/10" in capsys.readouterr().err


def test_disable_wins(monkeypatch, capsys):
    monkeypatch.setenv("WMPO_PROGRESS", "always")
    list(progress_bar(range(3), disable=True))
    assert capsys.readouterr().err == ""
