"""Pictures that a CPU can afford: no shadows, reflections or multisampling, and fewer triangles.

What a software renderer pays for is triangles and passes, hardly pixels: robosuite's Panda has 168,000 of the
former, and its scenes are drawn with shadows, reflections and fourfold multisampling.
"""

from __future__ import annotations

import atexit
import ctypes.util
import importlib
import os
import sys
import weakref
from typing import Any

import mujoco
import numpy as np

CELLS = 16  # vertices of a visual mesh are merged in a grid of so many cells along its longest side
LEAST_FACES = 500  # meshes with fewer triangles are left as they are
FINEST = 64  # up to this side, pictures are drawn at twice the size and averaged (no multisampling)
VISUAL_GROUP = 1
NO_GL = (
    "No OpenGL for pictures without a screen ({cause}). Install one of the two: for EGL `apt-get install "
    "libegl1 libgl1`, for OSMesa `apt-get install libosmesa6`; MUJOCO_GL=egl or MUJOCO_GL=osmesa chooses."
)


FORKED = (
    "This process was forked from one that had begun to render, where OpenGL hangs. Start processes with "
    "spawn: gymnasium.make_vec(..., vectorization_mode='async', vector_kwargs={'context': 'spawn'})."
)
_rendering_process: int | None = None


class GLUnavailableError(OSError):
    """There is no OpenGL to render with."""


def decimate(model: mujoco.MjModel, cells: int = CELLS) -> int:
    """Merge nearby vertices of the visual meshes, in place; physics uses other meshes and does not change.

    Call it before a camera is made: that is when triangles go to the graphics library.

    Args:
        model: The model.
        cells: Vertices are merged in a grid of so many cells along a mesh's longest side.

    Returns:
        Triangles of the visual meshes afterwards.
    """
    is_mesh = model.geom_type == int(mujoco.mjtGeom.mjGEOM_MESH)
    shown = np.unique(model.geom_dataid[is_mesh & (model.geom_group == VISUAL_GROUP)])
    for mesh in shown[model.mesh_facenum[shown] > LEAST_FACES]:
        _merge_vertices(model, int(mesh), cells)
    return int(model.mesh_facenum[shown].sum())


def _merge_vertices(model: mujoco.MjModel, mesh: int, cells: int) -> None:
    first, n = model.mesh_vertadr[mesh], model.mesh_vertnum[mesh]
    vertices = model.mesh_vert[first : first + n]
    start, n_faces = model.mesh_faceadr[mesh], model.mesh_facenum[mesh]
    faces, normals, texcoords = (
        table[start : start + n_faces]
        for table in (model.mesh_face, model.mesh_facenormal, model.mesh_facetexcoord)
    )
    cell = np.ptp(vertices, axis=0).max() / cells
    x, y, z = np.floor((vertices - vertices.min(axis=0)) / cell).astype(np.int64).T
    _, group = np.unique((x * (cells + 1) + y) * (cells + 1) + z, return_inverse=True)
    size = np.bincount(group)
    centre = np.stack([np.bincount(group, weights=column) / size for column in vertices.T], axis=1)
    distance = np.square(vertices - centre[group]).sum(axis=1)
    nearest = np.lexsort((distance, group))[np.cumsum(size) - size]  # stands for its whole group
    merged = nearest[group][faces]
    a, b, c = np.sort(merged, axis=1).T.astype(np.int64)
    keep = np.zeros(n_faces, np.bool_)
    keep[np.unique((a * n + b) * n + c, return_index=True)[1]] = True  # each triangle once
    keep &= (a < b) & (b < c)
    if model.mesh_normalnum[mesh] == n:  # one normal per vertex: neighbours share it and look round
        _average_normals(model, mesh, group, nearest)
        normals[:] = merged
    n_kept = int(keep.sum())
    for table, values in ((faces, merged), (normals, normals.copy()), (texcoords, texcoords.copy())):
        table[:n_kept] = values[keep]
    model.mesh_facenum[mesh] = n_kept


def _average_normals(model: mujoco.MjModel, mesh: int, group: np.ndarray, nearest: np.ndarray) -> None:
    first, n = model.mesh_normaladr[mesh], model.mesh_normalnum[mesh]
    normals = model.mesh_normal[first : first + n]
    mean = np.stack([np.bincount(group, weights=column) for column in normals.T], axis=1)
    length = np.linalg.norm(mean, axis=1, keepdims=True)
    normals[nearest] = np.where(length > 1e-3, mean / np.maximum(length, 1e-3), normals[nearest])


