"""Write the report of a run while it goes on, and the time that its session has spent."""

import time
from pathlib import Path

from cptjax.common import console, files, phases
from cptjax.evaluation import report, summary

LEAST_PAUSE = 50  # times the seconds that the last report took


class LiveReport:
    """Rewrites report.html and sessions.json of a run every few minutes."""

    def __init__(self, workdir: Path, minutes: float):
        self.workdir, self.seconds = workdir, 60 * minutes
        self.sessions = phases.SessionLog(workdir)
        self.due = time.monotonic() + self.seconds

    def write_if_due(self) -> None:
        """Write both if it is time; with 0 minutes never."""
        began = time.monotonic()
        if not self.seconds or began < self.due:
            return
        try:
            self.sessions.record()
            tables = summary.load_run_tables(self.workdir)
            report.write_run_report(tables, summary.summarise_run(tables), is_live=True)
        except OSError as error:  # training goes on without a page that shows its progress
            console.print_warning(f"the report is not written: {files.describe_error(error)}")
        ended = time.monotonic()
        self.due = ended + max(self.seconds, LEAST_PAUSE * (ended - began))
