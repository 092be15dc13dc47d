"""The sweeper that Hydra calls for ``-m``. Hydra imports it at every start, so it imports nothing heavy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hydra.core.config_store import ConfigStore
from hydra.plugins.sweeper import Sweeper

if TYPE_CHECKING:
    from hydra.types import HydraContext, TaskFunction
    from omegaconf import DictConfig


TARGET = "hydra_plugins.ptqbench_sweeper.sweeper.PtqbenchSweeper"
ConfigStore.instance().store(group="hydra/sweeper", name="ptqbench", node={"_target_": TARGET}, provider="ptqbench")


class PtqbenchSweeper(Sweeper):
    """Tell ``ptqbench.hydra_app`` what a multirun asks for.

    Hydra's own sweeper writes ``multirun.yaml`` into the working folder and starts jobs while Hydra is still at work.
    """

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Remember what Hydra composed; the task function is not used, since cells run from their ``spec.json``."""
        self._loader, self._config = hydra_context.config_loader, config

    def sweep(self, arguments: list[str]) -> None:
        """Parse the override words of all jobs and pass them on."""
        from hydra.core.override_parser.overrides_parser import OverridesParser
        from omegaconf import OmegaConf

        from ptqbench.hydra_app import note_multirun

        def compose(words: list[str]) -> Any:
            config = self._loader.load_sweep_config(self._config, words)
            return {key: OmegaConf.to_container(config[key], resolve=True) if OmegaConf.is_config(config[key]) else config[key]
                    for key in config if key != "hydra"}  # fmt: skip

        note_multirun(OverridesParser.create(config_loader=self._loader).parse_overrides(arguments), compose)
