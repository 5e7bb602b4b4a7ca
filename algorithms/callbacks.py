"""Progress bar for group algorithms that counts decisions or iterations."""

from __future__ import annotations

from stable_baselines3.common.callbacks import ProgressBarCallback
from tqdm import tqdm


class GroupProgressBar(ProgressBarCallback):
    """Progress bar of ``learn`` with the remaining time and the latest success rate.

    It counts iterations if ``learn`` was called with ``max_iterations``, decisions otherwise. SB3's own bar
    adds ``num_envs`` at every ``env.step`` and would overrun its total, because only rows that are still
    running make decisions.
    """

    def _on_training_start(self) -> None:
        iterations, decisions = self.locals["last_iteration"], self.locals["total_timesteps"]
        self.counts_iterations = iterations < decisions
        total, unit = (iterations, "iteration") if self.counts_iterations else (decisions, "decision")
        self.pbar = tqdm(total=total, initial=self._done(), unit=unit, dynamic_ncols=True)

    def _done(self) -> int:
        return self.model._iteration if self.counts_iterations else self.model.num_timesteps

    def _advance(self) -> None:
        self.pbar.update(min(self._done(), self.pbar.total) - self.pbar.n)

    def _on_step(self) -> bool:
        self._advance()
        return True

    def _on_rollout_end(self) -> None:
        rate = self.model.logger.name_to_value.get("rollout/success_rate")
        if rate is not None:
            self.pbar.set_postfix(success=f"{100 * rate:.0f}%")

    def _on_training_end(self) -> None:
        self._advance()
        super()._on_training_end()
