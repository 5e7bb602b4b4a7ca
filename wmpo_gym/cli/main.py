"""Finds the sub-command, reads its options, runs it, and explains what goes wrong.

A sub-command is a module of this package with a frozen dataclass ``Command``: its fields are the options, its
docstring is the help, and ``run()`` does the work by calling the floors below. Where defaults depend on an
option, a class method ``default_for(options)`` gives them. Only the module that is asked for is imported, so
that ``wmpo --help`` answers at once.

Exit status: 0 done, 1 done but the answer is no (a gate failed, for instance), 2 wrong input or a file that
cannot be used, 130 interrupted.
"""

from __future__ import annotations

import difflib
import importlib
import logging
import os
import shlex
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Any, Protocol

# What a user types -> (module with the Command, what it does).
COMMANDS: dict[str, tuple[str, str]] = {
    "demo": ("wmpo_gym.cli.demo", "the whole method before your eyes, in about ten minutes"),
    "reproduce": ("wmpo_gym.cli.reproduce", "the whole method at full length, from nothing"),
    "collect": ("wmpo_gym.cli.collect", "record episodes: the scripted expert, play, or a policy"),
    "import": ("wmpo_gym.cli.import_", "recordings of others: robomimic, LeRobot, the WMPO release"),
    "export": ("wmpo_gym.cli.export", "episodes, recorded or imagined, as a LeRobotDataset"),
    "train sft": ("wmpo_gym.cli.train_sft", "fine-tune a policy on recorded episodes"),
    "train world-model": (
        "wmpo_gym.cli.train_world_model",
        "pre-train a world model, or align one on rollouts",
    ),
    "train distill": ("wmpo_gym.cli.train_distill", "make a world sample with fewer denoising steps"),
    "train reward": ("wmpo_gym.cli.train_reward", "train and calibrate the success classifier of a world"),
    "train grpo": ("wmpo_gym.cli.train_grpo", "optimise a policy in imagination, or in the simulator"),
    "convert world": ("wmpo_gym.cli.convert_world", "released WMPO files as a world"),
    "convert policy": ("wmpo_gym.cli.convert_policy", "a released OpenVLA-OFT checkpoint as a policy"),
    "validate": ("wmpo_gym.cli.validate", "say whether a world is fit to train in: the four gates"),
    "evaluate": ("wmpo_gym.cli.evaluate", "success in the twin, paired; imagination judged by twin replay"),
    "compare": ("wmpo_gym.cli.compare", "methods on identical environments, budgets and start states"),
    "serve": ("wmpo_gym.cli.serve", "answer a robot's pictures with action chunks, over a local socket"),
    "estimate": ("wmpo_gym.cli.estimate", "parameters, memory and computation of a run, before it begins"),
    "bench": ("wmpo_gym.cli.bench", "frames per second and where the time goes"),
}

# Module that is missing -> extra that brings it.
EXTRAS = {
    "mujoco": "sim",
    "robosuite": "robosuite",
    "transformers": "vla",
    "peft": "vla",
    "stable_baselines3": "train",
    "tensorboard": "train",
    "torchmetrics": "train",
    "rich": "train",
    "matplotlib": "train",
    "scipy": "train",
    "moviepy": "video",
    "h5py": "data",
    "pyarrow": "data",
    "grpc": "serve",
}


class CommandLike(Protocol):
    """What a module's ``Command`` offers."""

    def run(self) -> int | None:
        """Do the work.

        Returns:
            The exit status; None means 0.
        """


class UnknownCommandError(ValueError):
    """No sub-command of that name."""


def find_command(words: Sequence[str]) -> tuple[str, list[str]]:
    """Split the command line into the sub-command and its options.

    Args:
        words: The command line after ``wmpo``.

    Returns:
        A key of :data:`COMMANDS` and the words after it.

    Raises:
        UnknownCommandError: If no sub-command has that name; the message names the nearest.
    """
    for length in (2, 1):
        name = " ".join(words[:length])
        if len(words) >= length and name in COMMANDS:
            return name, list(words[length:])
    given = " ".join(w for w in words[:2] if not w.startswith("-"))
    group = [name for name in COMMANDS if name.startswith(f"{words[0]} ")] if words else []
    near = group or difflib.get_close_matches(given, COMMANDS, n=1, cutoff=0.0)
    raise UnknownCommandError(
        f"no command {given!r}; did you mean {' or '.join(f'`wmpo {n}`' for n in near)}? `wmpo --help` lists "
        "all"
    )


def overview() -> str:
    """The text of ``wmpo --help``."""
    width = max(map(len, COMMANDS), default=0)
    lines = [f"  {name:<{width}}  {summary}" for name, (_, summary) in COMMANDS.items()]
    return "\n".join(
        [
            "Practise in imagination, succeed on the robot.",
            "",
            "usage: wmpo COMMAND [OPTIONS]        wmpo COMMAND --help shows the options",
            "",
            *lines,
            "",
            "  --version    print the version",
            "  --traceback  (with any command) show where an error comes from",
            "",
            "Set WMPO_PROGRESS=always for progress bars in log files too, =never for none.",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``wmpo``.

    Args:
        argv: Words after the program's name; None takes the process's.

    Returns:
        The exit status.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    show_traceback = "--traceback" in words
    words = [w for w in words if w != "--traceback"]
    if not words or words[0] in ("-h", "--help", "help"):
        print(overview())
        return 0
    if words[0] == "--version":
        from wmpo_gym import __version__

        print(__version__)
        return 0
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    warnings.showwarning = _show_warning  # type: ignore[assignment]
    try:
        name, options = find_command(words)
        return _read_options(name, options).run() or 0
    except KeyboardInterrupt:
        _say(f"\ninterrupted; what was finished is on the disk. Go on with: wmpo {shlex.join(words)}")
        return 130
    except BrokenPipeError:  # the reader, `head` for instance, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, FloatingPointError, OSError, ImportError) as error:
        if show_traceback:
            traceback.print_exc()
        else:
            _say(f"wmpo: error: {_explain(error)}")
        return 2


def _read_options(name: str, options: list[str]) -> CommandLike:
    import tyro

    command: Any = importlib.import_module(COMMANDS[name][0]).Command
    default = command.default_for(options) if hasattr(command, "default_for") else None
    return tyro.cli(command, prog=f"wmpo {name}", args=options, default=default)


def _explain(error: Exception) -> str:
    """One line that says what was wrong and what to do."""
    missing = (error.name or "").split(".")[0] if isinstance(error, ImportError) else ""
    if missing in EXTRAS and "pip install" not in str(error):
        return (
            f"this command needs {missing}, which is not installed: pip install 'wmpo-gym[{EXTRAS[missing]}]'"
        )
    text = " ".join(str(error).split()) or type(error).__name__
    from wmpo_gym.utils.io import ArtifactError

    certain = isinstance(error, (ArtifactError, OSError, ImportError))
    return text if certain else f"{text} (--traceback shows where)"


def _show_warning(message: Warning | str, category: type[Warning], *_: object) -> None:
    """Warnings for users: what, not where."""
    if not issubclass(category, (DeprecationWarning, PendingDeprecationWarning)):
        _say(f"WARNING: {' '.join(str(message).split())}")


def _say(text: str) -> None:
    print(text, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
