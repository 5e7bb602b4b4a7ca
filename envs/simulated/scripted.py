"""Scripted behaviour: demonstrators with settable mistakes, and unlabelled play.

What is here by itself is for ``move-block``; the arm's scripts are in ``tabletop.expert``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from wmpo_gym.data.episode import Episode
from wmpo_gym.envs.simulated import make_simulator
from wmpo_gym.envs.simulated.move_block import BLOCKS, REACH, STEP_LENGTH, WORKSPACE, MoveBlockSim
from wmpo_gym.envs.simulated.rollout import run_simulator
from wmpo_gym.envs.simulated.tabletop.expert import ArmExpertConfig, arm_expert, arm_play
from wmpo_gym.envs.simulated.tabletop.sim import RobosuiteSim
from wmpo_gym.tasks import Task, get_task

Controller = Callable[[Any], np.ndarray]
RETREAT = np.array([0.1, 0.0])  # where the demonstrator waits after letting go


@dataclass(frozen=True)
class ExpertConfig:
    """How the demonstrator errs. Lengths in metres; the defaults make no systematic mistake.

    Attributes:
        aim_offset: Systematic error of the place where the block is let go.
        aim_tilt: Error in y that grows with the block's start y (a badly calibrated camera).
        aim_noise: Standard deviation of the aim, drawn once per episode.
        grasp_offset: Systematic error of the place where the block is gripped.
        grasp_noise: Standard deviation of the grip point, drawn once per episode.
        action_noise: Standard deviation added to dx and dy of every action (in action units).
    """

    aim_offset: tuple[float, float] = (0.0, 0.0)
    aim_tilt: float = 0.0
    aim_noise: float = 0.03
    grasp_offset: tuple[float, float] = (0.0, 0.0)
    grasp_noise: float = 0.03
    action_noise: float = 0.12

    def to_dict(self) -> dict:
        """JSON-able form."""
        return asdict(self)


def _travel(sim: MoveBlockSim, goal: np.ndarray) -> np.ndarray:
    """Action (2,) that brings the commanded tool position as far towards ``goal`` as one step allows."""
    return np.clip((goal - sim.data.ctrl) / STEP_LENGTH, -1.0, 1.0)


def expert_controller(sim: MoveBlockSim, config: ExpertConfig, rng: np.random.Generator) -> Controller:
    """A demonstrator for the present start state: fetch the named block, carry it to the aim, let go.

    It does not look at the outcome: a block let go at a wrong place stays there.
    """
    grip_error = np.add(config.grasp_offset, rng.normal(0, config.grasp_noise, 2))
    aim = sim.position("goal") + config.aim_offset + rng.normal(0, config.aim_noise, 2)
    aim[1] += config.aim_tilt * sim.position(sim.target)[1]
    carried = False

    def act(sim: MoveBlockSim) -> np.ndarray:
        nonlocal carried
        tool, holding = sim.data.ctrl, sim.magnet_on
        carried = carried or holding
        if carried and not holding:
            return np.clip([*_travel(sim, RETREAT), -1.0], -1.0, 1.0).astype(np.float32)
        goal = aim if holding else sim.position(sim.target) + grip_error
        near = np.abs(goal - tool).max() < 0.03
        magnet = not near if holding else np.linalg.norm(goal - tool) < 0.5 * STEP_LENGTH
        move = _travel(sim, goal) + rng.normal(0, config.action_noise, 2)
        if holding and near:
            move *= 0.0
        return np.clip([*move, 1.0 if magnet else -1.0], -1.0, 1.0).astype(np.float32)

    return act


def play_controller(sim: MoveBlockSim, rng: np.random.Generator) -> Controller:
    """Motion without a task: wander, reach for blocks and often miss, drop them anywhere, flick the magnet.

    The script knows where the blocks and the disc are and how far the magnet reaches: 60 % of its drops are
    aimed near the disc. Nothing is labelled; it shows the world model what
    the tool and the blocks can do. Many reaches end just too far from a block: a model that saw few misses
    imagines grips that do not happen, and a policy trained in it learns to rely on them.
    """
    noise = rng.choice([0.05, 0.15, 0.4])
    flicker = rng.choice([0.0, 0.0, 0.1])
    near_disc = sim.position("goal") + rng.normal(0, 0.25, 2)
    anywhere = rng.uniform(-0.8, 0.8, 2)
    drop = near_disc if rng.random() < 0.6 else anywhere
    block = str(rng.choice(BLOCKS))
    blind = rng.random() < 0.5  # goes on as if it held the block, whether it does or not
    detour = rng.uniform(-0.8, 0.8, 2) if rng.random() < 0.3 else None
    switch_distance = rng.choice([0.5, 0.5, 0.5, 2.0]) * STEP_LENGTH
    release_distance = rng.choice([0.03, 0.03, 0.15, 0.4])
    rest = rng.uniform(-0.8, 0.8, 2)
    state: dict[str, Any] = {"detour": detour, "carrying": False, "done": False, "miss": _miss(rng)}

    def act(sim: MoveBlockSim) -> np.ndarray:
        tool = sim.data.ctrl
        carrying = state["carrying"] or sim.magnet_on
        magnet = carrying
        if carrying:
            goal = drop
            if np.abs(goal - tool).max() < release_distance:
                magnet, state["carrying"], state["done"] = False, False, True
        elif state["done"]:
            goal = rest
        elif state["detour"] is not None:
            goal = state["detour"]
            if np.abs(goal - tool).max() < 0.1:
                state["detour"] = None
        else:
            goal = sim.position(block) + state["miss"]
            distance = np.linalg.norm(goal - tool)
            magnet = bool(distance < switch_distance)
            if distance < 0.3 * STEP_LENGTH:
                state["carrying"], state["miss"] = blind, _miss(rng)
        if rng.random() < flicker:
            magnet = not magnet
        move = _travel(sim, np.clip(goal, -WORKSPACE, WORKSPACE)) + rng.normal(0, noise, 2)
        return np.clip([*move, 1.0 if magnet else -1.0], -1.0, 1.0).astype(np.float32)

    return act


def _miss(rng: np.random.Generator) -> np.ndarray:
    """By how many metres (2,) a reach misses a block's centre: a little, or about as far as it grips."""
    length = abs(rng.normal(0, 0.07)) if rng.random() < 0.4 else rng.uniform(0.7, 1.5) * REACH
    angle = rng.uniform(0, 2 * np.pi)
    return length * np.array([np.cos(angle), np.sin(angle)])


