"""The three published tasks that robosuite does not have, from their descriptions, with objects of our own.

Importing the module registers them with robosuite as ``WmpoStackThree``, ``WmpoThreePieceAssembly`` and
``WmpoCoffee``. Shapes and sizes are ours: nothing is MimicGen's, whose licence is non-commercial.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from robosuite.environments.base import REGISTERED_ENVS
from robosuite.environments.manipulation.manipulation_env import ManipulationEnv
from robosuite.models.arenas import TableArena
from robosuite.models.objects import BoxObject, CylinderObject, MujocoObject, MujocoXMLObject
from robosuite.models.tasks import ManipulationTask
from robosuite.utils.mjcf_utils import CustomMaterial, array_to_string
from robosuite.utils.placement_samplers import SequentialCompositeSampler, UniformRandomSampler

ASSETS = Path(__file__).parents[1] / "assets"
TABLE = np.array([0.0, 0.0, 0.8])  # centre of the table top


class TableTask(ManipulationEnv):
    """An arm at robosuite's table, with objects placed at random and things that stand still.

    A subclass makes the objects in :meth:`_make_objects` and says in :meth:`_check_success` what is wanted.
    """

    def __init__(self, robots: Any, **kwargs: Any) -> None:
        kwargs.setdefault("initialization_noise", "default")
        super().__init__(robots=robots, **kwargs)

    def _make_objects(self) -> tuple[list[tuple[MujocoObject, Any]], list[MujocoObject]]:
        """Movable objects with their samplers, and fixed ones."""
        raise NotImplementedError

    def _load_model(self) -> None:
        super()._load_model()
        arena = TableArena(table_full_size=(0.8, 0.8, 0.05), table_offset=TABLE)
        arena.set_origin([0, 0, 0])
        model = self.robots[0].robot_model
        model.set_base_xpos(model.base_xpos_offset["table"](0.8))
        movable, fixed = self._make_objects()
        self.placement_initializer = SequentialCompositeSampler(name="objects")
        for thing, sampler in movable:
            sampler.add_objects(thing)
            self.placement_initializer.append_sampler(sampler)
        self._fixtures = {
            thing.name: (tuple(TABLE + place_of(thing)), np.array([1.0, 0, 0, 0]), thing) for thing in fixed
        }
        self.model = ManipulationTask(
            mujoco_arena=arena,
            mujoco_robots=[model],
            mujoco_objects=[*(thing for thing, _ in movable), *fixed],
        )

    def _reset_internal(self) -> None:
        super()._reset_internal()
        placements = self.placement_initializer.sample(fixtures=self._fixtures)
        for place, attitude, thing in placements.values():
            if thing.joints and thing.name not in self._fixtures:
                self.sim.data.set_joint_qpos(thing.joints[0], np.concatenate([place, attitude]))

    def reward(self, action: np.ndarray | None = None) -> float:
        """1.0 when the task is done."""
        return float(self._check_success())

    def _place(self, thing: MujocoObject) -> np.ndarray:
        return np.array(self.sim.data.get_body_xpos(thing.root_body))

    def _holds(self, things: Sequence[MujocoObject]) -> bool:
        return any(self._check_grasp(gripper=self.robots[0].gripper, object_geoms=thing) for thing in things)


REGISTERED_ENVS.pop("TableTask", None)  # a base class, not an environment


def place_of(thing: MujocoObject) -> np.ndarray:
    """Where a fixed object stands on the table, (3,)."""
    return np.array([float(x) for x in thing.get_obj().get("pos", "0 0 0").split()]) - TABLE


def on_table(name: str, x: tuple[float, float], y: tuple[float, float], turn: float | None) -> Any:
    """A sampler of places, in metres from the centre of the table; any heading where ``turn`` is None."""
    return UniformRandomSampler(
        name=name,
        x_range=list(x),
        y_range=list(y),
        rotation=turn,
        rotation_axis="z",
        ensure_object_boundary_in_range=False,
        ensure_valid_placement=True,
        reference_pos=TABLE,
        z_offset=0.005,
    )


def wooden_cube(name: str, half: float, colour: str) -> BoxObject:
    """A cube of painted wood, as robosuite's own are."""
    material = CustomMaterial(
        texture=f"Wood{colour}",
        tex_name=colour.lower(),
        mat_name=f"{colour.lower()}_mat",
        tex_attrib={"type": "cube"},
        mat_attrib={"texrepeat": "1 1", "specular": "0.4", "shininess": "0.1"},
    )
    return BoxObject(name=name, size=[half] * 3, rgba=[1, 1, 1, 1], material=material)


