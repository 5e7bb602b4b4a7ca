"""Task specifications: instructions, action space, horizon and start states.

A :class:`Task` is JSON-serialisable data and the single source of these values for simulators, world models
and policies.
"""

from __future__ import annotations

import difflib
from dataclasses import asdict, dataclass, field, replace
from typing import Any

SPLITS = ("train", "validation", "test")
# Gates of `wmpo validate`, measured before a policy is trained in a world.
GATES = ("physics", "learnable", "faithful", "honest")
# Training hints in tasks saved by earlier releases; see wmpo_gym.training.presets.
FORMER_FIELDS = ("motion_px", "symmetries", "gradual_steps")


@dataclass(frozen=True)
class StartStates:
    """Number of start states per split and the seed they are drawn from.

    Ids run from 0: first train, then validation, then test. An id denotes the same physical start state on
        every
    machine. Collection and imagination use train ids, checkpoint selection uses validation ids, and reported
    results use test ids only.
    """

    train: int
    validation: int
    test: int
    seed: int

    @property
    def total(self) -> int:
        """Number of start states over all splits."""
        return self.train + self.validation + self.test


@dataclass(frozen=True)
class Task:
    """A manipulation task.

    Attributes:
        name: Key in :data:`TASKS`.
        instructions: Language instructions, indexed by the ``task_id`` of an observation.
        horizon: Episode limit in control steps; a multiple of ``chunk``.
        chunk: Actions per decision (K).
        action_dim: Dimension of an action (D), each component in [-1, 1].
        control_hz: Control steps per second.
        image_size: Side of the square RGB observation in pixels.
        start_states: Start states per split.
        action_low: Physical value of action -1 per dimension (metres per step, or gripper command).
        action_high: Physical value of action +1 per dimension.
        success_tolerance_px: Radius of the success region in observation pixels, for the *faithful* gate;
            None if objects cannot be located, as in recordings.
        exclusive_instructions: Whether an episode can fulfil at most one instruction.
        variants: Names of the scene variants of the simulator; the first is the nominal one.
        simulator: Task-specific settings of the simulator, JSON-serialisable (see :func:`robosuite_task`).
    """

    name: str
    instructions: tuple[str, ...]
    horizon: int
    chunk: int
    action_dim: int
    control_hz: float
    image_size: int
    start_states: StartStates
    action_low: tuple[float, ...]
    action_high: tuple[float, ...]
    success_tolerance_px: float | None
    exclusive_instructions: bool = False
    variants: tuple[str, ...] = ("nominal",)
    simulator: dict[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if self.horizon % self.chunk:
            raise ValueError(
                f"Task {self.name!r}: horizon {self.horizon} is not a multiple of chunk {self.chunk}; "
                "choose a horizon that whole action chunks fill."
            )

    @property
    def n_chunks(self) -> int:
        """Action chunks per full-length episode."""
        return self.horizon // self.chunk

    @property
    def base_name(self) -> str:
        """The name without an image size: ``"lift"`` of ``"lift@64"``."""
        return self.name.partition("@")[0]

    def at(self, image_size: int) -> Task:
        """The same task at another image size, named ``"<name>@<image_size>"``.

        Args:
            image_size: Side of the observation in pixels.

        Raises:
            ValueError: If the size is not positive.
        """
        if image_size < 1:
            raise ValueError(f"The image size must be a positive number of pixels, got {image_size}.")
        scale = image_size / self.image_size
        tolerance = self.success_tolerance_px
        return replace(
            self,
            name=f"{self.base_name}@{image_size}",
            image_size=image_size,
            success_tolerance_px=None if tolerance is None else tolerance * scale,
        )

    def split_ids(self, split: str) -> range:
        """Start-state ids of a split.

        Args:
            split: ``"train"``, ``"validation"`` or ``"test"``.

        Raises:
            ValueError: If the split is unknown.
        """
        s = self.start_states
        bounds = {
            "train": (0, s.train),
            "validation": (s.train, s.train + s.validation),
            "test": (s.train + s.validation, s.total),
        }
        if split not in bounds:
            raise ValueError(f"Unknown split {split!r}; choose one of {', '.join(SPLITS)}.")
        return range(*bounds[split])

    def split_of(self, start_state_id: int) -> str:
        """Split of a start-state id.

        Raises:
            ValueError: If the id is not one of the task's start states.
        """
        for split in SPLITS:
            if start_state_id in self.split_ids(split):
                return split
        raise ValueError(
            f"Unknown start_state_id {start_state_id} for task {self.name!r}; ids run from 0 to "
            f"{self.start_states.total - 1}."
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable form; :meth:`from_dict` restores it."""
        data = asdict(self)
        if not data["simulator"]:  # as in files of earlier releases
            del data["simulator"]
        return data

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Task:
        """Rebuild a task from :meth:`to_dict`, also from JSON (lists become tuples).

        Training hints stored by earlier releases (:data:`FORMER_FIELDS`) are dropped.
        """

        def tuples(value: Any) -> Any:
            return tuple(tuples(v) for v in value) if isinstance(value, (list, tuple)) else value

        fields = {k: tuples(v) for k, v in data.items() if k not in FORMER_FIELDS}
        fields["start_states"] = StartStates(**data["start_states"])
        return cls(**fields)


MOVE_BLOCK = Task(
    name="move-block",
    instructions=("move the red block to the disc", "move the blue block to the disc"),
    horizon=20,
    chunk=4,
    action_dim=3,
    control_hz=10.0,
    image_size=40,
    start_states=StartStates(train=8192, validation=512, test=1024, seed=2511),
    action_low=(-0.12, -0.12, -1.0),
    action_high=(0.12, 0.12, 1.0),
    success_tolerance_px=3.46,
    exclusive_instructions=True,
    variants=("nominal", "moved-goal", "background", "texture"),
)


def _panda_task(
    name: str, instruction: str, horizon: int, tolerance_px: float, variants: tuple[str, ...]
) -> Task:
    """A robosuite task of the Panda arm; the shared settings are those of the published system.

    Chunks of 8 steps at 20 Hz; an action is a displacement of the gripper in metres, a rotation vector in
    radians and the gripper (closed above 0), as in robosuite's operational-space controller; one
    third-person camera at 256 x 256.
    """
    return Task(
        name=name,
        instructions=(instruction,),
        horizon=horizon,
        chunk=8,
        action_dim=7,
        control_hz=20.0,
        image_size=256,
        start_states=StartStates(train=8192, validation=512, test=1024, seed=2511),
        action_low=(-0.05, -0.05, -0.05, -0.5, -0.5, -0.5, -1.0),
        action_high=(0.05, 0.05, 0.05, 0.5, 0.5, 0.5, 1.0),
        success_tolerance_px=tolerance_px,
        variants=variants,
    )


LOOKS = ("nominal", "background", "texture")
MOVABLE = ("nominal", "moved-goal", "background", "texture")
# Horizons and instructions of the last four are the published ones; docs/tasks.md has all sources.
PANDA_TASKS = (
    _panda_task("lift", "lift the cube", 64, 10.0, LOOKS),
    _panda_task("lift-close", "lift the cube", 64, 13.5, LOOKS),  # for small images: closer camera
    _panda_task("stack", "stack the red cube on the green cube", 128, 10.0, LOOKS),
    _panda_task("square", "insert the square into the stick", 184, 15.0, MOVABLE),
    _panda_task("stack-three", "stack_three", 320, 10.0, LOOKS),
    _panda_task("three-piece-assembly", "three_piece_assembly", 384, 10.0, MOVABLE),
    _panda_task("coffee", "coffee", 256, 10.0, MOVABLE),
)

TASKS: dict[str, Task] = {task.name: task for task in (MOVE_BLOCK, *PANDA_TASKS)}
ROBOSUITE = "robosuite:"


def robosuite_task(
    env_name: str,
    *,
    instruction: str | None = None,
    horizon: int = 400,
    chunk: int = 8,
    action_dim: int = 7,
    image_size: int = 256,
    camera: str = "agentview",
    fovy: float | None = None,
    robots: str = "Panda",
    controller: str | dict[str, Any] | None = None,
    packages: tuple[str, ...] = (),
    env_kwargs: dict[str, Any] | None = None,
    start_states: StartStates = PANDA_TASKS[0].start_states,
) -> Task:
    """Task from any environment registered with robosuite, for ``WMPO-Simulated-v0``.

    ``get_task("robosuite:<env_name>")`` uses the defaults.

    Args:
        env_name: Name in robosuite's registry, for instance ``"Door"``.
        instruction: Language instruction; None is the name.
        horizon: Episode limit in control steps, a multiple of ``chunk``.
        chunk: Actions per chunk.
        action_dim: Dimension of an action for this robot and controller.
        image_size: Side of the observation in pixels.
        camera: Name of the camera.
        fovy: Vertical field of view of the camera in degrees; None keeps the environment's.
        robots: Name of the robot.
        controller: Name, file or contents of a robosuite controller configuration; None is the robot's own.
        packages: Packages that register the environment, imported first.
        env_kwargs: Further arguments of ``robosuite.make``, JSON-serialisable.
        start_states: Start states; the id is the seed of the environment's reset.
    """
    settings: dict[str, Any] = {
        "env_name": env_name,
        "camera": camera,
        "fovy": fovy,
        "robots": robots,
        "controller": controller,
        "packages": list(packages),
        "env_kwargs": env_kwargs or {},
    }
    return Task(
        name=f"{ROBOSUITE}{env_name}",
        instructions=(instruction or env_name,),
        horizon=horizon,
        chunk=chunk,
        action_dim=action_dim,
        control_hz=float(settings["env_kwargs"].get("control_freq", 20)),
        image_size=image_size,
        start_states=start_states,
        action_low=(-1.0,) * action_dim,
        action_high=(1.0,) * action_dim,
        success_tolerance_px=None,
        simulator=settings,
    )


def register_task(task: Task) -> None:
    """Add a task to the table.

    Raises:
        ValueError: If another task has that name.
    """
    if TASKS.get(task.name, task) != task:
        raise ValueError(f"A different task named {task.name!r} is registered already; choose another name.")
    TASKS[task.name] = task


def get_task(task: str | Task) -> Task:
    """Look up a task by name; a :class:`Task` is returned unchanged.

    Args:
        task: A name in :data:`TASKS` or ``"robosuite:<name of a robosuite environment>"``; the suffix
            ``"@64"`` sets the image size to 64 x 64 pixels.

    Raises:
        ValueError: If the name is unknown; the message lists the names and the closest match.
    """
    if isinstance(task, Task):
        return task
    if task in TASKS:
        return TASKS[task]
    name, _, size = str(task).partition("@")
    if name not in TASKS and not name.startswith(ROBOSUITE):
        near = difflib.get_close_matches(name, TASKS, n=1, cutoff=0.0)
        raise ValueError(
            f"Unknown task {task!r}. Known tasks: {', '.join(TASKS)}, or {ROBOSUITE}EnvName. Did you mean "
            f"{near[0]!r}?"
        )
    found = TASKS[name] if name in TASKS else robosuite_task(name.removeprefix(ROBOSUITE))
    if not size:
        return found
    if not size.isdigit():
        raise ValueError(f"What follows the @ in {task!r} must be a size in pixels, as in '{name}@64'.")
    return found.at(int(size))