AnyExpert = ExpertConfig | ArmExpertConfig


def default_expert(task: str | Task) -> AnyExpert:
    """A demonstrator of the task without systematic mistakes."""
    return ExpertConfig() if get_task(task).base_name == "move-block" else ArmExpertConfig()


def demonstrator(sim: Any, config: AnyExpert | None, rng: np.random.Generator) -> Controller:
    """The demonstrator for a simulator's present start state.

    Raises:
        ValueError: If there is none for its task, or the mistakes are those of another kind of task.
    """
    makers: dict[type, tuple[type, Any]] = {
        MoveBlockSim: (ExpertConfig, expert_controller),
        RobosuiteSim: (ArmExpertConfig, arm_expert),
    }
    if type(sim) not in makers:
        raise ValueError(f"There is no scripted expert for {type(sim).__name__}; let a policy act.")
    kind, make = makers[type(sim)]
    if not isinstance(config, kind | None):
        raise ValueError(
            f"The expert of {sim.task.name!r} is set by {kind.__name__}, got {type(config).__name__}."
        )
    return make(sim, config or kind(), rng)


def player(sim: Any, rng: np.random.Generator) -> Controller:
    """Scripted, unlabelled play from a simulator's present start state.

    Raises:
        ValueError: If there is none for its task.
    """
    makers: dict[type, Any] = {MoveBlockSim: play_controller, RobosuiteSim: arm_play}
    if type(sim) not in makers:
        raise ValueError(f"There is no scripted play for {type(sim).__name__}; let a policy act.")
    return makers[type(sim)](sim, rng)


@dataclass
class Recording:
    """What a controller did.

    Attributes:
        frames: uint8 ``(T+1, H, W, 3)``.
        actions: float32 ``(T, D)``.
        success: Whether the task succeeded.
        proprio: float32 ``(T+1, P)``, or None if the simulator's robot does not tell its state.
    """

    frames: np.ndarray
    actions: np.ndarray
    success: bool
    proprio: np.ndarray | None


def record(sim: Any, act: Controller, *, horizon: int, stop_at_success: bool) -> Recording:
    """Run a controller from the present state."""
    read = hasattr(sim, "proprio")
    first, before = sim.render(), [sim.proprio()] if read else []
    run = run_simulator(sim, act, horizon, stop_at_success=stop_at_success, frames="all", proprio=read)
    states = np.stack(before + run.proprio) if read else None
    return Recording(np.stack([first, *run.frames]), np.stack(run.actions), run.success, states)


def record_expert(
    start_state_ids: Iterable[int],
    *,
    seed: int,
    config: AnyExpert | None = None,
    variant: str = "nominal",
    task: str | Task = "move-block",
) -> Iterator[Episode]:
    """Demonstrations, failures included, one per start state.

    Args:
        start_state_ids: Where to start.
        seed: Seed of the demonstrator; each episode's noise depends on the seed and its id only.
        config: The demonstrator's mistakes; None is :func:`default_expert`.
        variant: Scene variant.
        task: Task or its name.
    """
    sim: Any = make_simulator(task, variant)
    config = config or default_expert(task)
    for start in start_state_ids:
        sim.reset(start)
        act = demonstrator(sim, config, np.random.default_rng([seed, start, 1]))
        made = record(sim, act, horizon=sim.task.horizon, stop_at_success=True)
        yield _episode(
            sim, made, made.success, {"source": "expert", "seed": seed, "expert": config.to_dict()}
        )


def record_play(
    start_state_ids: Iterable[int],
    *,
    seed: int,
    variant: str = "nominal",
    task: str | Task = "move-block",
) -> Iterator[Episode]:
    """Unlabelled play of full length, one episode per start state; arguments as :func:`record_expert`."""
    sim: Any = make_simulator(task, variant)
    for start in start_state_ids:
        sim.reset(start)
        act = player(sim, np.random.default_rng([seed, start, 2]))
        made = record(sim, act, horizon=sim.task.horizon, stop_at_success=False)
        yield _episode(sim, made, None, {"source": "play", "seed": seed})


def _episode(sim: Any, made: Recording, success: bool | None, meta: dict) -> Episode:
    return Episode(
        frames=made.frames,
        actions=made.actions,
        proprio=made.proprio,
        success=success,
        finish_step=len(made.actions),
        start_state_id=sim.start_state_id,
        task_id=sim.task_id,
        instruction=sim.task.instructions[sim.task_id],
        meta={"task": sim.task.name, "variant": sim.variant, **meta},
    )
