"""Runs that kill themselves with SIGKILL while they save: ``killed_saves.py TRAIN VALID FOLDER sync|async WHAT``.

Every run is a process forked from this one, which has done the imports; so dozens of kills take seconds.
"""

import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import torch

from tests.training.small_runs import losses, small
from tidar_megatron.checkpoint import checkpoints, folder, integrity, writer
from tidar_megatron.checkpoint.integrity import check_hashes
from tidar_megatron.errors import UserError
from tidar_megatron.training.loop import pretrain

STEPS, OLD, NEW = 6, 2, 4


def fork(work, wait=True):
    """Do ``work`` in a process of its own; its exit status (negative: the signal), or its id."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) if wait else child


def dying(owner, name, matches, *, number=1, after=False, before_death=lambda *args: None):
    """Patch ``owner.name``: at its ``number``-th call that ``matches``, the run is killed."""
    real, run, seen = getattr(owner, name), os.getpid(), []

    def call(*args, **kwargs):
        if matches(*args, **kwargs):
            seen.append(1)
        if len(seen) != number or not matches(*args, **kwargs):
            return real(*args, **kwargs)
        if after:
            real(*args, **kwargs)
        before_death(*args)
        os.kill(run, signal.SIGKILL)  # of an asynchronous save the writer dies with it
        time.sleep(60)

    setattr(owner, name, call)


def of_new(*args, **kwargs):
    return any(isinstance(arg, str | Path) and f"iter_{NEW:07d}" in str(arg) for arg in args)


def half(path, text):
    path.write_text(text[: len(text) // 2])


def is_new_manifest(path, text):
    return of_new(path) and path.name == integrity.FILE_NAME


def is_tracker(source, target):
    return Path(target).name == folder.TRACKER and Path(source).read_text() == str(NEW)


def second(function):
    return lambda self, *args, **kwargs: self._pending is not None and self._pending.iteration == NEW


# phase -> (how it is patched, the iteration that the tracker names afterwards)
PHASES = {
    "before anything": (lambda: dying(folder, "new_partial", lambda f, i: i == NEW), OLD),
    "empty folder": (lambda: dying(folder, "new_partial", lambda f, i: i == NEW, after=True), OLD),
    "planning": (lambda: dying(checkpoints.dist_checkpointing, "save", of_new), OLD),
    "planned": (lambda: dying(checkpoints.dist_checkpointing, "save", of_new, after=True), OLD),
    "nothing written": (lambda: dying(checkpoints, "write", of_new), OLD),
    "half written": (lambda: dying(writer, "seal", of_new, number=3), OLD),
    "all written": (lambda: dying(checkpoints.Checkpoints, "_finish", second(None)), OLD),
    "gathered": (lambda: dying(checkpoints.Checkpoints, "_publish", second(None)), OLD),
    "no manifest": (lambda: dying(folder, "write_manifest", of_new), OLD),
    "half a manifest": (lambda: dying(integrity, "write_durably", is_new_manifest, before_death=half), OLD),
    "not renamed": (lambda: dying(folder, "move_into_place", of_new), OLD),
    "renamed": (lambda: dying(folder, "move_into_place", of_new, after=True), OLD),
    "half a tracker": (lambda: dying(os, "replace", is_tracker), OLD),
    "tracker": (lambda: dying(folder, "point_tracker", lambda f, i: i == NEW, after=True), NEW),
    "not pruned": (lambda: dying(folder, "prune", lambda f, i, k: i == NEW), NEW),
    "half pruned": (lambda: dying(folder.shutil, "rmtree", lambda path, **k: ".removed-" in str(path)), NEW),
    "published": (lambda: dying(checkpoints.Checkpoints, "_publish", second(None), after=True), NEW),
}


def configuration(shards, run, asynchronous, **training):
    checkpoint = {"save": str(run), "load": str(run), "save_interval": 2, "async_save": asynchronous, "keep_last": 1}
    training = {"train_iters": STEPS, "eval_interval": 1000, **training}
    checkpoint |= training.pop("checkpoint", {})
    return small(shards, checkpoint=checkpoint, training=training)


def check_after_kill(run, expected=None):
    """The tracker names a checkpoint that is whole to the last byte."""
    named = int((run / folder.TRACKER).read_text())
    assert expected is None or named == expected, (named, expected)
    assert folder.latest_iteration(run) == named
    check_hashes(folder.checkpoint_folder(run, named))
    return named


def check_finished(run, reference):
    """The run went on as if nothing had happened, and cleared up."""
    assert losses(run) == reference, "another run"
    assert folder.saved_iterations(run) == [max(reference)]
    assert not list(run.glob(".iter_*")), list(run.glob(".iter_*"))


def every_phase(shards, where, asynchronous, reference):
    for phase, (patch, expected) in PHASES.items():
        run = where / phase.replace(" ", "-")

        def killed(patch=patch, run=run):
            patch()
            pretrain(configuration(shards, run, asynchronous))

        assert fork(killed) == -signal.SIGKILL, phase
        check_after_kill(run, expected)
        if expected == OLD:
            assert folder.checkpoint_folder(run, OLD).is_dir()
        assert fork(lambda run=run: pretrain(configuration(shards, run, asynchronous))) == 0, phase
        check_finished(run, reference)
        print("held:", phase)


def random_moments(shards, where, asynchronous, reference, kills=12):
    run, draw = where / "random", random.Random(f"{where}")
    often = {"checkpoint": {"save_interval": 1}}
    begun = 0
    while begun < kills:
        child = fork(lambda run=run: pretrain(configuration(shards, run, asynchronous, **often)), wait=False)
        time.sleep(draw.uniform(0.1, 1.2))
        os.kill(child, signal.SIGKILL)
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0:
            check_finished(run, reference)  # it was faster: once more, from the beginning
            run = where / f"random-{begun}"
        begun += 1
        if (run / folder.TRACKER).exists():
            check_after_kill(run)
    assert fork(lambda: pretrain(configuration(shards, run, asynchronous, **often))) == 0
    check_finished(run, reference)
    print("held: random moments")


def midway(shards, where, asynchronous, reference):
    """The writer of ``NEW`` takes for ever: training goes on, nothing is published or pruned; then SIGKILL."""
    run, writer_id = where / "midway", where / "writer"

    def slow():
        real = checkpoints.write

        def write(request, partial, texts):
            report = real(request, partial, texts)
            if of_new(partial):
                writer_id.write_text(str(os.getpid()))
                time.sleep(100)
            return report

        checkpoints.write = write
        pretrain(configuration(shards, run, True))

    child = fork(slow, wait=False)
    try:
        wait_for(lambda: (run / "metrics.jsonl").exists() and max(losses(run), default=0) > NEW, "no step meanwhile")
        wait_for(writer_id.exists, "the writer never came to its end")
        assert folder.saved_iterations(run) == [OLD]
        check_after_kill(run, OLD)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    wait_for(lambda: not Path("/proc", writer_id.read_text()).exists(), "the writer outlived the run")
    check_after_kill(run, OLD)
    assert fork(lambda: pretrain(configuration(shards, run, True))) == 0
    check_finished(run, reference)
    print("held: midway")

    run = where / "writer-killed"
    said = where / "said"

    def dead():
        dying_write = checkpoints.write

        def write(request, partial, texts):
            if of_new(partial):
                os.kill(os.getpid(), signal.SIGKILL)
            return dying_write(request, partial, texts)

        checkpoints.write = write
        try:
            pretrain(configuration(shards, run, True))
        except UserError as error:
            said.write_text(str(error))

    assert fork(dead) == 0
    assert f"iteration {NEW} is not saved" in said.read_text()
    assert f"iteration {OLD} is intact" in said.read_text()
    check_after_kill(run, OLD)
    print("held: writer killed")


def wait_for(true, what, seconds=60):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, what
        time.sleep(0.02)


def main():
    torch.set_num_threads(1)
    shards, where = (Path(sys.argv[1]), Path(sys.argv[2])), Path(sys.argv[3])
    asynchronous, what = sys.argv[4] == "async", sys.argv[5]
    whole = where / "whole"
    assert fork(lambda: pretrain(configuration(shards, whole, False))) == 0
    test = {"phases": every_phase, "random": random_moments, "midway": midway}[what]
    test(shards, where, asynchronous, losses(whole))


if __name__ == "__main__":
    main()
