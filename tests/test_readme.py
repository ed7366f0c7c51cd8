"""What the README says is true: its commands are run by CI, its tree is the tree, its table is what was measured."""

import json
import re
import runpy
import sys

import pytest

from tests.conftest import ROOT

sys.path.insert(0, str(ROOT / "examples" / "study"))
import study

sys.path.pop(0)
README = (ROOT / "README.md").read_text()
PACKAGE, MEASURED = ((ROOT / name / "README.md").read_text() for name in ("tidar_megatron", "benchmarks"))
DOCS = {path.stem: path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))}
LONGEST = 60  # words of a paragraph


def test_every_command_is_run_by_ci():
    texts = [(ROOT / name).read_text() for name in (".ci/run", "Makefile", "examples/quickstart/run.sh")]
    lines = [line for text in texts for line in text.splitlines() if not line.lstrip().startswith("#")]
    ran = "\n".join(lines)
    blocks = [
        block for text in (README, MEASURED, *DOCS.values()) for block in re.findall(r"```bash\n(.*?)```", text, re.S)
    ]
    commands = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    assert len(commands) >= 4
    for command in commands:
        assert command in ran, command


def test_the_tree_names_every_file():
    tree = PACKAGE.split("```")[1]
    named = set(re.findall(r"^  (\S+\.py)", tree, re.M))
    package = ROOT / "tidar_megatron"
    files = {str(p.relative_to(package)) for p in package.rglob("*.py") if p.name != "__init__.py"}
    assert named == files
    for name in ("draw_masks.py", *(f"quickstart/{n}" for n in ("run.sh", "config.yaml", "cities.py", "measure.py"))):
        assert (ROOT / "examples" / name).exists()


def paragraphs(text):
    """A page's paragraphs: without code, tables, headings, figures and comments; each item of a list is one."""
    text = re.sub(r"```.*?```|<!-- table.*?end of table -->", "", text, flags=re.S)
    for block in re.split(r"\n\s*\n|\n(?=[-*] |\d+\. )", text):
        if block.strip() and not block.lstrip().startswith(("|", "#", "!", "<!--")):
            yield " ".join(block.split())


def test_paragraphs_are_short():
    pages = {"README": README, **DOCS}
    long = [(name, p) for name, text in pages.items() for p in paragraphs(text) if len(p.split()) > LONGEST]
    assert not long, long


def anchors(text):
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_lead_somewhere():
    others = {".venv", ".venv-lowest", "runs", "data"}
    pages = [path for path in ROOT.rglob("*.md") if not others & set(path.relative_to(ROOT).parts)]
    assert len(pages) > 12
    for page in pages:
        for target, anchor in re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", page.read_text()):
            there = page.parent / target if target else page
            assert there.exists(), (page, target)
            assert not anchor or anchor in anchors(there.read_text()), (page, target, anchor)


def table(summary):
    """The README's table of a summary.json."""
    rows = ["| plan | tokens per forward | tokens/s | speed-up over AR | identical to AR | distinct 4-grams |"]
    rows.append("|---|---|---|---|---|---|")
    for name, f in summary["plans"].items():
        same = "yes" if f["identical_to_ar"] else "no"
        cells = f"{f['tokens_per_forward']:.2f} | {f['tokens_per_second']:.0f} | {f['speedup_over_ar']:.2f}"
        rows.append(f"| {name} | {cells} | {same} | {f['distinct_4grams']:.2f} |")
    rows.append("")
    rows.append(f"{summary['prompts']} held-out prompts x {summary['new_tokens']} tokens; {summary['machine']}.")
    return "\n".join(rows)


