"""Fixtures that several files share: the tiny models, the example's files, and one finished output folder."""

from pathlib import Path

import pytest
import torch
from hypothesis import settings

import mpcompile
from mpcompile.artifact import Artifact
from mpcompile.model import Model
from mpcompile.testing import tiny_cnn, tiny_mlp, tiny_vit

EXAMPLE = Path(__file__).parents[1] / "examples" / "fashion_vit"
# A deadline would measure the machine: what else runs on it, and what a first example imports.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")
settings.register_profile(
    "fuzz", deadline=None, max_examples=10_000, print_blob=True
)  # for tests/fuzz alone: make fuzz

TINY = {"mlp": tiny_mlp, "cnn": tiny_cnn, "vit": tiny_vit}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run what takes minutes")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--slow"):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="takes minutes; run with --slow"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=list(TINY))
def tiny(request: pytest.FixtureRequest) -> Model:
    return TINY[request.param]()


@pytest.fixture(scope="session")
def example() -> Path:
    """The folder of the trained example."""
    return EXAMPLE


@pytest.fixture(scope="session")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The trained example at 2:4, compiled once for every test that only reads it."""
    recipe = mpcompile.Recipe.checked(
        {"passes": [{"nm-mask": {"pattern": "2:4"}}], "bench": {"batches": [1], "seconds": 0.2}}
    )
    output = tmp_path_factory.mktemp("compiled") / "out"
    return mpcompile.compile(EXAMPLE / "model.safetensors", recipe, data=EXAMPLE / "images.npz", output=output)


@pytest.fixture(scope="session")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The trained example through everything that a report tells of but training, on few images."""
    recipe = mpcompile.Recipe.checked(
        {
            "passes": [
                {"mp-budget": {"patterns": ["2:4", "1:4"], "macs": 0.7, "exclude": ["blocks.0.attn.*"]}},
                "permute",
                {"nm-mask": {"criterion": "wanda", "refit": "layer"}},
                {"tome": {"r": 2}},
                "certify",
            ],
            "data": {"calibration": 32, "validation": 0, "held_out": 64},
            "bench": {"batches": [1, 2], "seconds": 0.05},
            "gates": {"max_drop": 50},
        }
    )
    output = tmp_path_factory.mktemp("reported") / "out"
    return mpcompile.compile(EXAMPLE / "model.safetensors", recipe, data=EXAMPLE / "images.npz", output=output)
