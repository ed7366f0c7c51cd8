"""The house has floors: a file imports only from lower floors, or from its own folder."""

import ast
from pathlib import Path

import tidar_megatron

API = set(tidar_megatron.__all__)
PACKAGE = Path(__file__).parent.parent / "tidar_megatron"
FLOORS = {
    "errors": -4,  # the ground
    "streams": -3,
    "files": -2,
    "json_files": -2,
    "program": -2,
    "tidar_section": -1,
    "new_folder": 0,
    "hf_folder": 0,
    "attention_mask": 0,
    "mask_token": 0,
    "precision": 0,
    "attention_kernels": 0,
    "config": 0,
    "context_parallel": 0,
    "text_stream": 0,
    "adapter": 0.5,
    "distributed": 1,
    "data": 1,
    "inference": 1,
    "models": 2,
    "own_text": 2,
    "checkpoint": 3,
    "huggingface": 4,
    "training": 5,
    "evaluation": 5,
    "planning": 6,
    "benchmark": 6,
    "gpu_check": 7,
    "cli": 8,
    "__main__": 9,
}
# megatron-core's reader of its own files is what reads them, and is imported where it is needed
ALLOWED = {("data/megatron_indexed", "megatron.core.datasets.indexed_dataset")}
FORBIDDEN = {  # room -> what it must not know
    "data": ("megatron", "tidar_megatron.config"),
    "inference": ("megatron", "tidar_megatron.data", "tidar_megatron.distributed"),
    "attention_mask": ("megatron", "transformers"),
    "config": ("torch", "megatron", "transformers"),
}


def imports(source):
    """Every module a file imports, at the top or inside a function."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "absolute imports only"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room(module):
    parts = module.split(".")
    return parts[1] if parts[0] == "tidar_megatron" and len(parts) > 1 else None


def violations(path, source):
    relative = path.relative_to(PACKAGE).with_suffix("")
    mine = relative.parts[0]
    for module in imports(source):
        other = room(module)
        if other in FLOORS and other != mine and FLOORS[other] >= FLOORS[mine]:
            yield f"{relative} (F{FLOORS[mine]}) imports {module} (F{FLOORS[other]})"
        if module.startswith("tidar_megatron.") and other in API:
            yield f"{relative} imports {other} through the package, and so past the floors"
        for unknown in FORBIDDEN.get(mine, ()):
            if any(str(relative) == file and (module + ".").startswith(allowed + ".") for file, allowed in ALLOWED):
                continue
            if module == unknown or module.startswith(unknown + "."):
                yield f"{relative} imports {module}"


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.stem != "__init__")


def test_imports_go_down():
    """All that is wrong is listed."""
    rooms = {path.relative_to(PACKAGE).with_suffix("").parts[0] for path in FILES}
    assert not rooms - FLOORS.keys(), "a new room: give it a floor"
    assert not [line for path in FILES for line in violations(path, path.read_text())]


def test_the_test_can_fail():
    fake = PACKAGE / "data" / "loader.py"
    assert list(violations(fake, "from tidar_megatron.models.loss import joint_loss"))
    assert list(violations(fake, "def f():\n    import megatron.core"))
    assert list(violations(PACKAGE / "inference" / "x.py", "from tidar_megatron.training import loop"))
    assert list(violations(fake, "from tidar_megatron import generate"))
    assert not list(violations(PACKAGE / "training" / "x.py", "from tidar_megatron.models.loss import joint_loss"))


def test_only_one_place_knows_the_rule_and_one_the_missing_gpu():
    """Nobody else reads horizons, asks for CUDA (but inference, which knows no Megatron) or reads parallel_state."""
    for path in FILES:
        relative, text = str(path.relative_to(PACKAGE)), path.read_text()
        if relative != "attention_mask.py":
            assert "HORIZON" not in text, relative
        if relative != "distributed/platform.py" and not relative.startswith("inference/"):
            assert "torch.cuda.is_available" not in text, relative
        if relative != "distributed/groups.py":
            assert "parallel_state" not in text, relative
        if relative not in (
            "context_parallel.py",
            "data/doubled.py",
            "models/layers.py",
            "models/attention/schedules.py",
            "planning/attention_work.py",
        ):  # batch and attention use it, and the plan counts what they do
            assert "tidar_megatron.context_parallel" not in text, relative