def costs(training, attention, loss):
    """The table of benchmarks/*.json."""
    rows = ["| S | step / AR's | f = 0.25 | attention / causal | dense / causal | extra memory, of dense |"]
    rows.append("|---|---|---|---|---|---|")
    steps = {(row["seq_length"], row["diffusion_block_fraction"]): row["tidar_over_ar"] for row in training["rows"]}
    tiles = {(row["seq_length"], row["backend"]): row for row in attention["rows"]}
    for S in sorted({S for S, _ in steps}):
        cells = [f"{steps[S, 1.0]:.2f}", f"{steps[S, 0.25]:.2f}"]
        if (S, "chunked") in tiles:
            chunked, dense = tiles[S, "chunked"], tiles[S, "dense"]
            memory = chunked["peak_extra_bytes"] / dense["peak_extra_bytes"]
            cells += [f"{chunked['over_causal']:.2f}", f"{dense['over_causal']:.2f}", f"{memory:.0%}"]
        else:
            cells += [""] * 3
        rows.append(f"| {S} | {' | '.join(cells)} |")
    machine = attention["machine"]
    rows.append("")
    rows.append(
        f"Output layer and loss against megatron-core's: {loss['peak_ratio']:.1%} of the peak memory, "
        f"{loss['time_ratio']:.2f} of the time. {machine['processor']}, {machine['threads']} threads, "
        f"torch {machine['torch']}."
    )
    return "\n".join(rows)


def in_short(training, attention):
    """The sentence in docs/training.md."""
    steps = [row["tidar_over_ar"] for row in training["rows"] if row["diffusion_block_fraction"] == 1.0]
    tiles, dense = (
        [row["over_causal"] for row in attention["rows"] if row["backend"] == backend]
        for backend in ("chunked", "dense")
    )
    spans = [f"{min(found):.2f} to {max(found):.2f}" for found in (steps, tiles, dense)]
    attention = f"attention {spans[1]} of causal attention, against {spans[2]} with a dense mask"
    return f"a step of an 11M-parameter model, 512 to 8192 tokens, costs {spans[0]} of AR's, {attention}"


def gains(decode, planner, step):
    """The table of docs/exactness.md, from benchmarks/{decode,planner,step}.json."""
    names = {"auto auto": "auto", "tidar 1": "1 branch", "linear linear": "linear", "lookup lookup": "prompt-lookup"}
    names["transformers generate"] = "transformers generate"
    rows = [f"| context | batch | AR tokens/s | {' | '.join(names.values())} | distinct 4-grams |"]
    rows.append(f"|---|---|---|{'---|' * (len(names) + 1)}")
    found = {(row["context"], row["batch"], f"{row['mode']} {row['plan']}"): row for row in decode["rows"]}
    assert all(row["identical_to_ar"] for row in decode["rows"] if row["mode"] != "llama.cpp")  # its kernels are others
    for context, batch in dict.fromkeys((row["context"], row["batch"]) for row in decode["rows"]):
        cells = [f"{found[context, batch, 'ar ar']['tokens_per_second']:.0f}"]
        cells += [f"{found[context, batch, name]['over_ar']:.2f}" for name in names]
        spread = found[context, batch, "auto auto"]["spread"]
        cells[1] += f" ({spread['low']:.2f} to {spread['high']:.2f})"
        cells.append(f"{found[context, batch, 'ar ar']['distinct_4grams']:.2f}")
        rows.append(f"| {context} | {batch} | {' | '.join(cells)} |")
    best = []
    for row in planner["compared"]:
        name = {"own": "this model", "useless": "useless drafts"}.get(row["body"], row["body"])
        over_best, over_ar = row["auto_over_best"]["median"], row["auto_over_ar"]["median"]
        best.append(
            f"{name}, {row['threads']} threads: {over_best:.2f}, {over_ar:.2f}".replace("1 threads", "1 thread")
        )
    over_bare = [row["over_bare"]["median"] for row in step["rows"]]
    rows.append("")
    padded = "(11M, 88M: this model, padded with parts that write zeros)"
    rows.append(f"`auto` over the best of all fixed plans but copying, and over AR: {'; '.join(best)} {padded}.")
    rows.append(f"A decode step over a bare forward of its shape: {min(over_bare):.2f} to {max(over_bare):.2f}.")
    machine = decode["machine"]
    rows.append(f"{machine['processor']}, {machine['threads']} threads, torch {machine['torch']}.")
    return "\n".join(rows)


