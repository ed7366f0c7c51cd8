# PYTHON_ARGCOMPLETE_OK
"""Start the program that ``tidar COMMAND`` names. ``python -m tidar_megatron`` and the files in ``tools/`` do the same.

Nothing heavy is imported here, and of the programs only the one that is started.
"""

import argparse
import difflib
import os
import sys
from importlib import import_module
from pathlib import Path

from tidar_megatron import __version__
from tidar_megatron.errors import UserError
from tidar_megatron.program import COMPLETION, OneLineParser, run_tool

COMMANDS = {  # each is the module of its name
    "prepare-data": "turn text into training shards",
    "generate-data": "continue prompts with a model, as shards to train its drafts on",
    "inspect-data": "check shards, show documents and a packed sequence",
    "pretrain": "train a TiDAR model, in one process or under torchrun",
    "convert": "import or export a Hugging Face folder, or verify it",
    "inspect-checkpoint": "show what a checkpoint holds, and verify its hashes",
    "generate": "continue a prompt",
    "evaluate": "score a model on tasks, by draft/verify and by plain AR",
    "certify": "prove that drafting changes only the speed",
    "check-layout": "compare every parallel layout with one rank",
    "plan": "find the fastest layouts that fit a number of GPUs",
    "compile": "compile a part of decoding for this machine's CPU, once",
    "benchmark": "measure training and decoding against plain AR",
    "gpu-check": "check and measure everything that needs a GPU, in ten minutes",
}
UNDER_TORCHRUN = ("pretrain", "check-layout")

EPILOG = """\
"tidar COMMAND --help" lists a command's flags. On several processes:
  torchrun --nproc-per-node 2 -m tidar_megatron pretrain --config FILE.yaml --save DIR
Completion in bash and zsh: pip install argcomplete; eval "$(register-python-argcomplete tidar)"
"""


def launch(command: str) -> None:
    """Run one program with the arguments in ``sys.argv[1:]``; its errors become one line and an exit status.

    Under torchrun only rank 0 reports an error that every rank has.
    """
    program = import_module(f"tidar_megatron.cli.{command.replace('-', '_')}")
    run_tool(program.main, _rank() if command in UNDER_TORCHRUN else 0)


def main() -> None:
    """Run the program that the first argument names, or answer ``--help`` and ``--version``."""
    prog = "python -m tidar_megatron" if Path(sys.argv[0]).name == "__main__.py" else "tidar"
    command = _command_to_complete() if COMPLETION in os.environ else "".join(sys.argv[1:2])
    if command in COMMANDS:
        sys.argv[:2] = [f"{prog} {command}"]  # argparse takes the usage's name from it
        launch(command)
    else:
        run_tool(lambda: _refuse(prog, command), _rank())


def _refuse(prog: str, command: str) -> None:
    """Answer a command line that names no program.

    Raises:
        UserError: the command is missing or unknown.
    """
    parser = OneLineParser(
        prog=prog,
        description="TiDAR: training on megatron-core, draft/verify decoding on transformers.",
        epilog=EPILOG,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=24),
    )
    parser.add_argument("--version", action="version", version=f"tidar-megatron {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for name, summary in COMMANDS.items():
        commands.add_parser(name, help=summary, add_help=False)
    if command and not command.startswith("-") and COMPLETION not in os.environ:
        hint = difflib.get_close_matches(command, COMMANDS, n=1)
        remedy = f" (did you mean {hint[0]}?)" if hint else f"; {prog} --help lists them all"
        raise UserError(f"unknown command {command}{remedy}")
    parser.parse_args()
    raise UserError(f"a command is missing; {prog} --help lists them all")


def _command_to_complete() -> str:
    """Return the command of the line that a shell asks argcomplete to complete; empty while it is being typed."""
    before_cursor = os.environ["COMP_LINE"][: int(os.environ["COMP_POINT"])]
    words = f"{before_cursor}|".split()[:-1]  # without the word under the cursor
    start = int(os.environ[COMPLETION])  # how many words name the program: 1 of tidar, 3 of python -m tidar_megatron
    if words[start : start + 1]:
        os.environ[COMPLETION] = str(start + 1)
    return "".join(words[start : start + 1])


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))
