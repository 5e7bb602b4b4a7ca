"""Scripted demonstrators for the arm's tasks: Cartesian waypoints with settable mistakes.

A script is a generator of actions: ``yield from arm.reach(...)`` goes somewhere, ``yield from arm.grip(...)``
opens or closes. Scripts do not look at the outcome: what slips from the hand stays where it fell.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from wmpo_gym.envs.simulated.tabletop.sim import RobosuiteSim

Script = Generator[np.ndarray, None, None]
OPEN, CLOSED = -1.0, 1.0
MAX_TRAVEL = 0.05  # metres that an action of 1 asks for
MAX_TURN = 0.5  # radians
GAIN = 3.0  # of the error that is left, how much is asked for: the arm covers a third of what an action asks
DOWN = np.array([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, -1.0]])  # attitude of a hand that points down


@dataclass(frozen=True)
class ArmExpertConfig:
    """How the demonstrator errs. Lengths in metres; the defaults make no systematic mistake.

    Attributes:
        grasp_offset: Systematic error of the place where things are gripped (x, y, z).
        grasp_noise: Standard deviation of that place, drawn once per grasp.
        place_offset: Systematic error of the place where things are put (x, y, z).
        place_noise: Standard deviation of that place (x and y), drawn once per placement.
        action_noise: Standard deviation added to the displacement of every action (in action units).
    """

    grasp_offset: tuple[float, float, float] = (0.0, 0.0, 0.0)
    grasp_noise: float = 0.003
    place_offset: tuple[float, float, float] = (0.0, 0.0, 0.0)
    place_noise: float = 0.002
    action_noise: float = 0.05

    def to_dict(self) -> dict:
        """JSON-able form."""
        return asdict(self)


class Arm:
    """What a script moves.

    Args:
        sim: The simulator; it is only looked at.
        config: The mistakes.
        rng: Generator of the mistakes.
    """

    def __init__(self, sim: RobosuiteSim, config: ArmExpertConfig, rng: np.random.Generator) -> None:
        self.sim, self.config, self.rng = sim, config, rng
        self.fingers = OPEN
        self._site = int(sim.scene.env.robots[0].eef_site_id["right"])

    # -- what it sees ----------------------------------------------------------------------------------------
    @property
    def position(self) -> np.ndarray:
        """Point between the finger tips, (3,)."""
        return self.sim.scene.data.site_xpos[self._site].copy()

    @property
    def attitude(self) -> np.ndarray:
        """Rotation matrix (3, 3) of the hand; its first axis is the direction in which the fingers close."""
        return self.sim.scene.data.site_xmat[self._site].reshape(3, 3).copy()

    def body(self, name: str) -> np.ndarray:
        """Position (3,) of a body."""
        return self.sim.scene.data.body(name).xpos.copy()

    def yaw(self, name: str) -> float:
        """Heading of a body's x axis in radians."""
        x, y = self.sim.scene.data.body(name).xmat.reshape(3, 3)[:2, 0]
        return float(np.arctan2(y, x))

    # -- mistakes --------------------------------------------------------------------------------------------
    def grasp_error(self) -> np.ndarray:
        """How far from the right place the next grasp is, (3,)."""
        noise = self.rng.normal(0.0, self.config.grasp_noise, 3) * (1.0, 1.0, 0.5)
        return np.array(self.config.grasp_offset) + noise

    def place_error(self) -> np.ndarray:
        """How far from the right place the next placement is, (3,)."""
        noise = self.rng.normal(0.0, self.config.place_noise, 3) * (1.0, 1.0, 0.0)
        return np.array(self.config.place_offset) + noise

    # -- what it does ----------------------------------------------------------------------------------------
    def act(self, goal: np.ndarray, yaw: float) -> np.ndarray:
        """The action (7,) that brings the hand towards a goal, pointing down and turned by ``yaw``."""
        travel = GAIN * (goal - self.position) / MAX_TRAVEL
        travel = travel / max(1.0, float(np.abs(travel).max()))  # straight, also at full speed
        travel = travel + self.rng.normal(0.0, self.config.action_noise, 3)
        turn = GAIN * _rotation_vector(_about_z(yaw) @ DOWN @ self.attitude.T) / MAX_TURN
        return np.clip(np.concatenate([travel, turn, [self.fingers]]), -1.0, 1.0).astype(np.float32)

    def reach(
        self,
        goal: np.ndarray | Callable[[], np.ndarray],
        yaw: float = 0.0,
        *,
        tolerance: float = 0.008,
        settle: int = 0,
        patience: int = 60,
    ) -> Script:
        """Go to a place, or follow one, until it is near or patience ends.

        Args:
            goal: Metres (3,), or a function that says where it is now.
            yaw: Heading of the hand.
            tolerance: Distance in metres at which the place counts as reached.
            settle: Control steps for which it must stay so: the arm swings past a place.
            patience: Control steps after which the script goes on anyway.
        """
        there = 0
        for _ in range(patience):
            place = goal() if callable(goal) else goal
            error = _rotation_vector(_about_z(yaw) @ DOWN @ self.attitude.T)
            near = np.linalg.norm(place - self.position) < tolerance and np.linalg.norm(error) < 0.08
            there = there + 1 if near else 0
            if there > settle:
                return
            yield self.act(place, yaw)

    def grip(self, fingers: float, yaw: float = 0.0, *, steps: int = 8, rise: float = 0.0) -> Script:
        """Open or close the fingers where the hand is, or ``rise`` metres above."""
        self.fingers, here = fingers, self.position + (0.0, 0.0, rise)
        for _ in range(steps):
            yield self.act(here, yaw)

    def pick(
        self,
        body: str,
        *,
        offset: np.ndarray | None = None,
        yaw: float,
        height: float = 0.1,
        patience: int = 60,
        hold: int = 8,
        rise: float = 0.0,
    ) -> Script:
        """Fetch a thing from above and lift it.

        Args:
            body: Its body.
            offset: From the body to where it is gripped, in metres (3,).
            yaw: Heading of the hand.
            height: Metres above the thing from which the hand comes down, and to which it lifts.
            patience: Control steps of coming down after which it closes wherever it is.
            hold: Control steps that the fingers are given to close before the hand goes up.
            rise: Metres that it is drawn up by meanwhile.
        """
        shift = self.grasp_error() + (np.zeros(3) if offset is None else offset)
        above = np.array([0.0, 0.0, height])
        yield from self.reach(lambda: self.body(body) + shift + above, yaw, tolerance=0.02)
        yield from self.reach(lambda: self.body(body) + shift, yaw, patience=patience)
        yield from self.grip(CLOSED, yaw, steps=hold, rise=rise)
        yield from self.reach(self.position + above, yaw, tolerance=0.02)


