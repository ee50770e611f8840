"""Progress of a run on several processes: each file when it is done, and the times of all parts at the end."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest


def part_of(file: str) -> str:
    """Returns the folder to add a file's time to: two levels of `tests`, or one where a file is right in it."""
    return "/".join(file.split("/")[:-1][:3])


def memory() -> str:
    """Returns the memory that is free and how many processes the kernel has killed for want of it, as text."""
    found = {
        words[0].rstrip(":"): int(words[1])
        for path in ("/proc/meminfo", "/proc/vmstat")
        if Path(path).exists()
        for words in map(str.split, Path(path).read_text().splitlines())
    }
    return (
        f"{found.get('MemAvailable', 0) / 2**20:.1f} GiB free, {found.get('oom_kill', 0)} processes killed for memory"
    )


class Progress:
    """Prints a line per file instead of a dot per test.

    Times are those of the tests themselves, summed over the processes; importing and collecting come on top.
    """

    def __init__(self, reporter: pytest.TerminalReporter) -> None:
        self.reporter = reporter
        self.start = time.monotonic()
        self.tests: Counter[str] = Counter()  # by file
        self.pending: Counter[str] = Counter()  # by file
        self.seconds: Counter[str] = Counter()  # by file
        self.busy: Counter[str] = Counter()  # by process

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node: Any, ids: Sequence[str]) -> None:
        # Every process collects the same tests.
        self.tests = Counter(nodeid.partition("::")[0] for nodeid in ids)
        self.pending = Counter(self.tests) if not self.seconds else self.pending

    @pytest.hookimpl(tryfirst=True)
    def pytest_report_teststatus(self, report: Any) -> tuple[str, str, str] | None:
        """Counts a result, and prints no letter for it."""
        if report.skipped:
            return ("xfailed" if hasattr(report, "wasxfail") else "skipped"), "", ""
        if report.failed:
            return ("failed", "", "FAILED") if report.when == "call" else ("error", "", "ERROR")
        return ("passed" if report.when == "call" and not hasattr(report, "wasxfail") else ""), "", ""

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any, error: Any) -> None:
        """Says what there is to know of a process that ended in the middle of a test."""
        if error:
            self.reporter.write_line(f"{node.gateway.id} ended ({error}): {memory()}", red=True)

    def pytest_runtest_logreport(self, report: Any) -> None:
        file = report.nodeid.partition("::")[0]
        self.seconds[file] += report.duration
        self.busy[report.node.gateway.id if hasattr(report, "node") else "main"] += report.duration
        if report.failed:
            self.reporter.write_line(f"FAILED {report.nodeid}", red=True)
        if report.when != "teardown":
            return
        self.pending[file] -= 1
        if not self.pending[file]:
            done = 100 * (1 - self.pending.total() / self.tests.total())
            minutes, seconds = divmod(int(time.monotonic() - self.start), 60)
            what = f"{self.tests[file]} tests, {self.seconds[file]:.1f} s"
            self.reporter.write_line(f"{done:3.0f} %  {minutes:2}:{seconds:02}  {file} ({what})")

    def pytest_terminal_summary(self) -> None:
        parts: Counter[str] = Counter()
        tests: Counter[str] = Counter()
        for file in self.tests:
            parts[part_of(file)] += self.seconds[file]
            tests[part_of(file)] += self.tests[file]
        self.reporter.section("time by part")
        for part, seconds in parts.most_common():
            self.reporter.write_line(f"{seconds:8.1f} s  {part} ({tests[part]} tests)")
        busy = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in sorted(self.busy.items()))
        self.reporter.write_line(f"{self.busy.total():8.1f} s  in all ({busy})")
