"""Installs moco_eval, pretraining and the shipped configs; pyproject.toml holds the tools' settings."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent

setup(
    name="moco-eval",
    version="0.1.0",
    description="Trains MoCo encoders and tells how well any encoder transfers, beside the papers' own numbers",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
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
        "slurm": ["submitit>=1.5"],
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
