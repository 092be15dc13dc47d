"""The launcher that Hydra calls for ``-m``. Hydra imports it at every start, so it imports nothing heavy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hydra.core.config_store import ConfigStore
from hydra.plugins.launcher import Launcher

if TYPE_CHECKING:
    from hydra.core.utils import JobReturn
    from hydra.types import HydraContext, TaskFunction
    from omegaconf import DictConfig


TARGET = "hydra_plugins.ptqbench_launcher.launcher.PtqbenchLauncher"
ConfigStore.instance().store(group="hydra/launcher", name="ptqbench", node={"_target_": TARGET}, provider="ptqbench")


class PtqbenchLauncher(Launcher):
    """Compose every override list here and now, and hand resolved cells to ``ptqbench.launch``."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Remember what Hydra composed; the task function is not used, since cells run from their ``spec.json``."""
        self._loader, self._config = hydra_context.config_loader, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run or submit one cell per override list."""
        from hydra.core.utils import JobReturn, JobStatus
        from omegaconf import OmegaConf

        from ptqbench.hydra_app import launch_multirun

        def compose(words: list[str]) -> Any:
            config = self._loader.load_sweep_config(self._config, words)
            return {key: OmegaConf.to_container(config[key], resolve=True) if OmegaConf.is_config(config[key]) else config[key]
                    for key in config if key != "hydra"}  # fmt: skip

        launch_multirun([list(words) for words in job_overrides], compose)
        return [JobReturn(overrides=list(words), status=JobStatus.COMPLETED) for words in job_overrides]
