"""Check everything that needs a GPU, in ten minutes, and measure what decides how useful it is.

tidar gpu-check [--seconds 540] [--output gpu_check.jsonl]
"""

import sys
from pathlib import Path

from tidar_megatron.errors import UserError
from tidar_megatron.gpu_check.sections import SECTIONS
from tidar_megatron.gpu_check.summary import summary
from tidar_megatron.gpu_check.supervisor import supervise
from tidar_megatron.program import OneLineParser


def main() -> None:
    """Run the sections and print a summary; exit with status 1 if one failed or there was no time for it."""
    parser = OneLineParser(
        description="Correctness and speed on a GPU, section by section; one JSON line for each. Needs torch, and no "
        "network; a section whose packages are missing says so.",
        epilog="sections: " + "; ".join(f"{number} {section.about}" for number, section in enumerate(SECTIONS)),
    )
    parser.add_argument("--seconds", type=float, default=540, metavar="S", help="no section begins after this [540]")
    parser.add_argument("--output", default="gpu_check.jsonl", metavar="FILE", help="the results [gpu_check.jsonl]")
    parser.add_argument("--sections", type=int, nargs="+", metavar="N", help="only these")
    parser.add_argument("--tiny", action="store_true", help="the smallest sizes, which only show that the programs run")
    parser.add_argument("--device", metavar="NAME", help="default: cuda")
    arguments = parser.parse_args()
    if not arguments.seconds > 0:
        raise UserError(f"--seconds {arguments.seconds:g}: must be above 0")
    sections = sorted(set(range(len(SECTIONS)) if arguments.sections is None else arguments.sections))
    if wrong := [number for number in sections if not 0 <= number < len(SECTIONS)]:
        raise UserError(f"--sections {wrong[0]}: use numbers from 0 to {len(SECTIONS) - 1}")
    output = Path(arguments.output)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.touch()
    except OSError as error:
        raise UserError(f"--output {output}: cannot be written ({error.strerror}); name another file") from error
    lines = supervise(sections, arguments.seconds, output, arguments.device, arguments.tiny)
    print(summary(lines), flush=True)
    print(f"written to {output}")
    sys.exit(0 if all(line["ok"] for line in lines) else 1)
