"""Inspect checkpoints: contents, integrity and origin, without building a model or executing a pickle."""

from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from tidar_megatron.checkpoint.contents import read_state
from tidar_megatron.checkpoint.folder import TRACKER, checkpoint_folder, restart_points, saved_iterations
from tidar_megatron.checkpoint.integrity import Damaged, check_hash, check_hashes, check_sizes
from tidar_megatron.checkpoint.pickles import METADATA, read_metadata
from tidar_megatron.errors import UserError

OPTIMIZER = "optimizer."


def inspect(folder: str | Path, verify: bool) -> dict[str, Any]:
    """Inspect a run's folder with all its checkpoints, or a single checkpoint.

    Args:
        folder: The folder of a run, or one ``iter_..`` folder in it.
        verify: Whether to compare hashes; otherwise only file sizes are compared.

    Returns:
        A JSON object. ``checkpoints`` holds one :func:`summary` each. A run's folder also has ``tracker``,
        ``continues_from`` and ``passed_over``; a single checkpoint has ``tensors``, ``files`` and ``state`` as far as
        they can be read.

    Raises:
        UserError: The folder holds no checkpoint.
    """
    folder = Path(folder)
    if folder.name.startswith("iter_"):
        if not folder.is_dir():
            raise UserError(f"{folder}: there is no such folder")
        return {"folder": str(folder), "checkpoints": [summary(folder, verify)], **_contents(folder)}
    iterations = saved_iterations(folder)
    if not iterations:
        raise UserError(
            f"{folder}: holds no checkpoint; give a folder that was --save in training, or one iter_.. in it"
        )
    try:
        points, passed_over = restart_points(folder)
    except UserError:
        points, passed_over = [], []
    tracker = folder / TRACKER
    return {
        "folder": str(folder),
        "tracker": tracker.read_text(errors="replace").strip()[:40] if tracker.is_file() else None,
        "continues_from": points[0] if points else None,
        "passed_over": passed_over,
        "checkpoints": [summary(checkpoint_folder(folder, iteration), verify) for iteration in iterations],
    }


def summary(checkpoint: Path, verify: bool) -> dict[str, Any]:
    """Summarize one checkpoint.

    Returns:
        ``intact``: whether the sizes match the manifest, and with ``verify`` the hashes; ``damage``: what does not
        match, or None; ``name``, ``verified``; and as far as they are known ``bytes``, ``files`` (a count),
        ``parameters`` (a count) and ``optimizer`` (whether it holds the optimizer's state).
    """
    row: dict[str, Any] = {"name": checkpoint.name, "intact": True, "verified": verify, "damage": None}
    try:
        manifest = check_sizes(checkpoint)
        row |= {"bytes": sum(entry.bytes for entry in manifest.files.values()), "files": len(manifest.files)}
        if verify:
            check_hashes(checkpoint)
        check_hash(checkpoint, METADATA)
        tensors = _tensors(checkpoint)
        row["parameters"] = sum(t["elements"] for t in tensors if not t["name"].startswith(OPTIMIZER))
        row["optimizer"] = any(t["name"].startswith(OPTIMIZER) for t in tensors)
    except Damaged as damage:
        row |= {"intact": False, "damage": str(damage)}
    return row


def _contents(checkpoint: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    try:
        found["state"] = read_state(checkpoint).model_dump()
        check_hash(checkpoint, METADATA)
        found["tensors"] = _tensors(checkpoint)
        found["files"] = {name: entry.model_dump() for name, entry in check_sizes(checkpoint).files.items()}
    except Damaged as damage:
        found["unreadable"] = str(damage)
    return found


def _tensors(checkpoint: Path) -> list[dict[str, Any]]:
    rows = []
    for name, entry in sorted(read_metadata(checkpoint).state_dict_metadata.items()):
        if isinstance(entry, TensorStorageMetadata):
            elements = torch.Size(entry.size).numel()
            dtype = str(entry.properties.dtype).removeprefix("torch.")
            size = elements * entry.properties.dtype.itemsize
            rows.append({"name": name, "shape": list(entry.size), "dtype": dtype, "elements": elements, "bytes": size})
    return rows


def describe(found: dict[str, Any]) -> list[str]:
    """Return the result of :func:`inspect` as lines of text."""
    lines = []
    if "tracker" in found:
        point = found["continues_from"]
        goes_on = "no checkpoint is intact" if point is None else f"a run resumes from {point}"
        lines.append(f"{found['folder']}: the tracker names {found['tracker']}; {goes_on}")
        lines += [f"  skipped: {said}" for said in found["passed_over"]]
    lines += [f"{row['name']}: {_one_line(row)}" for row in found["checkpoints"]]
    if state := found.get("state"):
        config, sizes = state["config"], {name: size for name, size in state["layout"].items() if size}
        lines += [
            f"  iteration {state['iteration']}, {state['consumed_sequences']:,} sequences consumed",
            f"  run folder: {config.get('checkpoint', {}).get('save')}",
            f"  training data: {config.get('data', {}).get('train_data')}",
            f"  layout: {', '.join(f'{name} {size}' for name, size in sizes.items())}",
            f"  saved by megatron-core {state['megatron_core']}",
            f"  states of: {', '.join(state['states']) or 'no other part'}",
            *(f"  fingerprint: {part} {value}" for part, value in state["fingerprint"].items()),
            *(f"  config: {name} {values}" for name, values in config.items()),
        ]
    for tensor in found.get("tensors", ()):
        lines.append(f"  {tensor['name']}  {tensor['dtype']} {tensor['shape']}  {tensor['bytes']:,} bytes")
    for name, entry in found.get("files", {}).items():
        lines.append(f"  {name}  {entry['bytes']:,} bytes  {entry['sha256']}")
    if "unreadable" in found:
        lines.append(f"  the rest cannot be read: {found['unreadable']}")
    return lines


def _one_line(row: dict[str, Any]) -> str:
    if not row["intact"]:
        return f"DAMAGED: {row['damage']}"
    known = "intact (sizes and hashes match)" if row["verified"] else "intact (sizes match)"
    held = f"{row['parameters']:,} parameters {'with' if row['optimizer'] else 'without'} optimizer state"
    return f"{known}; {held}, {row['bytes']:,} bytes in {row['files']} files"
