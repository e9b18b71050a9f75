"""Installs moco_eval, pretraining and the shipped configs; pyproject.toml holds the tools' settings."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (HERE / "moco_eval" / "__init__.py").read_text(encoding="utf-8"), re.M)
assert VERSION, "moco_eval/__init__.py states the version"

setup(
    name="moco-eval",
    version=VERSION[1],
    description="Measures how well any encoder transfers, under the papers' own protocols, and trains MoCo encoders",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The moco-eval developers",
    license="MIT",
    license_files=["LICENSE"],
    keywords=["self-supervised learning", "representation learning", "contrastive learning", "MoCo", "evaluation"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: Console",
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Operating System :: MacOS",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Image Recognition",
    ],
    python_requires=">=3.10",
    packages=[*find_packages(include=["moco_eval", "moco_eval.*", "pretraining"]), "moco_eval.configs"],
    package_dir={"moco_eval.configs": "configs"},
    package_data={
        "moco_eval": ["*/*.txt", "*/*.html", "*/*/*.html", "*/*/*.js"],
        "moco_eval.configs": ["*.yaml", "*/*.yaml"],
    },
    install_requires=[
        "torch>=2.6",
        "torchvision>=0.21",
        "click>=8.1",
        "pydantic>=2.6",
        "pyyaml>=6",
        "numpy>=1.24",
        "scikit-learn>=1.3",
        "scipy>=1.9",
        "pycocotools>=2.0.7",
        "safetensors>=0.4",
        "rich>=13",
        "matplotlib>=3.7",
        "tensorboard>=2.14",
        "pillow>=10",
        "simplejpeg>=1.7",
        "jinja2>=3.1",
        "timm>=1.0",
        "tifffile>=2023.7",
    ],
    extras_require={
        "dev": [
            "pytest>=8",
            "pytest-xdist>=3",
            "ruff>=0.9",
            "mypy>=1.11",
            "types-PyYAML",
            "webdataset>=0.2",
            "submitit>=1.5",
        ],
        "docs": ["mkdocs-material>=9.5,<10", "mkdocstrings[python]>=0.26", "nbconvert>=7", "ipykernel>=6.29"],
        "slurm": ["submitit>=1.5"],
        "wandb": ["wandb>=0.31"],
        "mlflow": ["mlflow-skinny>=3", "sqlalchemy>=2", "alembic>=1.13"],  # the latter two for a local store
        "hf": ["datasets>=4", "huggingface_hub>=0.23"],
        "peers": [
            "lightly>=1.5",
            "pytorch-lightning>=2",
            "omegaconf>=2.3",
            "transformers>=4.40",
            "datasets>=4",
        ],
    },
    entry_points={"console_scripts": ["moco-eval=moco_eval.cli.main:main"]},
)
