"""Finding commands, reading options, and how failures look to a user."""

from __future__ import annotations

import importlib
import subprocess
import sys
import types
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Annotated

import pytest
import tyro

from wmpo_gym.cli import main as cli
from wmpo_gym.data import ArtifactError

FAILURES: dict[str, BaseException] = {
    "value": ValueError("Unknown task 'x'.\n  Known tasks: move-block."),
    "artifact": ArtifactError("a.json is not valid JSON; restore it."),
    "disk": OSError(28, "No space left on device"),
    "import": ModuleNotFoundError("No module named 'mujoco'", name="mujoco"),
    "interrupt": KeyboardInterrupt(),
    "bug": RuntimeError("a bug"),
}


@dataclass(frozen=True)
class Settings:
    """Nested settings.

    Attributes:
        steps: How many steps.
    """

    steps: int = 5


@dataclass(frozen=True)
class FakeCommand:
    """Do nothing in particular.

    Attributes:
        out: Where to.
        fail: How to fail.
        settings: More.
        status: What to return.
    """

    out: Path
    fail: str = ""
    settings: Annotated[Settings, tyro.conf.OmitArgPrefixes] = Settings()
    status: int = 0

    def run(self) -> int:
        """Fail as told."""
        if self.fail:
            raise FAILURES[self.fail]
        print(f"{self.out} {self.settings.steps}")
        return self.status


@pytest.fixture(autouse=True)
def fake(monkeypatch):
    module = types.ModuleType("fake_command")
    module.Command = FakeCommand
    monkeypatch.setitem(sys.modules, "fake_command", module)
    monkeypatch.setattr(
        cli, "COMMANDS", {"fake": ("fake_command", "do it"), "train fake": ("fake_command", "train")}
    )


def test_options_reach_the_command(capsys):
    assert cli.main(["fake", "--out", "runs/a", "--steps", "7"]) == 0
    assert capsys.readouterr().out == "runs/a 7\n"
    assert cli.main(["train", "fake", "--out", "b", "--status", "1"]) == 1


def test_overview_lists_every_command(capsys):
    for words in ([], ["--help"], ["-h"], ["help"]):
        assert cli.main(words) == 0
        text = capsys.readouterr().out
        assert "fake" in text and "train fake" in text and "do it" in text


def test_version(capsys):
    from wmpo_gym import __version__

    assert cli.main(["--version"]) == 0 and capsys.readouterr().out == f"{__version__}\n"


@pytest.mark.parametrize(
    ("words", "hint"),
    [(["fkae"], "`wmpo fake`"), (["train"], "`wmpo train fake`"), (["train", "--help"], "`wmpo train fake`")],
)
def test_unknown_command_names_the_nearest(capsys, words, hint):
    assert cli.main(words) == 2
    captured = capsys.readouterr()
    assert hint in captured.err and captured.err.count("\n") == 1 and captured.out == ""


@pytest.mark.parametrize(
    ("fail", "message"),
    [
        ("value", "wmpo: error: Unknown task 'x'. Known tasks: move-block. (--traceback shows where)\n"),
        ("artifact", "wmpo: error: a.json is not valid JSON; restore it.\n"),
        ("disk", "wmpo: error: [Errno 28] No space left on device\n"),
        (
            "import",
            "wmpo: error: this command needs mujoco, which is not installed: pip install 'wmpo-gym[sim]'\n",
        ),
    ],
)
def test_expected_failures_are_one_line_and_status_2(capsys, fail, message):
    assert cli.main(["fake", "--out", "a", "--fail", fail]) == 2
    assert capsys.readouterr().err == message


def test_traceback_on_demand(capsys):
    assert cli.main(["fake", "--out", "a", "--fail", "value", "--traceback"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_bugs_are_not_hidden():
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["fake", "--out", "a", "--fail", "bug"])


def test_interruption_says_how_to_go_on(capsys):
    assert cli.main(["train", "fake", "--out", "my run", "--fail", "interrupt"]) == 130
    err = capsys.readouterr().err
    assert err.endswith("Go on with: wmpo train fake --out 'my run' --fail interrupt\n")


def test_wrong_options_are_explained(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["fake", "--outt", "a"])
    assert stop.value.code == 2 and "--out" in capsys.readouterr().err


REAL_COMMANDS = importlib.import_module("wmpo_gym.cli.main").COMMANDS.copy()


@pytest.mark.parametrize("name", REAL_COMMANDS)
def test_every_command_exists_and_documents_every_option(monkeypatch, capsys, name):
    monkeypatch.setattr(cli, "COMMANDS", REAL_COMMANDS)
    command = importlib.import_module(REAL_COMMANDS[name][0]).Command
    assert is_dataclass(command) and command.__dataclass_params__.frozen and callable(command.run)
    with pytest.raises(SystemExit) as stop:
        cli.main([*name.split(), "--help"])
    assert stop.value.code == 0 and f"wmpo {name}" in capsys.readouterr().out


def test_help_is_light(tmp_path):
    code = (
        "import sys; from wmpo_gym.cli.main import main; main(['--help']); "
        "assert not {'torch', 'mujoco', 'tyro'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=tmp_path)