def cube_yaw(angle: float) -> float:
    """The smallest turn of the hand that sets the fingers square to a thing with four equal sides."""
    return (angle + np.pi / 4) % (np.pi / 2) - np.pi / 4


# -- scripts -------------------------------------------------------------------------------------------------
def lift(arm: Arm) -> Script:
    """Grip the cube and raise it."""
    yield from arm.pick("cube_main", yaw=cube_yaw(arm.yaw("cube_main")))


def put_on(arm: Arm, thing: str, base: str, *, gap: float) -> Script:
    """Fetch a cube, set it on another, and let go.

    Args:
        arm: The arm.
        thing: Body of the cube to move.
        base: Body of the cube it goes onto.
        gap: Metres between the two centres when one stands on the other.
    """
    yaw = cube_yaw(arm.yaw(thing))
    yield from arm.pick(thing, yaw=yaw)
    held = arm.body(thing) - arm.position
    aim = arm.body(base) + arm.place_error() - held + (0.0, 0.0, gap)
    yield from arm.reach(aim + (0.0, 0.0, 0.06), yaw, tolerance=0.015)
    yield from arm.reach(aim + (0.0, 0.0, 0.004), yaw, patience=25, tolerance=0.006)
    yield from arm.grip(OPEN, yaw, steps=6)
    yield from arm.reach(arm.position + (0.0, 0.0, 0.1), yaw, tolerance=0.02)


