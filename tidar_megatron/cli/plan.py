"""Find the layouts of a model that fit a number of GPUs, and predict their step time, without a GPU.

tidar plan --config examples/quickstart/config.yaml --vocab-size 257 --gpus 8 --hardware h100
"""

import math
import os

from tidar_megatron.config import FIELDS
from tidar_megatron.errors import UserError
from tidar_megatron.program import OneLineParser, importing


def main() -> None:
    """Search the layouts, and print them."""
    parser = OneLineParser(description="Layouts that fit, the fastest first; predictions rest on printed assumptions.")
    parser.add_argument("--config", required=True, metavar="FILE.yaml", help="the run's configuration")
    parser.add_argument("--gpus", type=int, required=True, metavar="N", help="GPUs of the job")
    parser.add_argument("--hardware", default="h100", choices=["h100", "h200", "b200"], help="kind of GPU [h100]")
    parser.add_argument("--gpu-memory-gib", type=float, metavar="M", help="memory of a GPU; default: the hardware's")
    parser.add_argument("--vocab-size", type=int, metavar="N", help="ids in use, where the config leaves it open")
    parser.add_argument("--top", type=int, default=10, metavar="N", help="layouts to show [10]")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    arguments, others = parser.parse_known_args()
    if others and (name := others[0].split("=")[0].removeprefix("--").replace("-", "_")) in FIELDS:
        section = FIELDS[name]
        raise UserError(f"{others[0]}: a plan reads its run from the YAML alone; put {name} into its section {section}")
    if others:
        parser.error(f"unrecognized arguments: {others[0]}")
    for name, value in (
        ("--gpus", arguments.gpus),
        ("--gpu-memory-gib", arguments.gpu_memory_gib),
        ("--top", arguments.top),
    ):
        if value is not None and not (0 < value < math.inf):
            raise UserError(f"{name} {value}: must be a number above 0")
    from tidar_megatron.config import load_config

    sizes = {} if arguments.vocab_size is None else {"model": {"vocab_size": arguments.vocab_size}}
    config = load_config(arguments.config, sizes)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a plan computes nothing, and must not disturb a GPU that trains
    with importing():
        from tidar_megatron.planning.hardware import HARDWARE  # heavy: after the command line is known to be sound
        from tidar_megatron.planning.report import print_report, report_layouts

    hardware = HARDWARE[arguments.hardware]
    report = report_layouts(config, arguments.gpus, hardware, arguments.gpu_memory_gib, arguments.top)
    if arguments.json:
        print(report.as_json())
    else:
        print_report(report)
