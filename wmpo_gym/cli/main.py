"""Entry point of ``wmpo``: find the sub-command, parse its options, run it and report errors.

A sub-command is a module of this package with a frozen dataclass ``Command``: its fields are the options, its
docstring is the help text, and ``run()`` does the work. Where defaults depend on an option, a class method
``default_for(options)`` returns them. Only the module of the requested command is imported, so that
``wmpo --help`` is fast.

Exit status: 0 success, 1 completed with a negative result (a gate failed, for instance), 2 invalid input or
an unusable file, 130 interrupted.
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

# Command name -> (module with the Command, summary).
COMMANDS: dict[str, tuple[str, str]] = {
    "demo": ("wmpo_gym.cli.demo", "run the full method in about ten minutes, from bundled weights"),
    "reproduce": ("wmpo_gym.cli.reproduce", "run the full method at full length, from scratch"),
    "collect": ("wmpo_gym.cli.collect", "record episodes of the scripted expert, play, or a policy"),
    "import": ("wmpo_gym.cli.import_", "import recordings: robomimic, LeRobot, WMPO release"),
    "export": ("wmpo_gym.cli.export", "export recorded or imagined episodes as a LeRobotDataset"),
    "train sft": ("wmpo_gym.cli.train_sft", "fine-tune a policy on recorded episodes"),
    "train world-model": (
        "wmpo_gym.cli.train_world_model",
        "pre-train a world model, or fine-tune one on rollouts",
    ),
    "train distill": ("wmpo_gym.cli.train_distill", "distil a world model to fewer denoising steps"),
    "train reward": ("wmpo_gym.cli.train_reward", "train and calibrate the success classifier of a world"),
    "train grpo": ("wmpo_gym.cli.train_grpo", "optimise a policy in a world model or in the simulator"),
    "convert world": ("wmpo_gym.cli.convert_world", "convert a released WMPO world model"),
    "convert policy": ("wmpo_gym.cli.convert_policy", "convert a released OpenVLA-OFT policy"),
    "validate": ("wmpo_gym.cli.validate", "measure the four gates: is a world fit to train in?"),
    "evaluate": ("wmpo_gym.cli.evaluate", "success rates in the simulator; check of imagined success"),
    "compare": ("wmpo_gym.cli.compare", "compare methods on equal environments, budgets and start states"),
    "serve": ("wmpo_gym.cli.serve", "serve a policy over a local socket: image in, actions out"),
    "estimate": ("wmpo_gym.cli.estimate", "estimate parameters, memory and computation of a run"),
    "bench": ("wmpo_gym.cli.bench", "measure frames per second and profile the time"),
}

# Missing module -> extra that installs it.
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
    """Interface of a module's ``Command``."""

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
        UnknownCommandError: If no sub-command has that name; the message suggests the closest one.
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
            "Optimise robot policies in a learned world model.",
            "",
            "usage: wmpo COMMAND [OPTIONS]        wmpo COMMAND --help shows the options",
            "",
            *lines,
            "",
            "  --version    print the version",
            "  --traceback  (with any command) print the full traceback of an error",
            "",
            "Set WMPO_PROGRESS=always to show progress bars in log files too, or =never to hide them.",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``wmpo``.

    Args:
        argv: Arguments after the program name; None for those of the process.

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
        _say(f"\ninterrupted; finished work is saved. Go on with: wmpo {shlex.join(words)}")
        return 130
    except BrokenPipeError:  # the reader (`head`, for instance) closed the pipe
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
    """One-line error message: what was wrong and what to do."""
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
    """Print a warning's message without its source location."""
    if not issubclass(category, (DeprecationWarning, PendingDeprecationWarning)):
        _say(f"WARNING: {' '.join(str(message).split())}")


def _say(text: str) -> None:
    print(text, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