def stack(arm: Arm) -> Script:
    """The red cube onto the green one."""
    yield from put_on(arm, "cubeA_main", "cubeB_main", gap=0.045)


def square(arm: Arm) -> Script:
    """The nut by its handle, over the peg, down, and let go."""
    nut, handle = "SquareNut_main", 0.06
    heading = arm.yaw(nut)
    yaw, goal_yaw = _turns(heading)
    along = handle * np.array([np.cos(heading), np.sin(heading), 0.0])
    yield from arm.pick(nut, offset=along, yaw=yaw, height=0.18)
    yield from arm.reach(arm.position, goal_yaw, tolerance=0.03, patience=40)
    aim = arm.body("peg1") + arm.place_error()

    def over_peg(height: float) -> np.ndarray:
        held = arm.body(nut) - arm.position
        return np.array([*(aim - held)[:2], 0.82 + height - held[2]])

    yield from arm.reach(lambda: over_peg(0.17), goal_yaw, tolerance=0.006, settle=3)
    yield from arm.reach(lambda: over_peg(0.02), goal_yaw, patience=25)
    yield from arm.grip(OPEN, goal_yaw, steps=8)
    yield from arm.reach(arm.position + (0.0, 0.0, 0.1), goal_yaw, tolerance=0.02)


def _turns(heading: float) -> tuple[float, float]:
    """Headings of the hand at the grasp and over the peg, for a nut whose handle points to ``heading``.

    The hole has four equal sides, but with the handle away from the robot the arm does not reach far enough;
    the fingers may hold the handle either way round, and the wrist does not turn for ever.
    """
    choices = []
    for grasp in (heading - np.pi, heading, heading + np.pi):
        for direction in (-np.pi / 2, np.pi / 2, np.pi):
            turn = (direction - heading + np.pi) % (2 * np.pi) - np.pi
            choices.append((max(abs(grasp), abs(grasp + turn)), grasp, grasp + turn))
    return min(choices)[1:]


def stack_three(arm: Arm) -> Script:
    """The red cube onto the green one, then the blue one onto the red one."""
    yield from put_on(arm, "cubeA_main", "cubeB_main", gap=0.045)
    yield from put_on(arm, "cubeC_main", "cubeA_main", gap=0.04)


def insert(
    arm: Arm, piece: str, into: str, *, grasp: float, above: float, depth: float, yaw: float = 0.0
) -> Script:
    """Fetch a piece, put it into a hole from above, and let go.

    Args:
        arm: The arm.
        piece: Body of the piece.
        into: Body with the hole.
        grasp: Metres above the piece's centre where it is gripped.
        above: Height of the piece's centre over that of the other body at which it is clear of it.
        depth: The same, where it rests when it is in.
        yaw: Heading of the hand.
    """
    yield from arm.pick(piece, offset=np.array([0.0, 0.0, grasp]), yaw=yaw, height=0.12)
    aim = arm.body(into) + arm.place_error()

    def over(height: float) -> np.ndarray:
        return aim - (arm.body(piece) - arm.position) + (0.0, 0.0, height)

    yield from arm.reach(lambda: over(above), yaw, tolerance=0.006, settle=3)
    yield from arm.reach(lambda: over(depth), yaw, patience=25, tolerance=0.005)
    yield from arm.grip(OPEN, yaw, steps=6)
    yield from arm.reach(arm.position + (0.0, 0.0, 0.1), yaw, tolerance=0.02)


def assemble(arm: Arm) -> Script:
    """The tube into the base, the peg into the tube."""
    yield from insert(arm, "first_main", "base_main", grasp=0.018, above=0.09, depth=0.042)
    yield from insert(arm, "second_main", "first_main", grasp=0.02, above=0.08, depth=0.024)