def test_the_gains_are_what_was_measured():
    read = [json.loads((ROOT / f"benchmarks/{name}.json").read_text()) for name in ("decode", "planner", "step")]
    shown = DOCS["exactness"].split("<!-- table: decoding -->\n")[1].split("\n<!-- end of table -->")[0]
    assert shown == gains(*read)


def test_the_costs_are_what_was_measured():
    read = [json.loads((ROOT / f"benchmarks/{name}.json").read_text()) for name in ("training", "attention", "loss")]
    shown = MEASURED.split("<!-- table: benchmarks -->\n")[1].split("\n<!-- end of table -->")[0]
    assert shown == costs(*read)
    assert in_short(*read[:2]) in " ".join(DOCS["training"].split())


def test_the_studies_are_what_was_measured():
    found = json.loads((ROOT / "benchmarks/study.json").read_text())
    shown = MEASURED.split("<!-- table: study -->\n")[1].split("\n<!-- end of table -->")[0]
    assert shown == f"{study.table(found)}\n\n{study.trust_table(found)}"
    assert len(found["runs"]) == 66
    smollm2 = json.loads((ROOT / "benchmarks/smollm2_study.json").read_text())
    shown = MEASURED.split("<!-- table: smollm2_study -->\n")[1].split("\n<!-- end of table -->")[0]
    assert shown == study.table(smollm2)
    mask_row = json.loads((ROOT / "benchmarks/smollm2_mask_row.json").read_text())
    shown = MEASURED.split("<!-- table: smollm2_mask_row -->\n")[1].split("\n<!-- end of table -->")[0]
    assert shown == study.table(mask_row)
    over = mask_row["rows"][1]["diffusion_loss, over base"]
    said = f"the diffusion loss is {-over['mean']:.3f} ± {over['half']:.3f} lower"
    assert said in " ".join(MEASURED.split())
    runs = found["runs"] + smollm2["runs"] + mask_row["runs"]
    assert all(run["command"].endswith(f"--seed {run['seed']}") for run in runs)


def test_what_smollm2_learned_is_what_was_measured():
    found = json.loads((ROOT / "benchmarks/smollm2.json").read_text())
    program = runpy.run_path(str(ROOT / "examples/smollm2/measure.py"))
    shown = MEASURED.split("<!-- table: smollm2 -->\n")[1].split("\n<!-- end of table -->")[0]
    assert shown == program["table"](found)
    assert all(one["identical_to_ar"] for one in found["plans"].values())


def test_the_drafts_of_smollm2_are_what_was_measured():
    found = json.loads((ROOT / "benchmarks/smollm2_drafts.json").read_text())
    program = runpy.run_path(str(ROOT / "examples/smollm2/measure_drafts.py"))
    shown = MEASURED.split("<!-- table: smollm2_drafts -->\n")[1].split("\n<!-- end of table -->")[0]
    assert shown == program["table"](found)
    assert found["summary"] == program["summary"](found)
    assert found["summary"]["ar_loss_difference"] == 0
    assert found["summary"]["identical_to_ar"] == found["summary"]["outputs"]


def test_what_a_save_blocks_is_what_was_measured():
    (row,) = json.loads((ROOT / "benchmarks/checkpoint.json").read_text())["rows"]
    assert row["parameters"] == pytest.approx(100e6, rel=0.01)
    said = f"of 100M parameters a save then blocks {row['blocked_over_sync']:.1%} of the time it takes otherwise"
    assert said in " ".join(DOCS["checkpoints"].split())


def test_the_table_is_what_was_measured():
    summary = json.loads((ROOT / "examples/quickstart/result.json").read_text())
    shown = README.split("<!-- table: examples/quickstart/result.json -->\n")[1].split("\n<!-- end of table -->")[0]
    assert shown == table(summary)
