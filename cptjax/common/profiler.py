"""Profile some steps of a stage with jax.profiler, as `--profile=STAGE:STEP:COUNT` names them."""

import re
from pathlib import Path

import jax

from cptjax.common import console


class StepProfiler:
    """Writes the trace of some steps of one stage into profile/ of a run, for xprof."""

    def __init__(self, steps: str, folder: Path, stages: int):
        match = re.fullmatch(r"(\d+):(\d+):(\d+)", steps)
        numbers = [int(x) for x in match.groups()] if match else [0]
        if 0 in numbers:
            raise ValueError(
                f"--profile={steps}: expected STAGE:STEP:COUNT, all counted from 1, such as 1:10:3"
            )
        self.stage, self.first, self.count = numbers
        if self.stage > stages:
            raise ValueError(f"--profile={steps}: expected a stage from 1 to {stages}")
        self.steps, self.folder = steps, folder / "profile"
        self.tracing = self.traced = False

    def advance(self, stage: int, done: int) -> None:
        """Start or stop the trace; call it before the first step, and after each step."""
        wanted = stage == self.stage and 0 <= done - self.first + 1 < self.count
        if wanted and not self.tracing:
            self.folder.mkdir(parents=True, exist_ok=True)
            jax.profiler.start_trace(str(self.folder))
            self.tracing = self.traced = True
        elif self.tracing and not wanted:
            self.stop()

    def close(self) -> None:
        """End with the run, and say so if the run did not reach the steps."""
        self.stop()
        if not self.traced:
            console.print_warning(f"--profile={self.steps}: no such step was run; nothing profiled")

    def stop(self) -> None:
        """Write the trace, if one is being recorded."""
        if self.tracing:
            self.tracing = False
            jax.profiler.stop_trace()
            console.print_message(f"profile: {self.folder}; view it with xprof {self.folder}")
