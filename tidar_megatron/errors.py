"""Errors a user can cause and mend. Every program in ``tools/`` prints them as one line and exits with 2."""

import logging
import os
import sys
import warnings
from collections.abc import Callable


class UserError(ValueError):
    """Bad input. The message is one line, names what is wrong, and says how to mend it."""


def run_tool(main: Callable[[], None], rank: int = 0) -> None:
    """Run a program's ``main``; a :class:`UserError` becomes one line on standard error and exit status 2.

    Under torchrun every rank fails alike, so only ``rank`` 0 speaks. Any other exception is a defect of ours and
    keeps its traceback.
    """
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers': they garble what a program prints
    # megatron-core says at import, once per module and process, which optional packages it does without
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.core")
    warnings.filterwarnings("ignore", category=FutureWarning, message=".*(ShardedTensor|load_state_dict)")
    logging.getLogger("megatron.core.rerun_state_machine").setLevel(logging.ERROR)
    try:
        main()
    except UserError as error:
        if rank == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
