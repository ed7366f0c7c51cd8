"""The lock on a run's folder: of two runs that ``--save`` into the same folder, one proceeds and the other is refused.

The folder may be on a shared file system, where ``flock`` is unreliable. So the lock is a file that is created
exclusively, ``.lock-000001``. It names its holder, and a thread of the holder renews its modification time. A killed
holder leaves a stale lock behind. To decide whether a holder is alive, another process checks

- its process id and start time, if it ran on this machine since the last boot;
- the job, if this is a later attempt of the same SLURM job: SLURM starts an attempt only after the previous one ended;
- otherwise the file itself: a holder that does not renew it for :data:`STALE` seconds is dead. Clocks of different
  machines are not compared.

To take over a stale lock, a process creates the next number and never removes the last one first: of many processes
that find a dead holder, exactly one creates it. The highest number stays even after a release, so that no number is
used twice. A holder whose lock was taken over (its machine was suspended) notices that and must stop
(:attr:`RunLock.lost`). A lock that cannot be found counts as removed only after :data:`MISSING` seconds, because a file
system that has just recovered may show an empty folder first.
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

BEAT, STALE = 10.0, 90.0  # seconds between two renewals; seconds without one after which a lock is stale
MISSING = 60.0  # seconds without any lock file after which the lock counts as removed
NAME = re.compile(r"\.lock-(\d{6,})")


@dataclasses.dataclass(frozen=True)
class Holder:
    """The process that holds a lock."""

    host: str
    machine: str  # the boot id and the pid namespace; empty if unknown
    pid: int
    process_start: str  # clock ticks since the boot
    since: str
    job: str = ""  # the SLURM cluster and job id; empty outside SLURM
    attempt: int = 0  # SLURM's restart count
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
    """Return an id of the boot and pid namespace, since containers may have their own; empty if unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _process_start(pid: int) -> str | None:
    """Return the start time of a process on this machine in clock ticks since boot; None if it is dead or a zombie."""
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
        """Return whether the lock was taken over or removed, as of the last check, made every :data:`BEAT` seconds."""
        return self._lost

    def check(self) -> None:
        """Check now that this process still holds the lock.

        Raises:
            UserError: Another run has taken over the lock, or it has been missing for :data:`MISSING` seconds.
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
            by = f"another run took it over while this one did not renew it ({other})" if other else "it was removed"
            raise UserError(f"the lock on {self._path.parent} is lost: {by}")

    def _found(self) -> Holder | str | None:
        """Return the present holder of the folder: this process, another one, or None."""
        try:
            newest = _newest(self._path.parent)
            holder = _parse(_path(self._path.parent, newest).read_bytes()) if newest else None
        except FileNotFoundError:
            return None
        if holder is None and newest:
            return self._holder if newest == _number(self._path) else "it has just started"
        return holder

    def release(self) -> None:
        """Release the lock, unless it is lost."""
        self._over.set()
        self._beating.join(1.0)  # a file system that hangs must not delay the exit
        with contextlib.suppress(OSError, UserError):
            self.check()
            replace_text(self._path, _as_text(dataclasses.replace(self._holder, released=True)))

    def _beat(self) -> None:
        while not self._over.wait(BEAT):
            try:
                self.check()
                os.utime(self._path)
            except (OSError, UserError):  # an OSError may be transient; check() records that the lock is lost
                continue


def take_lock(folder: str | Path) -> RunLock:
    """Take the lock on ``folder``, which is created if it is missing; this may take :data:`STALE` seconds.

    A lock of this same process is taken over, because a process trains one run at a time.

    Raises:
        UserError: A live run holds the folder, or it cannot be written.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        while True:
            newest = _newest(folder)
            if newest and (holder := _living_holder(folder, newest)) is not None:
                raise UserError(
                    f"--save {folder}: another run is using this folder: {holder}; wait for it to end, stop it, or "
                    "choose another folder (the lock of a killed run is taken over)"
                )
            if (lock := _create(folder, newest + 1)) is not None:
                return lock
            time.sleep(BEAT / 10)  # a shared file system may show the other's file a little later
    except OSError as error:
        raise UserError(f"--save {folder}: {error.strerror or error}; choose a folder that can be written") from None


def _create(folder: Path, number: int) -> RunLock | None:
    """Create and return the lock with this number; None if another process has created it first."""
    path, holder = _path(folder, number), _this_process()
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(_as_text(holder))
    except FileExistsError:
        return None
    if _newest(folder) != number:  # other processes have used this number while this one waited
        path.unlink(missing_ok=True)
        return None
    for older in folder.iterdir():
        if 0 < _number(older) < number or older.name.startswith("..lock-"):  # the latter: killed in release()
            with contextlib.suppress(OSError):
                older.unlink()
    return RunLock(path, holder)


def _living_holder(folder: Path, number: int) -> Holder | str | None:
    """Return the live holder of this lock, or None; watch the file for up to :data:`STALE` seconds if necessary."""
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
        if seen is None or now - began > BEAT:  # the file system hung, so the holder could not renew either
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
    """Return whether a holder is alive; None if only watching the file can tell."""
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
    """Return the number of a lock file; 0 for any other file."""
    match = NAME.fullmatch(path.name)
    return int(match[1]) if match else 0


def _newest(folder: Path) -> int:
    """Return the highest number of a lock file; 0 if there is none."""
    return max(map(_number, folder.iterdir()), default=0)


def _as_text(holder: Holder) -> str:
    return json.dumps(dataclasses.asdict(holder)) + "\n"


def _parse(content: bytes) -> Holder | None:
    """Return the holder in a lock file; None if the file is only partly written."""
    try:
        return _HOLDER.validate_json(content)
    except ValueError:
        return None
