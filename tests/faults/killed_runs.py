"""One run of two ranks, killed again and again: ``killed_runs.py TRAIN FOLDER KILLS [SEED]``.

Each life is tools/pretrain.py on two ranks (tests/ranks.py: only the imports are another's), and ends by SIGKILL to
rank 0, rank 1 or both, at a random moment: while the ranks meet, load, train, save (synchronously or not, by turns) or
publish. A rank that is left over is ended as torchrun ends it. After every kill all that was ever published is read
and hashed. The last life ends by itself; an undisturbed run of its length says what it should have been.
"""

import random
import signal
import sys
import time
from pathlib import Path

import torch

from tests.faults.data_runs import SMALL, ids_of
from tests.launch.launching import CONFIG, TINY, losses
from tests.ranks import start_ranks
from tidar_megatron.checkpoint.folder import TRACKER, checkpoint_folder, latest_iteration, saved_iterations
from tidar_megatron.checkpoint.integrity import check_hashes

LIFE = 6.0  # seconds at most; the first step comes after one or two, and takes a twentieth
FAR = 1_000_000


def flags(data, run, until, asynchronous=False):
    given = ["--config", CONFIG, *TINY, *SMALL, "--train-data", data, "--train-iters", until, "--save", run]
    given += ["--load", run, "--save-interval", 3, "--keep-last", 3, "--log-sample-ids"]
    return [*given, "--async-save"] if asynchronous else given


def ranks_of(flags, logs):
    """Start two ranks; rank r writes to ``logs``/rank-r.log."""
    files = [logs / f"rank-{rank}.log" for rank in (0, 1)]
    for file in files:
        file.write_text("")
    return start_ranks(2, ["tools/pretrain.py", *flags], files)


def life(draw, data, run, asynchronous):
    """Start two ranks, kill at random; whom, and after how long."""
    processes = ranks_of(flags(data, run, FAR, asynchronous), run.parent)
    seconds, whom = draw.uniform(0, LIFE), draw.choice([[0], [1], [0, 1]])
    time.sleep(seconds)
    for rank in whom:
        processes[rank].kill()
    for number in (signal.SIGTERM, signal.SIGKILL):
        time.sleep(0.2 if len(whom) == 1 else 0)
        for rank in {0, 1} - set(whom):
            processes[rank].send_signal(number)
    statuses = [process.wait() for process in processes]
    assert all(statuses[rank] == -signal.SIGKILL for rank in whom), (statuses, (run.parent / "rank-0.log").read_text())
    return whom, seconds


def check_published(run, before):
    """Every checkpoint is whole to the last byte; the newest, never older than ``before``."""
    if not (run / TRACKER).exists():
        assert not saved_iterations(run) or before == 0
        for iteration in saved_iterations(run):
            check_hashes(checkpoint_folder(run, iteration))
        return 0
    for iteration in saved_iterations(run):
        check_hashes(checkpoint_folder(run, iteration))
    newest = latest_iteration(run)
    assert newest >= before, f"iteration {before} was published, now it is {newest}"
    return newest


def to_the_end(data, run, until):
    statuses = [process.wait() for process in ranks_of(flags(data, run, until), run.parent)]
    assert statuses == [0, 0], (run.parent / "rank-0.log").read_text()[-5000:]


def check_ids(run, until, sequences):
    """Steps 1 to ``until`` once each; within an epoch no sequence twice, and none left out of one that is over."""
    ids = ids_of(run)
    assert sorted(ids) == list(range(1, until + 1))
    epochs = {}
    for samples in ids.values():
        for _, epoch, number in samples:
            epochs.setdefault(epoch, []).append(number)
    for epoch, numbers in epochs.items():
        assert len(set(numbers)) == len(numbers), f"epoch {epoch}: repeated"
        assert epoch == max(epochs) or sorted(numbers) == list(range(sequences)), f"epoch {epoch}: lost"
    return len(epochs)


def main():
    torch.set_num_threads(1)
    data, folder, kills = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    draw = random.Random(int(sys.argv[4]) if len(sys.argv) > 4 else 0)
    run, newest, useful = folder / "run", 0, 0
    for number in range(1, kills + 1):
        whom, seconds = life(draw, data, run, asynchronous=bool(number % 2))
        before, newest = newest, check_published(run, newest)
        useful += newest > before
        ranks = " and ".join(map(str, whom))
        print(f"kill {number}: rank {ranks} after {seconds:.2f} s; iteration {newest} is whole", flush=True)
    until = newest + 4
    to_the_end(data, run, until)
    to_the_end(data, folder / "whole", until)
    assert losses(run) == losses(folder / "whole"), "another run"
    assert ids_of(run) == ids_of(folder / "whole"), "other samples"
    numbers = {number for samples in ids_of(run).values() for *_, number in samples}
    epochs = check_ids(run, until, max(numbers) + 1)
    print(f"held: {kills} kills, {useful} lives that got on, {until} steps, {epochs} epochs; all ids and losses equal")


if __name__ == "__main__":
    main()
