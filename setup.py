"""Package metadata. Every dependency has a lower bound, the oldest version the tests have run on unless a reason is given,
and an upper bound only where the next major version is known to be a break."""

from setuptools import find_packages, setup

setup(
    name="cai_jax",
    version="0.1.0",
    description="Constitutional AI in JAX: critique, revision, AI feedback, reward model, PPO and evaluation from one config",
    author="The cai_jax authors",
    license="Apache-2.0",
    python_requires=">=3.11",  # tomllib
    packages=find_packages(include=["cai_jax", "cai_jax.*"]),
    package_data={"cai_jax.miniworld": ["data/*", "base/*"]},
    install_requires=[
        "jax>=0.10.2",  # explicit mesh axis types and jax.set_mesh; the newest that Python 3.11 gets, newer ones are tested too
        "flax>=0.12.8",  # Linen under the typed meshes of this jax
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8",  # the v1 checkpoint interface, asynchronous saves included
        "transformers>=5,<6",  # only tokenizers and config.json are used; version 5 dropped its own Flax models
        "huggingface_hub>=1.31",  # what transformers 5 is built against; fetches models named by their hub id
        "tokenizers>=0.23.1",  # what transformers 5 is built against; trains the tokenizer of the embedded world
        "safetensors>=0.8.0",  # what transformers 5 is built against; reads bfloat16 into NumPy through ml_dtypes
        "ml_collections>=1.1.0",  # locked configs with command-line overrides of typed fields
        "absl-py>=2.3.0",  # flags; ml_collections sets no bound of its own
        "numpy>=2.0",  # jax 0.10 asks for it
        "matplotlib>=3.10",  # figures of the report
        "rich>=14.0",  # progress and tables in the terminal
    ],
    extras_require={
        "tpu": ["jax[tpu]>=0.10.2"],  # TPUs, and their compiler for machines without one
        "gcs": ["gcsfs>=2026.9.0"],  # a run's folder in a bucket of Google's
        "test": [
            "gcsfs>=2026.9.0",
            "pytest>=9.0",
            "pytest-xdist>=3.8",
            "ruff>=0.15",
            "jax[tpu]>=0.10.2; sys_platform == 'linux' and platform_machine == 'x86_64'",  # what `cai compile` compiles with
            "peft>=0.21",  # tests only: adapters loaded and compared
            "torch==2.13.0",  # tests only: logits compared with transformers; one version, so that the comparison stays put
            "trl==1.12.0",  # tests only: losses and their gradients compared with its own, of which we call inner methods
        ],
    },
    entry_points={"console_scripts": ["cai = cai_jax.__main__:cli"]},
)
