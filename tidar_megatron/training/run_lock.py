"""The lock on a run's folder: of two runs that ``--save`` into one folder, one goes on and the other is refused.

The folder may lie on a shared file system, where ``flock`` cannot be relied on. So the lock is a file that is created
exclusively, ``.lock-000001``. It says who holds it; a thread renews its modification time while the holder lives. A
killed holder leaves it behind. Whether it still lives is decided

- by its process id and start time, where it ran on this machine since its last boot;
- by the job, where this is a later attempt of the same SLURM job: SLURM starts none before the last has ended;
- else by watching the file: a holder that does not renew it for :data:`STALE` seconds is gone. Clocks of different
  machines are not compared.

Taking over is creating the next number, never removing the last: of many that find a dead holder, exactly one creates
it. The highest number always stays, also after a release, so that no number is ever used twice. A holder whose lock was
taken over (its machine was suspended) finds that out, and must stop (:attr:`RunLock.lost`). A lock that is not there is
believed to be removed after :data:`MISSING` seconds only: a file system that comes back may show an empty folder first.
"""

import contextlib
import dataclasses
import json
import os
import re
import socket
import sys
import threading
import time
from pathlib import Path

from pydantic import TypeAdapter

from tidar_megatron.errors import UserError
from tidar_megatron.files import replace_text

BEAT, STALE = 10.0, 90.0  # seconds between two signs of life; without one the holder is gone
MISSING = 60.0  # seconds that a lock must be missing, with no other in its place
NAME = re.compile(r"\.lock-(\d{6,})")


@dataclasses.dataclass(frozen=True)
class Holder:
    """Who holds a lock: one process."""

    host: str
    machine: str  # its boot, and its namespace of process ids; empty where unknown
    pid: int
    process_start: str  # clock ticks since the boot
    since: str
    job: str = ""  # of SLURM, with its cluster
    attempt: int = 0  # SLURM's count of restarts
    released: bool = False

    def __str__(self) -> str:
        job = f"SLURM job {self.job.split()[-1]}, " if self.job else ""
        return f"host {self.host}, {job}process {self.pid}, since {self.since}"


_HOLDER = TypeAdapter(Holder)


def _this_process() -> Holder:
    environment = os.environ
    job = environment.get("SLURM_JOB_ID", "")
    attempt = environment.get("SLURM_RESTART_COUNT", "0")
    return Holder(
        host=socket.gethostname(),
        machine=_machine(),
        pid=os.getpid(),
        process_start=_process_start(os.getpid()) or "",
        since=time.strftime("%Y-%m-%d %H:%M:%S %z"),
        job=f"{environment.get('SLURM_CLUSTER_NAME', '')} {job}" if job else "",
        attempt=int(attempt) if attempt.isdecimal() else 0,
    )


def _machine() -> str:
    """Where process ids mean the same as here; containers of one machine may have their own. Empty where unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _process_start(pid: int) -> str | None:
    """When a process of this machine was started; None if there is no such process, or only what is left of it."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


class RunLock:
    """A lock that this process holds, from :func:`take_lock` to :meth:`release`."""

    def __init__(self, path: Path, holder: Holder) -> None:
        self._path, self._holder = path, holder
        self._lost, self._missing_since = False, float("inf")
        self._over = threading.Event()
        self._beating = threading.Thread(target=self._beat, daemon=True, name="run lock")
        self._beating.start()

    @property
    def lost(self) -> bool:
        """Whether another run has taken the lock over, or someone has removed it, as far as this process knows.

        It looks every :data:`BEAT` seconds.
        """
        return self._lost

    def check(self) -> None:
        """Look now.

        Raises:
            UserError: another run has taken the lock over, or it has been missing for :data:`MISSING` seconds.
        """
        other = self._found()
        if other == self._holder:
            self._missing_since = float("inf")
        elif other is None:
            self._missing_since = min(self._missing_since, time.monotonic())
            self._lost = self._lost or time.monotonic() - self._missing_since > MISSING
        else:
            self._lost = True
        if self._lost:
            by = f"another run took it over while this one was not heard of ({other})" if other else "it was removed"
            raise UserError(f"the lock on {self._path.parent} is lost: {by}")

    def _found(self) -> Holder | str | None:
        """Who holds the folder by what is in it now: this process, another, or nobody."""
        try:
            newest = _newest(self._path.parent)
            holder = _parse(_path(self._path.parent, newest).read_bytes()) if newest else None
        except FileNotFoundError:
            return None
        if holder is None and newest:
            return self._holder if newest == _number(self._path) else "it has just started"
        return holder

    def release(self) -> None:
        """Give it back."""
        self._over.set()
        self._beating.join(1.0)  # a file system that hangs must not hold up the end
        with contextlib.suppress(OSError, UserError):
            self.check()
            replace_text(self._path, _as_text(dataclasses.replace(self._holder, released=True)))

    def _beat(self) -> None:
        while not self._over.wait(BEAT):
            try:
                self.check()
                os.utime(self._path)
            except (OSError, UserError):  # the first may pass; the second is noted
                continue


