"""A replica whose engine hangs on command."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medusa_deploy.runtime.executors.step_plan import StepPlan, StepResult
from medusa_deploy.runtime.serve.ray_app import Replica
from medusa_deploy.runtime.serve.service import Options


class HangingReplica(Replica):
    """Its steps don't end while a file ``hang`` lies beside the bundle."""

    def __init__(self, bundle: str, options: Options, load_options: Mapping[str, Any]) -> None:
        super().__init__(bundle, options, load_options)
        executor, hang = self.service.session.executor, Path(bundle).parent / "hang"
        run = executor.run

        def run_or_hang(plan: StepPlan) -> StepResult:
            while hang.exists():
                time.sleep(0.1)
            return run(plan)

        executor.run = run_or_hang  # type: ignore[method-assign]
