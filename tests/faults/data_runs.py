"""Runs of seconds for the faults of the data: started as users do, killed, started again; and what they trained on."""

import json
import signal
from pathlib import Path

from tests.launch.launching import CONFIG, TINY, started, wait_for
from tests.ranks import started as forked

SAVE_EVERY = 4
SMALL = "--num-layers 1 --hidden-size 32 --ffn-hidden-size 48 --kv-channels 16 --seq-length 32 --block-size 4".split()


def begin(run, data, log, processes=1, *flags):
    """Start training, in ``processes`` data-parallel ranks, going on with what ``run`` holds."""
    program = ["tools/pretrain.py", "--config", CONFIG, *TINY, *SMALL, "--train-data", data, "--save", run]
    program += ["--load", run, "--save-interval", SAVE_EVERY, "--log-sample-ids", *flags]
    if processes > 1:
        return started(["torchrun", "--standalone", "--nproc-per-node", processes, *program], log)
    return forked(program, log)


def finish(run, data, log, processes=1, *flags):
    """The same, to the end."""
    with begin(run, data, log, processes, *flags) as process:
        assert process.wait(170) == 0, Path(log).read_text()[-6000:]


def kill_after(run, data, log, iteration, *flags):
    """The same, killed once the log of sample ids holds ``iteration``."""
    with begin(run, data, log, 1, *flags) as process:
        wait_for(lambda: process.poll() is not None or iteration in ids_of(run), 170, f"step {iteration}", log, 0.02)
        process.send_signal(signal.SIGKILL)
        assert process.wait(60) == -signal.SIGKILL, Path(log).read_text()[-6000:]


def ids_of(run):
    """iteration -> the samples of all ranks, sorted; a line that is being written does not count."""
    ids = {}
    for path in sorted((Path(run) / "sample_ids").glob("dp-*.jsonl")):
        for line in path.read_text().split("\n")[:-1]:
            values = json.loads(line)
            ids.setdefault(values["iteration"], []).extend(map(tuple, values["ids"]))
    return {iteration: sorted(samples) for iteration, samples in ids.items()}
