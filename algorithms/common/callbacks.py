"""A progress bar that counts decisions."""

from __future__ import annotations

from stable_baselines3.common.callbacks import ProgressBarCallback
from tqdm import tqdm


class DecisionProgressBar(ProgressBarCallback):
    """Progress bar of ``learn`` with the time left and the latest success rate.

    SB3's own adds ``num_envs`` at every ``env.step``; here only rows that are still running decide anything,
    so that bar would overrun its total.
    """

    def _on_training_start(self) -> None:
        total = self.locals["total_timesteps"]
        self.pbar = tqdm(total=total, initial=self.model.num_timesteps, unit="decision", dynamic_ncols=True)

    def _on_step(self) -> bool:
        self.pbar.update(min(self.model.num_timesteps, self.pbar.total) - self.pbar.n)
        return True

    def _on_rollout_end(self) -> None:
        rate = self.model.logger.name_to_value.get("rollout/success_rate")
        if rate is not None:
            self.pbar.set_postfix(success=f"{100 * rate:.0f}%")
