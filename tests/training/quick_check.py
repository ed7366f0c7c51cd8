"""tools/check_layout.py made quicker: fewer steps and sequences, and a reference that imports nothing anew."""

import dataclasses
import multiprocessing
import os
import types

from tidar_megatron.training import layout_check, layout_report, layout_variants

STEPS = (False, True)  # an AR step, whose update the joint step shows; the evaluation shows that one's
SEQUENCES = 4  # at least one micro-batch a rank, and as many as an interleaved pipeline needs
full_config, write_reference = layout_variants.variant_config, layout_report.write_reference


def quickly(rank):
    """In a rank, before it begins."""
    layout_check.STEPS = STEPS
    layout_variants.variant_config = layout_report.variant_config = smaller_config
    layout_report.start_reference = fork_reference


def smaller_config(*arguments, **named):
    config = full_config(*arguments, **named)
    return dataclasses.replace(config, training=dataclasses.replace(config.training, global_batch_size=SEQUENCES))


def fork_reference(path, world_size, variants):
    """A process of one rank, which knows nothing of the launcher's job; with ``Popen``'s ``wait``."""
    process = multiprocessing.get_context("fork").Process(target=be_reference, args=(path, world_size, variants))
    process.start()
    return types.SimpleNamespace(wait=lambda: process.join() or process.exitcode)


def be_reference(path, world_size, variants):
    for name in layout_report.LAUNCHER:
        os.environ.pop(name, None)
    write_reference(str(path), world_size, variants)
