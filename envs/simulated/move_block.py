"""The ``move-block`` scene on MuJoCo: a magnet lifts the named block and carries it onto a disc.

Light enough to run anywhere: the picture is made by casting rays (``mj_multiRay``), so no graphics library
is needed and the pixels are the same on every machine.
"""

from __future__ import annotations

import importlib.resources

import mujoco
import numpy as np

from wmpo_gym.tasks import MOVE_BLOCK, Task, get_task

BLOCKS = ("red", "blue")  # index = task_id
TOLERANCE = 0.16  # metres between block and disc centre that count as success
REACH = 0.14  # metres between tool and block centre within which the magnet grips
STEP_LENGTH = 0.12  # metres of commanded travel per control step at action 1
WORKSPACE = 0.86  # metres: limit of the commanded tool position
SUBSTEPS = 10
CAMERA_HEIGHT = 40.0  # far away, so that the view is orthographic to a hundredth of a pixel
VIEW_WIDTH = 1.85  # metres of table seen
SUPERSAMPLING = 3
MOVED_GOAL = (0.5, 0.28)
STATE_SIG = mujoco.mjtState.mjSTATE_INTEGRATION
_LED_ON, _LED_OFF = (0.97, 0.97, 0.97), (0.16, 0.14, 0.16)
# The argument for surface normals came after MuJoCo 3.3.
_RAY_EXTRA = {"normal": None} if "normal" in (mujoco.mj_multiRay.__doc__ or "").split("->")[0] else {}


def _load_model() -> mujoco.MjModel:
    assets = importlib.resources.files("wmpo_gym.envs.simulated") / "assets"
    return mujoco.MjModel.from_xml_string((assets / "move_block.xml").read_text(encoding="utf-8"))


