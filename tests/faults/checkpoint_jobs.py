"""Trains small models one after another in one launch: ``checkpoint_jobs.py JOBS.json``, alone or under torchrun.

A job is {"config": tree, "resave": bool}: train as the configuration says, or load and save again without a step.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from tests.training.small_runs import small
from tidar_megatron.distributed.groups import shut_down
from tidar_megatron.training import loop
from tidar_megatron.training.loop import pretrain
from tidar_megatron.training.trainer import Trainer

LAYOUTS = {
    "DP2": {},
    "TP2": {"tensor_model_parallel_size": 2},
    "PP2": {"pipeline_model_parallel_size": 2},
    "VPP": {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
    "CP2": {"context_parallel_size": 2},
    "DP2 distributed": {"use_distributed_optimizer": True},
    "TP2 distributed": {"tensor_model_parallel_size": 2, "use_distributed_optimizer": True},
}


def job(shards, *, resave=False, **sections):
    """One job: ``sections`` are changes to a small run's configuration; nothing is evaluated."""
    sections["data"] = {**sections.get("data", {}), "valid_data": None}
    return {"shards": [str(folder) for folder in shards], "resave": resave, "sections": sections}


def run_jobs(jobs):
    for one in jobs:
        config = small([Path(folder) for folder in one["shards"]], **one["sections"])
        if one["resave"]:
            trainer = Trainer.build(config)
            trainer.write_run_folder()
            dist.barrier()
            trainer.save()
            trainer.close()
            loop.shut_down()
        else:
            pretrain(config)


def tensors(checkpoint):
    """Every tensor of a checkpoint, whole, by its global name; read without process groups."""
    from torch.distributed.checkpoint import FileSystemReader, load
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    found = FileSystemReader(str(checkpoint)).read_metadata().state_dict_metadata
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in found.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    load(state, storage_reader=FileSystemReader(str(checkpoint)), no_dist=True)
    return state


if __name__ == "__main__":
    torch.set_num_threads(1)
    loop.shut_down = lambda orderly=True: None  # torchrun's ranks meet once; each job lays out its own groups
    run_jobs(json.loads(Path(sys.argv[1]).read_text()))
    shut_down()