def make_coffee(arm: Arm) -> Script:
    """The pod into the cup, then the lid down."""
    # The lid stands close behind the cup: the hand's narrow side goes there.
    yaw, machine = np.pi / 2, "machine_main"
    yield from insert(arm, "pod_main", machine, grasp=0.006, above=0.15, depth=0.114, yaw=yaw)
    yield from arm.reach(arm.body(machine) + (0.0, 0.03, 0.26), yaw, tolerance=0.02)
    yield from arm.grip(CLOSED, yaw, steps=1)
    for y, z in ((-0.11, 0.26), (-0.11, 0.18), (0.01, 0.18), (0.03, 0.14)):
        yield from arm.reach(arm.body(machine) + (0.0, y, z), yaw, tolerance=0.015, patience=25)


SCRIPTS: dict[str, Callable[[Arm], Script]] = {
    "lift": lift,
    "lift-close": lift,
    "stack": stack,
    "square": square,
    "stack-three": stack_three,
    "three-piece-assembly": assemble,
    "coffee": make_coffee,
}


Actor = Callable[[Any], np.ndarray]


def arm_expert(sim: RobosuiteSim, config: ArmExpertConfig, rng: np.random.Generator) -> Actor:
    """A demonstrator for the present start state; after its script it holds still.

    Raises:
        ValueError: If the task has no script.
    """
    if sim.task.base_name not in SCRIPTS:
        raise ValueError(
            f"Task {sim.task.name!r} has no scripted expert; there is one for {', '.join(SCRIPTS)}. Import "
            "recorded episodes, or let a policy act."
        )
    arm = Arm(sim, config, rng)
    return _actor(arm, SCRIPTS[sim.task.base_name](arm))


def arm_play(sim: RobosuiteSim, rng: np.random.Generator) -> Actor:
    """Motion without a task: wander, reach for the main object and often miss it, carry it about, drop it."""
    noise = float(rng.choice([0.05, 0.15, 0.4]))
    # Most grips must fail, by little and by much: a world that saw few misses lifts whatever the fingers
    # come near.
    missing = float(rng.uniform(0.0, 0.03))
    clumsy = ArmExpertConfig(grasp_noise=missing, grasp_offset=(0.0, 0.0, 0.005), action_noise=noise)
    arm = Arm(sim, clumsy, rng)
    return _actor(arm, _play(arm, sim.main_body))


def _play(arm: Arm, thing: str) -> Script:
    centre, spread = arm.body(thing), np.array([0.12, 0.12, 0.06])
    while True:
        yaw = float(arm.rng.uniform(-0.7, 0.7))
        anywhere = centre + arm.rng.uniform(-spread, spread) + (0.0, 0.0, 0.1)
        if arm.rng.random() < 0.7:
            # A policy closes when it is time, also where a finger stands on the thing, and goes up before the
            # fingers have met. A world that never saw that draws the thing between them, and lifts it.
            height, rise = arm.rng.uniform((0.03, -0.002), (0.12, 0.012)).tolist()
            patience, hold = arm.rng.integers((4, 0), (16, 9)).tolist()
            yield from arm.pick(thing, yaw=yaw, height=height, patience=patience, hold=hold, rise=rise)
        else:
            yield from arm.grip(float(arm.rng.choice([OPEN, CLOSED])), yaw, steps=2)
        yield from arm.reach(anywhere, yaw, tolerance=0.02, patience=20)
        if arm.rng.random() < 0.6:
            yield from arm.grip(OPEN, yaw, steps=4)


def _actor(arm: Arm, script: Script) -> Actor:
    def act(_: Any) -> np.ndarray:
        return next(script, np.array([0.0] * 6 + [arm.fingers], np.float32))

    return act


def _about_z(angle: float) -> np.ndarray:
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]])


def _rotation_vector(rotation: np.ndarray) -> np.ndarray:
    """Axis times angle (3,) of a rotation matrix of less than half a turn."""
    skew = np.array(
        [rotation[2, 1] - rotation[1, 2], rotation[0, 2] - rotation[2, 0], rotation[1, 0] - rotation[0, 1]]
    )
    length = float(np.linalg.norm(skew))
    angle = float(np.arctan2(length, np.trace(rotation) - 1.0))
    return skew * (angle / length) if length > 1e-9 else np.zeros(3)