def take_lock(folder: str | Path) -> RunLock:
    """Hold ``folder``, which is made if need be; that may take :data:`STALE` seconds.

    A lock of this very process is taken over: a process trains one run at a time.

    Raises:
        UserError: a run that lives holds it, or the folder cannot be written.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        while True:
            newest = _newest(folder)
            if newest and (holder := _living_holder(folder, newest)) is not None:
                raise UserError(
                    f"--save {folder}: a run holds this folder: {holder}; wait for its end or stop it, or choose "
                    "another folder (a killed run's lock is taken over)"
                )
            if (lock := _create(folder, newest + 1)) is not None:
                return lock
            time.sleep(BEAT / 10)  # a shared file system may show the other's file a little later
    except OSError as error:
        raise UserError(f"--save {folder}: {error.strerror or error}; choose a folder that can be written") from None


def _create(folder: Path, number: int) -> RunLock | None:
    """The lock of this number, unless another process was quicker."""
    path, holder = _path(folder, number), _this_process()
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(_as_text(holder))
    except FileExistsError:
        return None
    if _newest(folder) != number:  # it was used before, while this process waited
        path.unlink(missing_ok=True)
        return None
    for older in folder.iterdir():
        if 0 < _number(older) < number or older.name.startswith("..lock-"):  # the latter of a holder killed in release
            with contextlib.suppress(OSError):
                older.unlink()
    return RunLock(path, holder)


def _living_holder(folder: Path, number: int) -> Holder | str | None:
    """Who holds this lock; None if nobody does any more. Watches it where it must."""
    path, seen, since, said = _path(folder, number), None, 0.0, False
    while True:
        began = time.monotonic()
        try:
            look = (path.stat().st_mtime_ns, path.read_bytes())
        except FileNotFoundError:
            return None
        holder = _parse(look[1])
        lives = _lives(holder) if holder else None
        if lives is not None:
            return holder if lives else None
        now = time.monotonic()
        if seen is None or now - began > BEAT:  # a file system that hung: the holder could not renew it either
            seen, since = look, now
        elif look != seen:
            return holder or "another process that has just started"
        elif now - since > STALE:
            return None
        if not said and holder:
            print(f"--save {folder}: held by {holder}; watching for {STALE:g} seconds", file=sys.stderr, flush=True)
            said = True
        time.sleep(BEAT / 10)


def _lives(holder: Holder) -> bool | None:
    """Whether a holder lives; None where only watching can tell."""
    this = _this_process()
    if holder.released:
        return False
    if this.machine and holder.machine == this.machine:
        return holder.pid != this.pid and _process_start(holder.pid) == holder.process_start
    if this.job and holder.job == this.job and holder.attempt < this.attempt:
        return False
    return None


# ---- files


def _path(folder: Path, number: int) -> Path:
    return folder / f".lock-{number:06d}"


def _number(path: Path) -> int:
    """0 for a file that is no lock."""
    match = NAME.fullmatch(path.name)
    return int(match[1]) if match else 0


def _newest(folder: Path) -> int:
    """The highest number there is; 0 for none."""
    return max(map(_number, folder.iterdir()), default=0)


def _as_text(holder: Holder) -> str:
    return json.dumps(dataclasses.asdict(holder)) + "\n"


def _parse(content: bytes) -> Holder | None:
    """None where there is only a part of it."""
    try:
        return _HOLDER.validate_json(content)
    except ValueError:
        return None