def fixture(file: str, name: str, x: float, y: float) -> MujocoXMLObject:
    """Something that stands on the table for good."""
    thing = MujocoXMLObject(str(ASSETS / file), name=name, joints=None)
    thing.get_obj().set("pos", array_to_string(TABLE + (x, y, 0.0)))
    return thing


class WmpoStackThree(TableTask):
    """The red cube onto the green one, then the blue one onto the red one."""

    HALF = {"cubeA": 0.02, "cubeB": 0.025, "cubeC": 0.02}  # as in robosuite's Stack

    def _make_objects(self) -> tuple[list[tuple[MujocoObject, Any]], list[MujocoObject]]:
        colours = {"cubeA": "Red", "cubeB": "Green", "cubeC": "Blue"}
        cubes = [wooden_cube(name, self.HALF[name], colour) for name, colour in colours.items()]
        self.cube_a, self.cube_b, self.cube_c = cubes
        return [(c, on_table(c.name, (-0.1, 0.1), (-0.1, 0.1), None)) for c in cubes], []

    def _check_success(self) -> bool:
        """Red touches green and is above it, blue touches red and is above it, and the hand holds neither."""
        a, b, c = (self._place(cube)[2] for cube in (self.cube_a, self.cube_b, self.cube_c))
        return bool(
            a > b + 0.03
            and c > a + 0.03
            and self.check_contact(self.cube_a, self.cube_b)
            and self.check_contact(self.cube_c, self.cube_a)
            and not self._holds([self.cube_a, self.cube_c])
        )


class WmpoThreePieceAssembly(TableTask):
    """The tube into the base's well, then the peg into the tube."""

    def _make_objects(self) -> tuple[list[tuple[MujocoObject, Any]], list[MujocoObject]]:
        # Nearer to the arm than the table's centre, whose far side it only reaches with a straight elbow.
        self.base = fixture("assembly_base.xml", "base", -0.05, 0.0)
        self.first, self.second = (
            MujocoXMLObject(str(ASSETS / f"assembly_{name}.xml"), name=name) for name in ("first", "second")
        )
        anywhere = ((-0.27, 0.17), (-0.22, 0.22), 0.0)
        return [(t, on_table(t.name, *anywhere)) for t in (self.first, self.second)], [self.base]

    def _check_success(self) -> bool:
        """Both pieces are in: centred within 10 mm and down to within 10 mm of where they rest."""
        base, first, second = (self._place(thing) for thing in (self.base, self.first, self.second))
        in_base, in_first = first - base, second - first
        return bool(
            np.abs(in_base[:2]).max() < 0.01
            and in_base[2] < 0.04 + 0.01
            and np.abs(in_first[:2]).max() < 0.01
            and in_first[2] < 0.022 + 0.01
        )


class WmpoCoffee(TableTask):
    """The pod into the machine's cup, then the lid down."""

    OPEN = 1.5  # radians

    def _make_objects(self) -> tuple[list[tuple[MujocoObject, Any]], list[MujocoObject]]:
        self.machine = fixture("coffee_machine.xml", "machine", 0.0, -0.1)
        self.pod = CylinderObject(
            name="pod",
            size=[0.02, 0.014],
            rgba=[0.85, 0.83, 0.78, 1],
            density=200,
            friction=(1.0, 0.3, 0.1),
        )
        return [(self.pod, on_table("pod", (-0.08, -0.02), (0.1, 0.16), 0.0))], [self.machine]

    def _reset_internal(self) -> None:
        super()._reset_internal()
        self.sim.data.set_joint_qpos("machine_hinge", self.OPEN)

    def _check_success(self) -> bool:
        """The pod is in the cup, within 20 mm of its centre and below its rim, and the lid is closed."""
        cup = self.sim.data.get_site_xpos("machine_cup")
        off = self._place(self.pod) - cup
        closed = self.sim.data.get_joint_qpos("machine_hinge") < 0.3
        return bool(closed and np.linalg.norm(off[:2]) < 0.02 and 0.0 < off[2] < 0.025)
