"""The stages of a run; each writes its artefact when it is complete and is skipped when that is there."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from wmpo_gym.data.episode import Episode
from wmpo_gym.data.store import EpisodeStore
from wmpo_gym.envs.ledger import Ledger
from wmpo_gym.envs.simulated.scripted import record_expert, record_play
from wmpo_gym.evaluation.validation import measure_learnable, validate
from wmpo_gym.evaluation.world_quality import imagined_replays, moved_object_error
from wmpo_gym.pipeline.presets import Recipe
from wmpo_gym.policies.sft import READS_INSTRUCTION, instruction_gap, train_sft
from wmpo_gym.policies.vla_policy import VLAPolicy
from wmpo_gym.reward.training import train_classifier
from wmpo_gym.rollouts.rollout import collect_episodes, make_rollout_env
from wmpo_gym.tasks import get_task
from wmpo_gym.utils.config import keep_settings
from wmpo_gym.utils.io import read_json, write_json_atomic
from wmpo_gym.utils.progress import progress_bar
from wmpo_gym.world.networks.autoencoder import PixelAutoencoder
from wmpo_gym.world.networks.conv import ConvWorldModel
from wmpo_gym.world.proprio import learn_proprio, proprio_size
from wmpo_gym.world.training import WorldModelTrainer, WorldModelTraining
from wmpo_gym.world.world import StartFrames, World, WorldConfig, find_pretrained

SFT_ATTEMPTS = 3  # trainings of the base policy, each going on from the one before
PLAY_JUDGED = 200  # play episodes that say how well pre-training came off


class Run:
    """One run of a recipe in a directory.

    Args:
        recipe: The settings; a directory is only taken up again with the same ones.
        out: The directory.
        bundled: Start from the bundled base policy and play-pretrained world model instead of training them.
        progress: Show progress bars and headings.
    """

    def __init__(
        self, recipe: Recipe, out: str | Path, *, bundled: bool = False, progress: bool = True
    ) -> None:
        self.recipe, self.out, self.bundled, self.progress = recipe.seeded(), Path(out), bundled, progress
        self.task = get_task(recipe.task)
        self.starts = recipe.start_states(self.task)
        keep_settings(self.out / "recipe.json", {"bundled": bundled, **self.recipe.to_dict()})
        self._times = self.out / "seconds.json"
        self.seconds: dict[str, float] = read_json(self._times) if self._times.exists() else {}

    def round(self, number: int) -> Run:
        """The part of the run that collects, refreshes and optimises for the ``number``-th time, from 1.

        The first keeps its artefacts beside those of the run, further ones in ``round-<number>``; times are
        those of the whole run.
        """
        part, share = copy.copy(self), self.recipe.rollouts // self.recipe.rounds
        part.starts = {**self.starts, "rollouts": self.starts["rollouts"][(number - 1) * share :][:share]}
        if number > 1:
            part.out = self.out / f"round-{number}"
            part.recipe = replace(self.recipe, seed=self.recipe.seed + 1000 * (number - 1)).seeded()
        return part

    @contextmanager
    def stage(self, name: str, what: str) -> Iterator[None]:
        """Show a heading and add the block's duration to ``seconds``, also if it is interrupted."""
        if self.progress:
            print(f"\n── {what}", flush=True)
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = round(self.seconds.get(name, 0.0) + time.perf_counter() - started, 1)
            write_json_atomic(self._times, self.seconds)

    # -- data ------------------------------------------------------------------------------------------------
    def demonstrations(self) -> list[Episode]:
        """Episodes of the mis-calibrated expert, failures included."""
        seed, expert, task = self.recipe.seed, self.recipe.expert, self.task
        return self._recorded(
            "demos", "Demonstrations", lambda ids: record_expert(ids, seed=seed, config=expert, task=task)
        )

    def play(self) -> list[Episode]:
        """Unlabelled, task-agnostic play."""
        seed, task = self.recipe.seed, self.task
        return self._recorded(
            "play", "Task-agnostic play (no labels)", lambda ids: record_play(ids, seed=seed, task=task)
        )

    def _recorded(
        self, name: str, what: str, recorder: Callable[[list[int]], Iterator[Episode]]
    ) -> list[Episode]:
        store, ids = EpisodeStore(self.out / name), self.starts[name]
        if not ids:
            return []
        present = set(store.ids())
        missing = [i for i in ids if i not in present]
        if missing:
            with self.stage(name, f"{what}: {len(ids)} episodes"), self._bar(len(missing), name) as bar:
                for episode in recorder(missing):
                    store.append(episode)
                    bar.update(1)
        return store.load()

    def rollouts(self, policy: VLAPolicy) -> list[Episode]:
        """Labelled episodes of the policy, P in all rounds: the only real ones after fine-tuning."""
        store, ids = EpisodeStore(self.out / "rollouts"), self.starts["rollouts"]
        if len(store.ids()) < len(ids):
            with self.stage("rollouts", f"Real rollouts of the policy: {len(ids)} episodes"):
                env = make_rollout_env(
                    "WMPO-Simulated-v0", min(64, len(ids)), record_frames=True, task=self.task
                )
                try:
                    collect_episodes(
                        env, policy, ids, store, seed=self.recipe.seed + 1, progress=self.progress
                    )
                finally:  # an interrupted wave is run again, and both times count
                    spent = self.spent_on_rollouts() + env.unwrapped.ledger  # type: ignore[attr-defined]
                    write_json_atomic(self._spent, spent.to_dict())
                    env.close()
        episodes = store.load()
        if self.progress:
            print(f"   the policy succeeded in {sum(bool(e.success) for e in episodes)} of {len(episodes)}")
        return episodes

    @property
    def _spent(self) -> Path:
        return self.out / "rollouts.ledger.json"

    def spent_on_rollouts(self) -> Ledger:
        """What the environment counted while the rollouts were made."""
        return Ledger(**read_json(self._spent)) if self._spent.exists() else Ledger()

    # -- models ----------------------------------------------------------------------------------------------
    def base_policy(self, demonstrations: list[Episode]) -> VLAPolicy:
        """The policy to improve."""
        if self.bundled:
            return VLAPolicy.from_pretrained(find_pretrained(self.task.name, "policy"), seed=self.recipe.seed)
        directory = self.out / "base_policy"
        if not directory.exists():
            steps = self.recipe.sft.steps
            with self.stage("sft", f"Supervised fine-tuning: {steps} steps"):
                self._fine_tuned(demonstrations).save_pretrained(directory)
        return VLAPolicy.from_pretrained(directory, seed=self.recipe.seed)

    def _fine_tuned(
        self, demonstrations: list[Episode], policy: VLAPolicy | None = None, attempt: int = 1
    ) -> VLAPolicy:
        """A new policy, trained on if it does not tell the instructions apart by then."""
        again, recipe = f"-{attempt}" if attempt > 1 else "", self.recipe
        with self._bar(recipe.sft.steps, f"sft{again}") as bar:
            policy = train_sft(
                demonstrations, self.task, settings=recipe.sft, seed=recipe.seed + 1000 * (attempt - 1),
                policy=policy, progress=lambda done, total, metrics: bar.update(1),
                checkpoint_dir=self.out / "checkpoints" / f"sft{again}",
            )  # fmt: skip
        gap = instruction_gap(policy, demonstrations, self.task)
        if gap is None or gap >= READS_INSTRUCTION:
            return policy
        if self.progress:
            print(f"   the instruction is hardly read ({gap:.2f} nats; wanted {READS_INSTRUCTION})")
        return policy if attempt == SFT_ATTEMPTS else self._fine_tuned(demonstrations, policy, attempt + 1)

    def pretrained_network(self, play: list[Episode]) -> ConvWorldModel:
        """World model trained on play alone: the counterpart of the paper's Open X-Embodiment checkpoint."""
        if self.bundled:
            return ConvWorldModel.from_pretrained(find_pretrained(self.task.name, "play") / "network").float()
        directory = self.out / "play_world"
        if not play:
            return ConvWorldModel.for_task(self.task, self.recipe.seed)
        if not directory.exists():
            config = self.recipe.pretrain
            with self.stage("pretrain", f"World-model pre-training on play: {config.steps} steps"):
                state_dim = proprio_size(self.task, play)
                network = ConvWorldModel.for_task(self.task, self.recipe.seed, state_dim=state_dim)
                card: dict[str, Any] = {
                    "name": f"{self.task.name} (play only)", "recipe": self.recipe.to_dict(),
                } | self._train("pretrain", network, play, config, None)  # fmt: skip
                frames = StartFrames.from_episodes(play)
                world = World(self.task, network, PixelAutoencoder(), None, frames, card=card)
                error = card["moved_object_error_px"] = moved_object_error(world, play[:PLAY_JUDGED])
                if self.progress and error is not None:
                    print(f"   objects that play moved are off by {error:.2f} px in the median")
                world.save_pretrained(directory)
        return World.from_pretrained(directory).network

    def aligned_network(
        self, network: ConvWorldModel, real: list[Episode], demos: list[Episode], play: list[Episode]
    ) -> ConvWorldModel:
        """The world model fine-tuned on what the policy really does."""
        directory = self.out / "aligned"
        if not (directory / "config.json").exists():
            with self.stage(
                "align", f"World-model alignment on the rollouts: {self.recipe.align.steps} steps"
            ):
                parts = list(zip((real, demos, play), self.recipe.weights, strict=True))
                weights = [w for episodes, w in parts for _ in episodes]
                self._train("align", network, [*real, *demos, *play], self.recipe.align, weights)
                network.save_pretrained(directory)
        return ConvWorldModel.from_pretrained(directory).eval()

    def _train(
        self,
        name: str,
        network: ConvWorldModel,
        episodes: list[Episode],
        config: WorldModelTraining,
        weights: list[float] | None,
    ) -> dict[str, Any]:
        """Train in place; the card says how that went."""
        motion = learn_proprio(
            network, PixelAutoencoder(), episodes, weights=weights, seed=config.seed,
            directory=self.out / "checkpoints" / f"{name}-motion", progress=self.progress,
        )  # fmt: skip
        trainer = WorldModelTrainer(
            network, PixelAutoencoder(), self.task, episodes, config, weights=weights,
            checkpoint_dir=self.out / "checkpoints" / name, tensorboard=self.out / "tensorboard" / name,
        )  # fmt: skip
        history = trainer.train(progress=self.progress, description=name)
        return {"history": history, "motion": motion}

    def classifier(self, network: ConvWorldModel, real: list[Episode], demos: list[Episode]) -> Any:
        """The success classifier, calibrated on episodes it did not see.

        It also learns from the world model's replays of the recorded actions, labelled by the real outcomes;
        without them it takes the model's small faults for successes.
        """
        from wmpo_gym.reward.conv import ConvSuccessClassifier

        directory = self.out / "classifier"
        if not directory.exists():
            with self.stage("reward", f"Success classifier: {self.recipe.classifier_steps} steps"):
                recorded = [*real, *(demos if self.recipe.classifier_demos else [])]
                replays = imagined_replays(
                    self.world(network, None, recorded), recorded, seed=self.recipe.seed
                )
                classifier, figures = train_classifier(
                    recorded,
                    self.task,
                    steps=self.recipe.classifier_steps,
                    seed=self.recipe.seed,
                    imagined=replays,
                    progress=self.progress,
                )
                write_json_atomic(self.out / "classifier.json", figures)
                classifier.save_pretrained(directory)
        return ConvSuccessClassifier.from_pretrained(directory)

    def world(self, network: ConvWorldModel, classifier: Any, episodes: list[Episode]) -> World:
        """All of it as one bundle, with its card."""
        card = {
            "name": f"{self.task.name} (seed {self.recipe.seed})",
            "recipe": self.recipe.to_dict(),
            "data": {
                "labelled real episodes after the base policy": self.recipe.rollouts,
                "demonstrations (labelled, also used for the base policy)": self.recipe.demos,
                "play episodes (unlabelled)": self.recipe.play,
            },
        }
        frames = StartFrames.from_episodes(episodes)
        return World(self.task, network, PixelAutoencoder(), classifier, frames, WorldConfig(), card)

    def imagined_world(
        self, network: ConvWorldModel, real: list[Episode], demos: list[Episode], play: list[Episode]
    ) -> World:
        """The network aligned with all real episodes so far, and the classifier learned with it."""
        network = self.aligned_network(network, real, demos, play)
        classifier = self.classifier(network, real, demos)
        return self.world(network, classifier, [*real, *demos, *play])

    def gates(
        self, world: World, policy: VLAPolicy, *, earlier: dict[str, dict[str, Any]] | None = None
    ) -> dict[str, dict[str, Any]]:
        """The four gates, measured on validation start states and written into the world's card.

        Args:
            world: The world.
            policy: About to be optimised in it.
            earlier: Those of the first round, of which *learnable* holds for all.
        """
        file = self.out / "gates.json"
        if not file.exists():
            with self.stage("gates", "Is this world fit to train in?"):
                n, grpo = self.recipe.gate_episodes, self.recipe.grpo

                def learnable() -> Any:
                    return measure_learnable(
                        policy,
                        self.task,
                        episodes=n,
                        n_groups=grpo.n_groups,
                        group_size=grpo.group_size,
                        block=4,
                        seed=self.recipe.seed,
                        progress=self.progress,
                        learning_rate=grpo.learning_rate,
                    )

                world.card["gates"] = earlier or {}
                gates = validate(
                    world,
                    policy,
                    episodes=n,
                    learnable=None if earlier else learnable,
                    seed=self.recipe.seed,
                    progress=self.progress,
                )
                write_json_atomic(file, gates)
        world.card["gates"] = read_json(file)
        return world.card["gates"]

    def _bar(self, total: int, name: str) -> Any:
        return progress_bar(total=total, desc=name, disable=not self.progress)