class Camera:
    """Draws one camera of a model, without a screen.

    Args:
        model: The model; :func:`decimate` it first.
        name: Name of the camera.
        size: Side of the picture in pixels.

    Raises:
        ValueError: If the model has no such camera.
        GLUnavailableError: If there is no OpenGL, or none any more after a fork; the message says what to do.
    """

    def __init__(self, model: mujoco.MjModel, name: str, size: int) -> None:
        names = [model.camera(i).name for i in range(model.ncam)]
        if name not in names:
            raise ValueError(f"The scene has no camera {name!r}; it has {', '.join(names)}.")
        self.model, self.size = model, size
        self._zoom = 2 if size <= FINEST else 1
        side = size * self._zoom
        model.vis.quality.offsamples = model.vis.quality.shadowsize = 0
        model.vis.global_.offwidth = max(side, model.vis.global_.offwidth)
        model.vis.global_.offheight = max(side, model.vis.global_.offheight)
        self._camera = mujoco.MjvCamera()
        self._camera.type, self._camera.fixedcamid = mujoco.mjtCamera.mjCAMERA_FIXED, names.index(name)
        self._option = mujoco.MjvOption()
        self._option.geomgroup[0] = 0  # what collides
        self._scene = mujoco.MjvScene(model, maxgeom=2000)
        for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
            self._scene.flags[int(flag)] = 0
        self._rect = mujoco.MjrRect(0, 0, side, side)
        self._pixels = np.empty((side, side, 3), np.uint8)
        self._gl: Any = _gl_context(side)
        self._gl.make_current()
        self._context: Any = mujoco.MjrContext(model, int(mujoco.mjtFontScale.mjFONTSCALE_100))
        mujoco.mjr_setBuffer(int(mujoco.mjtFramebuffer.mjFB_OFFSCREEN), self._context)
        # The library shuts down when Python exits, which has to come after its contexts are gone.
        atexit.register(_close, weakref.ref(self))

    def render(self, data: mujoco.MjData) -> np.ndarray:
        """The picture of a state as uint8 ``(size, size, 3)``, a new array."""
        _check_process()
        self._gl.make_current()
        mujoco.mjv_updateScene(
            self.model, data, self._option, None, self._camera, int(mujoco.mjtCatBit.mjCAT_ALL), self._scene
        )
        mujoco.mjr_render(self._rect, self._scene, self._context)
        mujoco.mjr_readPixels(self._pixels, None, self._rect, self._context)
        upright, n = self._pixels[::-1], self._zoom
        if n == 1:
            return upright.copy()
        blocks = upright.reshape(self.size, n, self.size, n, 3)
        return ((blocks.sum(axis=(1, 3), dtype=np.uint16) + n * n // 2) // (n * n)).astype(np.uint8)

    def close(self) -> None:
        """Release what the graphics library holds; calling it twice is fine."""
        if self._context is not None:
            self._gl.make_current()
            self._context.free()
            self._gl.free()
            self._context = self._gl = None

    def __del__(self) -> None:
        if not sys.is_finalizing() and getattr(self, "_context", None) is not None:
            self.close()


def _close(reference: weakref.ref[Camera]) -> None:
    camera = reference()
    if camera is not None:
        camera.close()


def _check_process() -> None:
    """Raise instead of hanging."""
    global _rendering_process
    _rendering_process = _rendering_process or os.getpid()
    if _rendering_process != os.getpid():
        raise GLUnavailableError(FORKED)


def _gl_context(side: int) -> Any:
    """A context without a screen: EGL, or OSMesa where that is asked for or the only one there."""
    _check_process()
    if sys.platform != "linux":
        return mujoco.GLContext(side, side)
    asked = os.environ.get("MUJOCO_GL", "").lower()
    libraries = {"egl": "EGL", "osmesa": "OSMesa"}
    found = [name for name, library in libraries.items() if ctypes.util.find_library(library)]
    name = asked if asked in libraries else (found or ["egl"])[0]
    try:
        return importlib.import_module(f"mujoco.{name}").GLContext(side, side)
    except Exception as error:  # PyOpenGL fails in many ways: ImportError, AttributeError, its own errors
        raise GLUnavailableError(NO_GL.format(cause=f"{name}: {type(error).__name__}: {error}")) from error
