"""A played rank needs a process without a job of its own."""

import pytest

from tidar_megatron.distributed.groups import shut_down


@pytest.fixture(autouse=True)
def no_job_of_ones_own():
    shut_down()  # an earlier test file's
