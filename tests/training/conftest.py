"""The uninterrupted run that others are compared with."""

import pytest
import torch

from tests.training.small_runs import small
from tidar_megatron.training.loop import pretrain


@pytest.fixture(scope="session")
def whole(shards, tmp_path_factory):
    """The uninterrupted run."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("whole")
    pretrain(small(shards, checkpoint={"save": str(folder)}))
    return folder
