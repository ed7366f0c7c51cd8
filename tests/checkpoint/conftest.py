"""Random models of every family: as folders of Hugging Face, and imported."""

import pytest

from tests.random_models import MODELS, write_random_model
from tidar_megatron.huggingface.convert import import_run


@pytest.fixture(scope="session")
def imported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("imported")
    for name, settings in MODELS.items():
        write_random_model(folder / name / "hf", **settings)
        import_run(folder / name / "hf", folder / name / "run")
    return folder
