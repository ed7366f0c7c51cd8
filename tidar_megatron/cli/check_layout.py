"""Compare every parallel layout with one rank. Run this first on a new cluster.

torchrun --nproc-per-node 4 tools/check_layout.py
"""

from tidar_megatron.program import OneLineParser, importing


def main() -> None:
    """Run every layout, compare it with a single process, and report."""
    parser = OneLineParser(description="Compare every layout that fits the world size with one rank.")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--layout", action="append", metavar="NAME", help="only this layout; may be given again")
    parser.add_argument("--list", action="store_true", help="name the layouts that fit, and run none")
    parser.add_argument("--one-rank", metavar="FILE", help="internal: write the reference's results to FILE")
    parser.add_argument("--sequences-for", type=int, default=1, metavar="N", help="internal: the launch's processes")
    parser.add_argument("--variants", nargs="*", default=[], metavar="NAME", help="internal: the models to train")
    arguments = parser.parse_args()
    with importing():
        from tidar_megatron.training import layout_report  # heavy: after the command line is known to be sound

    if arguments.one_rank:
        layout_report.write_reference(arguments.one_rank, arguments.sequences_for, arguments.variants)
    else:
        layout_report.report(arguments.layout, list_only=arguments.list, as_json=arguments.json)
