"""Run every program of ``tidar``: check arguments, guard the standard streams, and print an error as one line.

A :class:`~tidar_megatron.errors.UserError` exits with status 2. A training run that a signal stopped exits with 75
(EX_TEMPFAIL: start it again and it resumes), one that makes no progress with 76.
"""

import argparse
import difflib
import errno
import gc
import logging
import os
import re
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

from tidar_megatron.errors import Diverged, Interrupted, LocalError, Stalled, UserError
from tidar_megatron.streams import standard_streams

COMPLETION = "_ARGCOMPLETE"  # in the environment while a shell asks for what may be typed next
INTERRUPTED_STATUS, DIVERGED_STATUS = 75, 76
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # errors that any write can raise


def run_tool(main: Callable[[], None], rank: int = 0) -> None:
    """Run a program's ``main``; a :class:`UserError` becomes one line on standard error and exit status 2.

    Under torchrun most errors are raised by every rank, so only ``rank`` 0 prints them; a rank that fails alone prints
    its own. Any other exception is a bug and keeps its traceback. ``streams.py`` handles output that nobody reads.
    """
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # the bars of transformers garble the program's output
    # at import megatron-core warns, in each process and module, about optional packages that are not installed
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.core")
    warnings.filterwarnings("ignore", category=FutureWarning, message=".*(ShardedTensor|load_state_dict)")
    warnings.filterwarnings("ignore", category=FutureWarning, message=".*(all_gather_into|reduce_scatter)_tensor")
    warnings.filterwarnings("ignore", category=UserWarning, message="The .grad attribute of a Tensor that is not a lea")
    hints = ("rerun_state_machine", "models.gpt.gpt_model", "distributed.distributed_data_parallel")
    for name in (*hints, "dist_checkpointing.strategies.torch"):
        logging.getLogger(f"megatron.core.{name}").setLevel(logging.ERROR)  # hints to megatron-core's own developers
    try:
        with standard_streams():
            _check_arguments()
            main()
    except (UserError, Diverged) as error:
        alone = isinstance(error, LocalError)
        if rank != 0 and not alone:  # the launcher ends all ranks once one exits: let the rank that prints exit first
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(10)
            alone = os.environ.get("LOCAL_RANK") == "0"  # the launcher did not end this node: it may have failed alone
        if rank == 0 or alone:
            print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2 if isinstance(error, UserError) else DIVERGED_STATUS)
    except OSError as error:
        if error.errno not in DISK:
            raise
        where = f": {error.filename}" if error.filename else ""
        print(f"error: {os.strerror(error.errno)}{where}; free space, or choose another folder", file=sys.stderr)
        sys.exit(2)
    except Stalled as error:  # on any rank; threads and connections that hang must not delay the exit
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(1)
    except Interrupted:
        sys.exit(INTERRUPTED_STATUS)
    except KeyboardInterrupt:
        if rank == 0:
            print("interrupted", file=sys.stderr, flush=True)
        sys.exit(130)


def keep_threads_awake() -> None:
    """Let OpenMP's threads wait some milliseconds for the next matrix product of a decode step before they sleep.

    Call it before torch is imported, in programs that decode. Elsewhere the waiting threads would be in the way.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "3000000")


@contextmanager
def importing() -> Iterator[None]:
    """Import in this block without garbage collection, which would take a fifth of the time.

    Later collections skip what was imported (``gc.freeze``).
    """
    before, enabled = len(sys.modules), gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) - before > 100:
            gc.freeze()
        if enabled:
            gc.enable()


def _check_arguments() -> None:
    for argument in sys.argv[1:]:
        if not argument.isascii() and any("\ud800" <= character <= "\udfff" for character in argument):
            raise UserError(f"argument {argument!r}: is not UTF-8; give it in UTF-8, or rename the file")


class OneLineParser(argparse.ArgumentParser):
    """An ArgumentParser that raises :class:`UserError` and suggests the flag that was probably meant.

    It completes flags and their values in a shell where argcomplete is installed and registered.
    """

    def parse_known_args(self, args=None, namespace=None) -> tuple[Any, list[str]]:  # type: ignore[no-untyped-def]
        """Parse as the parent does; for a shell that asks for completions, print them and end the process instead."""
        if args is None and COMPLETION in os.environ:  # argcomplete, and a command of this parser, give arguments
            try:
                import argcomplete
            except ImportError:
                sys.exit(1)
            argcomplete.autocomplete(self)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        if "unrecognized arguments:" in message:
            unknown = message.split("unrecognized arguments:")[1].split()[0].split("=")[0]
            hint = probably_meant(unknown, {name: one.help for name, one in self._option_string_actions.items()})
            message = f"unknown flag {unknown}" + (f" (did you mean {hint}?)" if hint else "; --help lists them all")
        raise UserError(message)


def probably_meant(unknown: str, known: Mapping[str, str | None]) -> str | None:
    """Return the name that is spelled like an unknown one, or else the first whose help has its words.

    Args:
        unknown: the unknown name, such as ``--learning-rate``.
        known: name -> help.
    """
    if similar := difflib.get_close_matches(unknown, known, n=1):
        return similar[0]
    words = re.sub("[-_]", " ", unknown).strip()
    if " " not in words:  # a single word is found in the help of too many
        return None
    return next((name for name, text in known.items() if words in (text or "")), None)
