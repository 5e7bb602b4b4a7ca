"""``WMPO-Imagined-v0``: environment with a learned world model as dynamics and a classifier as reward."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from gymnasium.utils import EzPickle

from wmpo_gym.envs.chunk_env import Chunk, ChunkEnv, ChunkVectorEnv, Starts, State
from wmpo_gym.envs.heap import keep_freed_memory
from wmpo_gym.envs.rows import take_prefixed
from wmpo_gym.envs.success_filter import EpisodeHistory, in_a_row
from wmpo_gym.tasks import Task, get_task
from wmpo_gym.utils.io import read_json
from wmpo_gym.world.rollout import (
    ImaginedChunk,
    RolloutState,
    imagine_chunk,
    imagine_rollouts,
    noise_per_row,
    start,
)
from wmpo_gym.world.world import World, find_pretrained

if TYPE_CHECKING:
    import torch

    from wmpo_gym.reward.classifier import SuccessClassifier

# What must agree between the task of the spaces and the task a world was trained for.
SHARED_FIELDS = ("name", "instructions", "chunk", "action_dim", "image_size")
OTHER_NOISE = 0x5DEECE66D  # XORed with a noise seed to get that of the second rollout


class ImaginedVectorEnv(ChunkVectorEnv):
    """Batched environment whose episodes are imagined by a world model.

    ## Description
    One step samples the K frames that follow an action chunk and evaluates the success classifier on each of
    them. Row i draws its noise from its own generator, so results do not depend on the other rows; finished
    rows are not evaluated by the networks. Weights are loaded at the first reset.

    ## Action Space
    ``Box(-1, 1, (K, D), float32)``: one chunk of K control steps.

    ## Observation Space
    ``Dict(pixels: Box(0, 255, (H, W, 3), uint8), task_id: Discrete(n_instructions))``: the chunk's last
    frame, or the frame at which success was predicted.

    ## Rewards
    1.0 at the step in which the success probability first reaches the threshold, else 0.0, plus
    ``reward_terms``.

    ## Starting State
    One of the world's start frames, drawn from ``split`` or selected by ``options={"start_state_id": …}``; or
    any image given by ``options={"start_frames": …}``.

    ## Episode End
    Terminated at the first frame whose probability reaches the threshold; truncated after
    ``max_episode_steps`` chunks.

    ## Arguments
    See below and :class:`~wmpo_gym.envs.chunk_env.ChunkVectorEnv`.

    ## Info
    ``is_success``, ``success_prob`` (of the observed frame; 0.0 until the classifier's first window is full),
    ``start_state_id`` (-1 for an image without id), ``instruction``, ``n_frames`` (control steps executed by
    this step, up to the predicted success), ``nfe`` (network evaluations of this step), ``reward_<term>``;
    with ``return_frames`` also ``frames`` after steps.

    ## Version History
    * v0: first release.

    Args:
        num_envs: Number of rows.
        task: Task or its name; None uses the world's task, or ``"move-block"``.
        world: A :class:`World`, its directory, the name of a bundled world or a hub id; None uses the bundled
            world of the task.
        device: Device of the networks. On a CPU, equal seeds give equal pixels; GPU kernels may differ by one
            grey level.
        offload: Move the world's networks to the CPU during policy updates, to free device memory.
            Algorithms call :meth:`rest` before an update; the next reset or step moves the networks back.
            Results are unchanged.
        max_batch: Maximum number of rows per network call; results are unchanged. None uses all rows on an
            accelerator, and the network's ``cpu_batch`` (chosen for the caches) on a CPU.
        dtype: ``"bfloat16"`` runs a copy of the world model and autoencoder in bfloat16; not available on a
            CPU or for the convolutional network. Results change.
        compile: Compile the network with ``torch.compile``; the first chunk then takes minutes.
        threshold: Success probability threshold; None uses the classifier's calibrated threshold.
        consecutive_windows: Number of consecutive frames that must reach the threshold. Use 1 with the
            bundled classifier, which was trained with success at the last frame of an episode.
        dual_noise: When success is predicted, imagine the episode again under different noise, and count the
            success only if it is predicted again; otherwise the episode continues. Up to doubles the number
            of imagined frames.
        **kwargs: See :class:`~wmpo_gym.envs.chunk_env.ChunkVectorEnv`.

    Raises:
        ValueError: If the task or world does not exist, or they do not match.
    """

    def __init__(
        self,
        num_envs: int = 1,
        task: str | Task | None = None,
        *,
        world: World | str | Path | None = None,
        device: str = "cpu",
        offload: bool = False,
        max_batch: int | None = None,
        dtype: str = "float32",
        compile: bool = False,
        threshold: float | None = None,
        consecutive_windows: int = 1,
        dual_noise: bool = False,
        **kwargs: Any,
    ) -> None:
        EzPickle.__init__(
            self,
            num_envs,
            task,
            world=world,
            device=device,
            offload=offload,
            max_batch=max_batch,
            dtype=dtype,
            compile=compile,
            threshold=threshold,
            consecutive_windows=consecutive_windows,
            dual_noise=dual_noise,
            **kwargs,
        )
        super().__init__(num_envs, _task_of(task, world), **kwargs)
        if max_batch is not None and max_batch < 1:
            raise ValueError(f"max_batch must be at least 1 or None, got {max_batch}.")
        if threshold is not None and not 0.0 < threshold <= 1.0:
            raise ValueError(f"threshold is a probability in (0, 1], got {threshold}.")
        if consecutive_windows < 1:
            raise ValueError(f"consecutive_windows must be at least 1, got {consecutive_windows}.")
        self._source = self.task if world is None else world
        self._world: World | None = None
        self._device, self._offload = device, offload
        self._place: str | None = None  # current device of the networks, None before they are loaded
        self._max_batch = max_batch or num_envs
        self._fits_caches = max_batch is None and device == "cpu"
        self._dtype, self._compile = dtype, compile
        self._threshold = threshold
        self._consecutive, self._dual_noise = consecutive_windows, dual_noise
        self._streak = np.zeros(num_envs, np.int64)
        self._history = EpisodeHistory.empty(
            num_envs if dual_noise else 0,
            self._episode.pixels.shape[1:],
            (self.max_episode_steps, self.task_spec.chunk, self.task_spec.action_dim),
        )
        self._noise: list[torch.Generator] = []
        self._state: RolloutState | None = None  # of all rows

    # -- the world -------------------------------------------------------------------------------------------
    @property
    def world(self) -> World:
        """The world, loaded on first use."""
        if self._world is None:
            world = self._source if isinstance(self._source, World) else World.from_pretrained(self._source)
            self._check_world(world)
            self._world = world
        return self._world

    @property
    def world_fitness(self) -> dict[str, Any]:
        """Validation gates from the world's card, each with ``passed`` (None: not measurable), or empty.

        Algorithms read it before training and warn about failed gates; the environment does not act on it.
        """
        return dict(self.world.card.get("gates") or {})

    @property
    def start_state_ids(self) -> np.ndarray:
        """Ids of the world's start frames."""
        return self.world.start_frames.ids

    @property
    def classifier(self) -> SuccessClassifier:
        """The world's success classifier."""
        assert self.world.classifier is not None, "checked when the world was loaded"
        return self.world.classifier

    @property
    def threshold(self) -> float:
        """Success probability at which an episode counts as a success."""
        return self.classifier.threshold if self._threshold is None else self._threshold

    def describe(self) -> str:
        """Readable summary, including the world's validation gates."""
        gates = [f"{name} {(gate or {}).get('passed')}" for name, gate in self.world_fitness.items()]
        return "\n".join(
            [
                super().describe(),
                f"world: {type(self.world.network).__name__}, {len(self.start_state_ids)} start frames, "
                f"success at probability {self.threshold:g}",
                f"gates passed: {', '.join(gates) or 'never measured; run `wmpo validate`'}",
            ]
        )

    def _check_world(self, world: World) -> None:
        """Check that the world matches the spaces and has a usable success classifier."""
        for field in SHARED_FIELDS:
            ours, theirs = getattr(self.task_spec, field), getattr(world.task, field)
            if ours != theirs:
                raise ValueError(
                    f"The world was trained for task {world.task.name!r} with {field} {theirs!r}, the "
                    f"environment is for {self.task!r} with {ours!r}. Leave out `task` to take the world's."
                )
        if world.classifier is None:
            raise ValueError(
                "The world has no success classifier (it is only pre-trained), so it cannot reward. "
                "Train one with `wmpo train reward`."
            )
        horizon = self.max_episode_steps * self.task_spec.chunk
        if horizon + 1 < world.classifier.window:
            raise ValueError(
                f"Episodes of {horizon} control steps never fill the classifier's window of "
                f"{world.classifier.window} frames; raise max_episode_steps or use a shorter window."
            )

    def _open(self) -> None:
        if self._noise:
            return
        import torch

        world = self.world
        self._imagination = world.imagination(dtype=self._dtype, compile=self._compile)
        for network in self._networks():
            network.eval()
        self._move_to(self._device)
        if self._device == "cpu":
            keep_freed_memory()
        if self._fits_caches:
            self._max_batch = getattr(world.network, "cpu_batch", self.num_envs)
        self._index_of_id = {int(start_id): i for i, start_id in enumerate(world.start_frames.ids)}
        self._noise = [torch.Generator("cpu") for _ in range(self.num_envs)]

    def rest(self) -> None:
        """See :meth:`ChunkVectorEnv.rest`: with ``offload`` the networks move to the CPU."""
        if self._offload and self._place is not None:
            self._move_to("cpu")

    def _networks(self) -> list[torch.nn.Module]:
        """The world's networks, and their copies in another dtype."""
        parts: list[Any] = [self.world.classifier]
        for owner in (self.world, self._imagination):
            parts += [owner.network, getattr(owner.autoencoder, "vae", None)]
        parts = [getattr(part, "original", part) for part in parts]  # unwrap compiled networks
        return list({id(network): network for network in parts if network is not None}.values())

    def _move_to(self, place: str) -> None:
        """Move the networks and the rows' rollout state to a device."""
        import torch

        if place == self._place:
            return
        for network in self._networks():
            network.to(place)
        if self._state is not None:
            self._state = self._state.to(place)
        if self._place is not None and self._place.startswith("cuda"):
            torch.cuda.empty_cache()  # release cached memory for other users of the device
        self._place = place

    # -- episodes --------------------------------------------------------------------------------------------
    def _begin(self, starts: Starts) -> tuple[np.ndarray, np.ndarray]:
        self._move_to(self._device)
        frames, task_ids = starts.frames, starts.task_ids
        if frames is None or task_ids is None:
            known = self.world.start_frames
            index = [self._index_of_id[int(start_id)] for start_id in starts.start_state_ids]
            frames, task_ids = known.frames[index], known.task_ids[index]
        state = start(self._imagination, self.classifier, frames)
        if len(starts.rows) == self.num_envs:
            self._state = state
        else:
            assert self._state is not None, "the first reset begins every row"
            self._state.assign(starts.rows, state)
        for row, seed in zip(starts.rows, starts.noise_seeds, strict=True):
            self._noise[row].manual_seed(int(seed))
        self._streak[starts.rows] = 0
        if self._dual_noise:
            self._history.begin(starts.rows, frames, starts.noise_seeds)
        return frames, task_ids

    def _advance(self, rows: np.ndarray, actions: np.ndarray) -> Chunk:
        self._move_to(self._device)
        assert self._state is not None, "begun by the reset"
        chunk = imagine_chunk(
            self._imagination,
            self.classifier,
            self._state,
            rows,
            self._episode.task_id[rows],
            actions,
            noise_per_row(self._imagination, self._noise)(rows),
            max_batch=self._max_batch,
        )
        self._count(chunk)
        frames, probs = chunk.frames, chunk.probs
        assert probs is not None, "there is a classifier"
        nfe = np.full(len(rows), self._imagination.nfe_per_chunk)
        # NaN (window not full yet) compares as not reached.
        reached, self._streak[rows] = in_a_row(probs >= self.threshold, self._streak[rows], self._consecutive)
        if self._dual_noise:
            self._history.add(rows, actions)
            claimed = np.flatnonzero(reached.any(axis=1))
            reached[claimed] &= self._claimed_again(rows[claimed])[:, None]
            nfe[claimed] *= 1 + self._history.age[rows[claimed]]
        success = np.any(reached, axis=1)
        last = np.where(success, reached.argmax(axis=1), frames.shape[1] - 1)
        each = np.arange(len(rows))
        clips = None
        if self.wants_frames:
            clips = frames[each[:, None], np.minimum(np.arange(frames.shape[1]), last[:, None])]
        return Chunk(
            pixels=frames[each, last],
            n_frames=last + 1,
            is_success=success,
            success_prob=np.nan_to_num(probs[each, last]).astype(np.float64),
            nfe=nfe,
            frames=clips,
        )

    def _claimed_again(self, rows: np.ndarray) -> np.ndarray:
        """Whether success is also predicted under different noise, bool (n,); added to the ledger."""
        import torch

        history = self._history.rows(rows)
        generators = [torch.Generator("cpu").manual_seed(OTHER_NOISE ^ int(seed)) for seed in history.seed]
        claimed, streak = np.zeros(len(rows), np.bool_), np.zeros(len(rows), np.int64)
        chunks = imagine_rollouts(
            self._imagination,
            self.classifier,
            history.first,
            self._episode.task_id[rows],
            lambda obs, some, chunk: history.actions[some, chunk],
            noise_per_row(self._imagination, generators),
            int(history.age.max(initial=0)),
            finished=lambda some, steps, probs: history.age[some] * self.task_spec.chunk <= steps,
            max_batch=self._max_batch,
        )
        for chunk in chunks:
            self._count(chunk)
            assert chunk.probs is not None
            reached, streak[chunk.rows] = in_a_row(
                chunk.probs >= self.threshold, streak[chunk.rows], self._consecutive
            )
            claimed[chunk.rows] |= reached.any(axis=1)
        return claimed

    def _count(self, chunk: ImaginedChunk) -> None:
        """Add an imagined chunk to the ledger."""
        self.ledger.imagined_frames += chunk.frames.shape[0] * chunk.frames.shape[1]
        self.ledger.nfe += len(chunk.rows) * self._imagination.nfe_per_chunk

    # -- state -----------------------------------------------------------------------------------------------
    def _states(self) -> dict[str, Any]:
        """Parts of the rows' rollout state, by their prefix in a dumped state."""
        assert self._state is not None, "begun by the reset"
        return {"dream": self._state.imagination, "judge": self._state.classifier}

    def _dump_rows(self, rows: np.ndarray) -> State:
        state = {"noise": np.stack([self._noise[row].get_state().numpy() for row in rows])}
        for name, held in self._states().items():
            state |= {f"{name}.{key}": value for key, value in held.rows(rows).to_dict().items()}
        state["streak"] = self._streak[rows].copy()
        if self._dual_noise:
            state |= {f"so_far.{key}": value for key, value in self._history.rows(rows).to_dict().items()}
        return state

    def _load_rows(self, rows: np.ndarray, state: State) -> None:
        import torch

        for row, packed in zip(rows, state["noise"], strict=True):
            self._noise[row].set_state(torch.from_numpy(packed.copy()))
        for name, held in self._states().items():
            held.assign(rows, type(held).from_dict(take_prefixed(state, f"{name}.")))
        self._streak[rows] = state["streak"]
        if self._dual_noise:
            self._history.assign(rows, EpisodeHistory.from_dict(take_prefixed(state, "so_far.")))


def _task_of(task: str | Task | None, world: World | str | Path | None) -> Task:
    """The requested task, or else the world's task; loads no weights."""
    if task is not None:
        return get_task(task)
    if world is None:
        return get_task("move-block")
    if isinstance(world, World):
        return world.task
    return Task.from_dict(read_json(find_pretrained(world, "world") / "config.json")["task"])


class ImaginedEnv(ChunkEnv):
    """Single-row :class:`ImaginedVectorEnv`; see there for spaces, rewards and infos."""

    vector_class = ImaginedVectorEnv

    @property
    def world(self) -> World:
        """The world, loaded on first use."""
        return self._batch.world

    @property
    def world_fitness(self) -> dict[str, Any]:
        """Validation gates from the world's card; empty if it was never validated."""
        return self._batch.world_fitness

    @property
    def threshold(self) -> float:
        """Success probability at which an episode counts as a success."""
        return self._batch.threshold