class MoveBlockSim:
    """One simulated table.

    Args:
        variant: ``"nominal"``, ``"moved-goal"`` (the disc stands elsewhere), ``"background"`` (another table
            colour) or ``"texture"`` (striped blocks).
        task: The task, for its start states and image size.

    Raises:
        ValueError: If the variant is unknown.
    """

    def __init__(self, variant: str = "nominal", task: str | Task = MOVE_BLOCK) -> None:
        self.task = get_task(task)
        if variant not in self.task.variants:
            raise ValueError(
                f"Unknown variant {variant!r} of {self.task.name!r}; choose one of {self.task.variants}."
            )
        self.variant = variant
        self.model = _load_model()
        self.data = mujoco.MjData(self.model)
        self.task_id = 0
        self.start_state_id = -1
        self._reaching = False  # whether the last step had the magnet on
        model = self.model
        self._qpos = {n: int(model.joint(f"{n}_x").qposadr[0]) for n in (*BLOCKS, "tool")}
        self._eq = {n: int(model.equality(n).id) for n in BLOCKS}
        self._geom = {n: int(model.geom(n).id) for n in (*BLOCKS, "led")}
        if variant == "background":
            model.geom_rgba[model.geom("table").id, :3] = (0.42, 0.48, 0.42)
        self._colours = np.concatenate([model.geom_rgba[:, :3], np.zeros((1, 3))]).astype(np.float32)
        self._goal_xy = np.array(MOVED_GOAL if variant == "moved-goal" else (0.55, 0.0))

    # -- control ---------------------------------------------------------------------------------------------
    def reset(self, start_state_id: int) -> None:
        """Put the scene into one of the task's start states.

        Args:
            start_state_id: Id as in :meth:`Task.split_ids`; it fixes the poses and the named block.

        Raises:
            ValueError: If the task has no such start state.
        """
        self.task.split_of(start_state_id)
        rng = np.random.default_rng([self.task.start_states.seed, start_state_id])
        mujoco.mj_resetData(self.model, self.data)
        self._reaching = False
        self.task_id = int(rng.integers(len(BLOCKS)))
        tool = (rng.uniform(-0.73, -0.62), rng.uniform(-0.6, 0.6))
        first = np.array([rng.uniform(-0.45, 0.0), rng.uniform(-0.55, 0.55)])
        second = first
        while np.abs(second - first).max() < 0.38:
            second = np.array([rng.uniform(-0.45, 0.0), rng.uniform(-0.55, 0.55)])
        self._place("tool", tool)
        for name, xy in zip(BLOCKS, (first, second), strict=True):
            self._place(name, xy)
            self.data.qpos[self._qpos[name] + 3] = rng.uniform(-0.7, 0.7)
        self.data.ctrl[:] = tool
        self.data.mocap_pos[0, :2] = self._goal_xy
        mujoco.mj_forward(self.model, self.data)
        self.start_state_id = start_state_id

    def _place(self, name: str, xy: tuple[float, float] | np.ndarray) -> None:
        adr = self._qpos[name]
        self.data.qpos[adr : adr + 2] = xy

    def displace(self, offset: tuple[float, float] | np.ndarray) -> None:
        """Shift the named block by ``offset`` metres (x, y); used to measure how chaotic the physics is."""
        name = BLOCKS[self.task_id]
        self._place(name, self.position(name) + np.asarray(offset))
        mujoco.mj_forward(self.model, self.data)

    def step(self, action: np.ndarray) -> None:
        """Advance one control step (0.1 s).

        Args:
            action: ``(3,)`` in [-1, 1]: commanded travel in x and y as a share of :data:`STEP_LENGTH`, and
                the magnet (on above 0).
        """
        data = self.data
        before = data.ctrl.copy()
        target = np.clip(
            before + STEP_LENGTH * np.asarray(action[:2], dtype=np.float64), -WORKSPACE, WORKSPACE
        )
        magnet = action[2] > 0
        self._reaching = bool(magnet)
        if not magnet:
            data.eq_active[:] = 0
        for i in range(1, SUBSTEPS + 1):
            data.ctrl[:] = before + (target - before) * (i / SUBSTEPS)
            if magnet and not data.eq_active.any():
                self._grip()
            mujoco.mj_step(self.model, data)

    def _grip(self) -> None:
        tool = self.position("tool")
        distances = {name: float(np.linalg.norm(self.position(name) - tool)) for name in BLOCKS}
        nearest = min(distances, key=distances.__getitem__)
        if distances[nearest] < REACH:
            self.data.eq_active[self._eq[nearest]] = 1

    # -- what is true ----------------------------------------------------------------------------------------
    def position(self, name: str) -> np.ndarray:
        """Centre of ``"red"``, ``"blue"``, ``"tool"`` or ``"goal"`` in metres, shape ``(2,)``."""
        if name == "goal":
            return self._goal_xy.copy()
        adr = self._qpos[name]
        return self.data.qpos[adr : adr + 2].copy()

    def positions(self) -> dict[str, np.ndarray]:
        """Centres of everything that matters, in metres."""
        return {name: self.position(name) for name in (*BLOCKS, "tool", "goal")}

    @property
    def target(self) -> str:
        """Name of the block the instruction asks for."""
        return BLOCKS[self.task_id]

    @property
    def magnet_on(self) -> bool:
        """Whether a block hangs on the magnet."""
        return bool(self.data.eq_active.any())

    @property
    def contact(self) -> str | None:
        """``"held"`` with the named block on the magnet, ``"missed"`` with the magnet on without it."""
        if self.data.eq_active[self._eq[self.target]]:
            return "held"
        return "missed" if self._reaching else None

    @property
    def success(self) -> bool:
        """The named block lies within :data:`TOLERANCE` of the disc's centre and the magnet holds nothing."""
        distance = np.linalg.norm(self.position(self.target) - self._goal_xy)
        return bool(distance < TOLERANCE and not self.magnet_on)

    def get_state(self) -> np.ndarray:
        """Everything needed to continue exactly: physics, start-state id and task id, as float64."""
        state = np.empty(mujoco.mj_stateSize(self.model, STATE_SIG))
        mujoco.mj_getState(self.model, self.data, state, STATE_SIG)
        return np.concatenate([state, [self.start_state_id, self.task_id]])

    def set_state(self, state: np.ndarray) -> None:
        """Restore what :meth:`get_state` returned.

        Raises:
            ValueError: If the array has another length.
        """
        expected = mujoco.mj_stateSize(self.model, STATE_SIG) + 2
        if np.shape(state) != (expected,):
            raise ValueError(f"A move-block state has shape ({expected},), got {np.shape(state)}.")
        self._reaching = False
        mujoco.mj_setState(self.model, self.data, np.ascontiguousarray(state[:-2]), STATE_SIG)
        self.start_state_id, self.task_id = int(state[-2]), int(state[-1])
        mujoco.mj_forward(self.model, self.data)

    # -- picture ---------------------------------------------------------------------------------------------
    def to_pixels(self, xy: np.ndarray) -> np.ndarray:
        """Map metres ``(..., 2)`` to continuous observation pixels ``(..., 2)`` as (column, row).

        Pixel i covers [i, i + 1), so the centre of the first pixel is 0.5.
        """
        scale = self.task.image_size / VIEW_WIDTH
        return (np.asarray(xy) * (1.0, -1.0) + VIEW_WIDTH / 2) * scale

    def render(self, size: int | None = None) -> np.ndarray:
        """The view from straight above.

        Args:
            size: Side in pixels; None is the task's observation size.

        Returns:
            uint8 RGB of shape ``(size, size, 3)``, anti-aliased by averaging :data:`SUPERSAMPLING`² rays.
        """
        size = size or self.task.image_size
        n = size * SUPERSAMPLING
        colours = self._colours.copy()
        colours[self._geom["led"]] = _LED_ON if self.magnet_on else _LED_OFF
        geom, points = self._cast(n)
        picture = colours[geom]
        if self.variant == "texture":
            self._stripe(picture, geom, points)
        picture = picture.reshape(size, SUPERSAMPLING, size, SUPERSAMPLING, 3).mean(axis=(1, 3))
        return (picture * 255.0 + 0.5).astype(np.uint8)

    def _cast(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Geom id (n·n,) that each ray hits first, and where the ray meets the table (n·n, 2) in metres."""
        centres = ((np.arange(n) + 0.5) / n - 0.5) * VIEW_WIDTH
        x, y = np.meshgrid(centres, -centres)
        vec = np.stack([x.ravel(), y.ravel(), np.full(n * n, -CAMERA_HEIGHT)], axis=1)
        geom, dist = np.empty(n * n, np.int32), np.empty(n * n)
        mujoco.mj_multiRay(
            m=self.model,
            d=self.data,
            pnt=np.array([0.0, 0.0, CAMERA_HEIGHT]),
            vec=vec.ravel(),
            geomgroup=None,
            flg_static=True,
            bodyexclude=-1,
            geomid=geom,
            dist=dist,
            nray=n * n,
            cutoff=mujoco.mjMAXVAL,
            **_RAY_EXTRA,
        )
        return geom, vec[:, :2]

    def _stripe(self, picture: np.ndarray, geom: np.ndarray, points: np.ndarray) -> None:
        """Darken stripes fixed to the blocks, in place."""
        for name in BLOCKS:
            hit = geom == self._geom[name]
            yaw = self.data.qpos[self._qpos[name] + 3]
            local = (points[hit] - self.position(name)) @ np.array([np.cos(yaw), np.sin(yaw)])
            picture[hit] *= np.where(np.floor(local / 0.05) % 2 == 0, 1.0, 0.55)[:, None]
