"""What every test shares: no network, no user cache, a fixed seed, and small random models."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub
os.environ["HF_DATASETS_OFFLINE"] = "1"

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton: GPU kernels run on the CPU, slowly

from rsparse.models import random_model, shape_config

settings.register_profile("fixed", deadline=None, derandomize=True, max_examples=100)
settings.load_profile("fixed")

SMALL = dict(hidden_size=64, intermediate_size=176, num_hidden_layers=2, num_attention_heads=8)
VOCABULARY = 97


LONGEST = "notebooks kernels kernels_compile search sparsify book batch kernel_attention figures tiny_data".split()
"""The files that take longest begin first, so that at the end no worker waits long for another."""


def pytest_configure(config):
    config.option.loadscopereorder = False  # xdist would begin with the files of most tests


def pytest_collection_modifyitems(items):
    order = {f"test_{name}": i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


@pytest.fixture(autouse=True)
def _surroundings(tmp_path_factory, monkeypatch):
    """Low-rank factors go to a folder of the test session, and torch's generator starts anew."""
    monkeypatch.setenv("RSPARSE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    torch.manual_seed(0)


@pytest.fixture
def build():
    """build(dtype="float64", shape="llama-2-7b", seed=0, **sizes): a two-layer model with random weights.

    Weights are scaled up from the library's 0.02, so that what a block does shows in the logits.
    """

    def make(dtype: str = "float64", shape: str = "llama-2-7b", seed: int = 0, **sizes):
        sizes = (
            SMALL | dict(num_key_value_heads=2, vocab_size=VOCABULARY, max_position_embeddings=256) | sizes
        )
        model = random_model(shape_config(shape, **sizes), dtype, seed=seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("proj.weight") or "embed" in name:
                    parameter.mul_(6)
        return model

    return make


@pytest.fixture
def ids():
    """LongTensor (4, 40) of token ids of the small models."""
    return torch.randint(0, VOCABULARY, (4, 40), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def logits():
    """logits(model, ids): the model's logits, without a graph."""

    @torch.no_grad()
    def run(model, ids, **kwargs):
        return model(ids, **kwargs).logits

    return run
