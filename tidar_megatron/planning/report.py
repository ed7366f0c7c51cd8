"""The report of ``tidar plan``: the best layouts, verified by building their ranks, as JSON or as tables."""

import dataclasses
import json
from dataclasses import dataclass

import yaml
from rich.console import Console
from rich.table import Table

from tidar_megatron.config import Config
from tidar_megatron.errors import UserError
from tidar_megatron.huggingface.families import model_type
from tidar_megatron.planning.built_ranks import count_distinct_parameters
from tidar_megatron.planning.estimate import Estimate, recompute_name
from tidar_megatron.planning.flops import active_parameters, executed_flops, model_flops
from tidar_megatron.planning.hardware import ASSUMPTIONS, GIB, HARDWARE, Hardware
from tidar_megatron.planning.memory import memory_of
from tidar_megatron.planning.saves import checkpoint_bytes, gathered_otherwise
from tidar_megatron.planning.search import search, verify_all
from tidar_megatron.planning.sizes import Sizes, require_vocabulary


@dataclass(frozen=True)
class LayoutReport:
    """The result of a search for layouts."""

    gpus: int
    hardware: Hardware
    memory_gib: float
    total_parameters: int  # parameters of the Hugging Face model
    found: int  # the number of layouts that fit
    layouts: list[Estimate]  # the best of them, fastest first
    configured: Estimate | None  # the YAML's own layout
    refusal: str  # why ``configured`` is None

    def as_json(self) -> str:
        """Return the report as one JSON object, the output of ``--json``."""
        own = self.configured
        return json.dumps(
            {
                "total_parameters": self.total_parameters,
                "gpus": self.gpus,
                "hardware": dataclasses.asdict(self.hardware),
                "gpu_memory_gib": self.memory_gib,
                "layouts_that_fit": self.found,
                "layouts": [{**layout.as_dict(), "yaml": sections_of(layout.sizes)} for layout in self.layouts],
                "configured": None if own is None else {**own.as_dict(), "fits": own.fits(self.memory_gib)},
                "assumptions": {name: dataclasses.asdict(a) for name, a in ASSUMPTIONS.items()},
            }
        )


def report_layouts(config: Config, gpus: int, hardware: Hardware, memory_gib: float | None, top: int) -> LayoutReport:
    """Search for layouts, then build the ranks of those to be shown, so that their reported sizes are exact.

    Args:
        config: the run's configuration.
        gpus: the number of GPUs to use, all of them.
        hardware: the kind of GPU.
        memory_gib: the memory that a rank may use, in GiB; None: all of the GPU's.
        top: the number of layouts to show.

    Raises:
        UserError: no layout fits, or the configuration is incomplete.
    """
    require_vocabulary(config)
    model_type(config.model)  # training refuses a model that cannot be exported
    memory_gib = hardware.memory_gib if memory_gib is None else memory_gib
    own, refusal = None, ""
    try:
        own = Estimate(Sizes.of(config, gpus), hardware)
    except UserError as error:
        refusal = str(error)
    layouts = search(config, gpus, hardware, memory_gib)
    shown = layouts[:top]
    verify_all(shown + ([own] if own else []))
    total = count_distinct_parameters((own or shown[0]).sizes)
    return LayoutReport(gpus, hardware, memory_gib, total, len(layouts), shown, own, refusal)


def print_report(report: LayoutReport) -> None:
    """Print the report as text and tables."""
    console = Console(width=None if Console().is_terminal else 150)
    config = report.layouts[0].sizes.config
    doubled, clean = model_flops(report.layouts[0].sizes)
    console.print(
        f"{report.total_parameters:,} parameters, {active_parameters(report.layouts[0].sizes):,} in a token's matrix "
        f"products; S = {config.data.seq_length:,}, B = {config.tidar.block_size}, "
        f"masks for {config.chosen_blocks} of {config.blocks} blocks, "
        f"{config.training.global_batch_size} sequences a step: {doubled:.3e} useful FLOPs on clean tokens and masks, "
        f"{clean:.3e} on clean tokens alone (plain AR)",
        highlight=False,
    )
    console.print(layout_table(report))
    console.print("The YAML for the best layout; replace these sections as they are:", highlight=False)
    written = yaml.safe_dump(sections_of(report.layouts[0].sizes), default_flow_style=None, sort_keys=False, width=1000)
    console.print(written, highlight=False, soft_wrap=True)
    if report.configured is None:
        console.print(f"The config's own layout cannot use {report.gpus} GPUs: {report.refusal}", highlight=False)
    for title, estimate in (("Best", report.layouts[0]), ("The config's own", report.configured)):
        if estimate is not None:
            console.print(stage_table(title, estimate))
            console.print(traffic_table(estimate))
            console.print(time_line(estimate), highlight=False)
            console.print(save_line(estimate, report.total_parameters), highlight=False)
    console.print(hardware_table(report.hardware))
    console.print(assumption_table())
    console.print(
        "Activations assume chunked attention whose kernel stores no scores, and fused RMSNorm and SwiGLU. With the "
        "CPU's kernels,\nthe same arithmetic equals what saved-tensor hooks count (tests/planning). Nothing here was "
        "measured on a GPU: leave some GiB free.",
        highlight=False,
    )


def sections_of(sizes: Sizes) -> dict[str, dict[str, object]]:
    """Return the YAML sections that select this layout: the complete ``parallel`` section and the micro-batch size."""
    parallel = sizes.config.parallel
    unused = {
        "full": ("recompute_modules",),
        "selective": ("recompute_method", "recompute_num_layers"),
        None: ("recompute_modules", "recompute_method", "recompute_num_layers"),
    }[parallel.recompute_granularity]
    section: dict[str, object] = {}
    for field in dataclasses.fields(parallel):
        value = getattr(parallel, field.name)
        if value != field.default and field.name not in unused:
            section[field.name] = list(value) if isinstance(value, tuple) else value
    return {"training": {"micro_batch_size": sizes.b}, "parallel": section}


