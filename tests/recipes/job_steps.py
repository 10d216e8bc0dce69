"""Jobs of which one writes what the next ones need, without torch, so that their processes start at once."""

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openblip.recipes.ablation import AblationJob, in_order
from openblip.recipes.presets import Preset


@dataclass(frozen=True, kw_only=True)
class Step(AblationJob):
    """Writes a file, with what it found of those it needs; a first try may fail at some cost, or wait to be killed."""

    needs: tuple[str, ...] = ()
    first_try: str = "works"

    @property
    def settings(self) -> Any:
        return list(self.needs)

    @property
    def is_done(self) -> bool:
        return (self.folder / "result").exists()

    def estimate(self, preset: Preset) -> float:
        return 0.0

    def work(self) -> bool:
        tried = self.folder / "tried"
        first, started = not tried.exists(), time.process_time()
        tried.write_text(str(os.getpid()))
        if first and self.first_try == "fails":
            while time.process_time() - started < 0.3:
                pass
            raise ValueError("not this time")
        if first and self.first_try == "waits":
            time.sleep(600)
        if first and self.first_try == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        (self.folder / "result").write_text(str(len(self.needs)))
        return True


def steps(root: Path, **first_tries: str) -> list[tuple[AblationJob, list[AblationJob]]]:
    """b and c need a, d needs both."""
    a, b, c, d = (root / name for name in "abcd")
    needs = {a: (), b: (str(a),), c: (str(a),), d: (str(b), str(c / "model"))}
    jobs = {
        folder.name: Step(folder=folder, needs=of, first_try=first_tries.get(folder.name, "works"))
        for folder, of in needs.items()
    }
    return in_order(jobs)
