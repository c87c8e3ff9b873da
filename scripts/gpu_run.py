"""Runs the parts of the check on a GPU: each with a log and a time limit, and none that stops the others."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

OK, FAILED, TIMEOUT, LEFT_OUT, PRINTED = "ok", "FAILED", "TIMEOUT", "left out", "printed"
# What a command may still say after it was asked to end.
GRACE_SECONDS = 8.0


@dataclass
class Command:
    """One process; ``dry`` says that it needs no GPU and runs in a dry run, too."""

    arguments: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    dry: bool = False

    def text(self) -> str:
        return shlex.join([*(f"{name}={value}" for name, value in self.environment.items()), *self.arguments])


@dataclass
class Part:
    """Commands that run one after another until one fails.

    Args:
        name (str), stage (str): parts of one stage run side by side; stages follow each other.
        limit (float): seconds for all of the commands.
        log (str): the name of the file for what they print; parts may share one.
        excuses (dict): pattern -> reason; a part that fails with such a line in its log was not possible here.
        expected (str): a pattern that the log of a part that went well has.
        optional (bool): the check passes without it.
        reason (str): why the part is left out, or what went wrong; empty where it runs and does well.
    """

    name: str
    stage: str
    limit: float
    log: str
    commands: list[Command] = field(default_factory=list)
    excuses: dict[str, str] = field(default_factory=dict)
    expected: str = ""
    optional: bool = False
    reason: str = ""
    status: str = ""
    seconds: float = 0.0

    @property
    def bad(self) -> bool:
        return self.status in (FAILED, TIMEOUT) and not self.optional


class Running:
    """A part under way; :meth:`poll` moves it on and never waits."""

    def __init__(self, part: Part, folder: Path, limit: float) -> None:
        self.part, self.left, self.start = part, list(part.commands), time.monotonic()
        # A file of its own until it is done: parts that run side by side may share a log.
        self.limit, self.path, self.shared = limit, folder / f"{part.name}.running", folder / part.log
        self.log = self.path.open("wb")
        self.process: subprocess.Popen | None = None
        self.asked = 0.0
        self._next()

    def _next(self) -> None:
        command = self.left.pop(0)
        self.log.write(f"\n$ {command.text()}\n".encode())
        self.log.flush()
        try:
            # A session of its own, so that what a command has started ends with it.
            self.process = subprocess.Popen(
                command.arguments, env={**os.environ, **command.environment}, stdin=subprocess.DEVNULL,
                stdout=self.log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            self._finish(FAILED, str(error))

    def poll(self) -> bool:
        """Whether the part is still running."""
        if self.part.status:
            return False
        assert self.process is not None
        now, code = time.monotonic(), self.process.poll()
        if code is not None:
            _kill(self.process)  # whatever it left behind
            if self.asked:
                self._finish(TIMEOUT, f"ended after {self.limit:.0f} s")
            elif code:
                self._finish(FAILED, f"exit status {code}")
            elif self.left:
                self._next()
            else:
                self._finish(OK)
        elif self.asked and now - self.asked > GRACE_SECONDS:
            _kill(self.process)
        elif not self.asked and now - self.start > self.limit:
            # As Ctrl-C does it: pytest and the benchmark then still say what they have.
            self.asked = now
            self.process.send_signal(signal.SIGINT)
        return not self.part.status

    def _finish(self, status: str, reason: str = "") -> None:
        part = self.part
        self.log.close()
        text = self.path.read_text(errors="replace")
        if status == FAILED:
            for pattern, excuse in part.excuses.items():
                if re.search(pattern, text):
                    status, reason = LEFT_OUT, excuse
        elif status == OK and not re.search(part.expected, text):
            status, reason = FAILED, f"nothing like {part.expected!r} in its log"
        part.status, part.reason, part.seconds = status, reason, time.monotonic() - self.start
        with self.shared.open("a") as log:
            log.write(f"{text}# {part.name}: {status} {reason}\n")
        self.path.unlink()


def _kill(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def run(parts: list[Part], folder: Path, deadline: float, after=lambda: None) -> None:
    """Runs parts stage by stage, each within its limit and all before ``deadline`` (of time.monotonic()).

    ``after`` is called whenever a part is done.
    """
    for stage in dict.fromkeys(part.stage for part in parts):
        under_way = []
        for part in (p for p in parts if p.stage == stage):
            limit = min(part.limit, deadline - time.monotonic() - GRACE_SECONDS)
            if part.reason or not part.commands:
                part.status = LEFT_OUT
            elif limit <= 0:
                part.status, part.reason = LEFT_OUT, "no time was left"
            else:
                under_way.append(Running(part, folder, limit))
        while under_way:
            still = [running for running in under_way if running.poll()]
            if len(still) < len(under_way):
                after()
            under_way = still
            time.sleep(0.05 if under_way else 0)


def dry_run(parts: list[Part], folder: Path, deadline: float) -> None:
    """Prints every command, and runs those that need no GPU."""
    for part in parts:
        for command in part.commands:
            print(f"{part.name}: {command.text()}", flush=True)
        wanted, part.commands = part.commands, [command for command in part.commands if command.dry]
        if part.commands:
            run([part], folder, deadline)
        else:
            part.status = PRINTED if wanted else LEFT_OUT


def table(parts: list[Part]) -> str:
    """What became of each part, and where it is written down."""
    rows = [("part", "status", "seconds", "log", "")]
    rows += [(p.name, p.status, f"{p.seconds:.1f}", p.log if p.seconds else "-", p.reason) for p in parts]
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = [
        f"{name:<{widths[0]}}  {status:<{widths[1]}}  {seconds:>{widths[2]}}  {log:<{widths[3]}}  {reason}".rstrip()
        for name, status, seconds, log, reason in rows
    ]
    return "\n".join(lines)