def table(title: str, *columns: str) -> Table:
    """Return a table whose first column is left-justified and whose other columns, of numbers, are right-justified."""
    made = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        made.add_column(column, justify="left" if number == 0 else "right")
    return made


def hardware_table(chosen: Hardware) -> Table:
    """Return the table of all hardware, with the chosen row marked."""
    made = table(
        "Hardware, per GPU", "", "bf16 dense TFLOP/s", "GiB", "HBM TB/s", "NVLink GB/s", "InfiniBand GB/s", "source"
    )
    for hardware in HARDWARE.values():
        made.add_row(
            ("> " if hardware is chosen else "  ") + hardware.name,
            f"{hardware.bf16_flops / 1e12:.1f}",
            f"{hardware.memory_gib:g}",
            f"{hardware.memory_bandwidth / 1e12:.2f}",
            f"{hardware.nvlink / 1e9:g}",
            f"{hardware.infiniband / 1e9:g}",
            hardware.source,
        )
    made.caption = "links per direction; nodes of 8 GPUs"
    return made


def assumption_table() -> Table:
    """Return the table of assumptions with their reasons."""
    made = Table(title="Assumptions: chosen, not measured by this project", title_justify="left")
    for column in ("", "value", "of what", "why"):
        made.add_column(column)
    for name, assumption in ASSUMPTIONS.items():
        made.add_row(name, f"{assumption.value:g} {assumption.unit}", assumption.meaning, assumption.reason)
    return made


def layout_table(report: LayoutReport) -> Table:
    """Return the table of the layouts that fit, best first, and the config's own layout."""
    title = f"{report.found} layouts of {report.gpus} {report.hardware.name} fit {report.memory_gib:g} GiB"
    made = table(
        f"{title}; the best {len(report.layouts)}",
        *("", "TP", "PP", "VPP", "CP", "DP", "EP", "b", "recompute", "parameters", "GiB"),
        *("s/step", "MFU all", "MFU S", "tokens/s/GPU"),
    )
    rows = [(str(number), layout) for number, layout in enumerate(report.layouts, 1)]
    if report.configured is not None:
        rows.append(
            ("config" if report.configured.fits(report.memory_gib) else "config: does NOT fit", report.configured)
        )
    for name, layout in rows:
        s, memory = layout.sizes, layout.memory
        made.add_row(
            name,
            *(str(n) for n in (s.tp, s.pp, s.vpp, s.cp, s.dp, s.ep, s.b)),
            recompute_name(s),
            f"{memory.parameters:,}",
            f"{memory.gib:.1f}",
            f"{layout.seconds.step:.2f}",
            f"{layout.mfu[0]:.1%}",
            f"{layout.mfu[1]:.1%}",
            f"{layout.tokens_per_second:,.0f}",
        )
    made.caption = "b: sequences of a micro-batch; parameters and GiB of the fullest rank; tokens are clean ones"
    return made


def stage_table(title: str, estimate: Estimate) -> Table:
    """Return the table of a rank's memory in GiB, stage by stage."""
    names = ("weights", "gradients", "optimizer", "activations", "loss", "working", "reserve")
    made = table(f"{title} layout: GiB of a rank", "pipeline stage", "parameters", *names, "sum")
    for stage in estimate.stages:
        memory = memory_of(estimate.sizes, stage)
        parts = (f"{getattr(memory, name) / GIB:.2f}" for name in names)
        made.add_row(str(stage), f"{memory.parameters:,}", *parts, f"{memory.gib:.2f}")
    return made


def traffic_table(estimate: Estimate) -> Table:
    """Return the table of bytes sent by a GPU of the last stage per step, by group."""
    made = table("sent by a GPU per step", "group", "ranks", "slowest link", "GB", "s, all links")
    for traffic in estimate.traffic(estimate.sizes.pp - 1):
        made.add_row(
            traffic.group, str(traffic.size), traffic.link, f"{traffic.bytes / 1e9:.2f}", f"{traffic.seconds:.3f}"
        )
    return made


def time_line(estimate: Estimate) -> str:
    """Return a line with the parts of a step's time and the FLOPs that it executes."""
    parts = ", ".join(f"{name} {value:.3f}" for name, value in vars(estimate.seconds).items())
    executed, sizes = executed_flops(estimate.sizes), estimate.sizes
    return (
        f"step {estimate.seconds.step:.2f} s = {parts}; {sizes.micro_batches} micro-batches a rank; "
        f"{executed:.3e} FLOPs executed, {executed / model_flops(sizes)[0]:.2f} x the useful ones"
    )


def save_line(estimate: Estimate, parameters: int) -> str:
    """Return a line with the size of a checkpoint and what the busiest rank writes of it."""
    sizes, written = estimate.sizes, estimate.written
    gathered = max(gathered_otherwise(sizes, stage) for stage in estimate.stages)
    instead = (
        f" (megatron-core's fully_reshardable would gather {gathered / 1e9:.1f} GB on one rank)" if gathered else ""
    )
    line = (
        f"a checkpoint has {checkpoint_bytes(sizes, parameters) / 1e9:.1f} GB; saving gathers nothing{instead}; "
        f"the busiest rank writes {written.total / 1e9:.1f} GB "
        f"(weights {written.weights / 1e9:.1f}, optimizer {written.optimizer / 1e9:.1f})"
    )
    if sizes.dp * sizes.cp > 1 and not sizes.config.parallel.use_distributed_optimizer:
        line += "; --use-distributed-optimizer shares the optimizer's part among the data-parallel ranks"
    return line + "\n"
