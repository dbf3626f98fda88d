"""The forecast of memory that --dry-run prints."""

import pytest

from mpcompile.data.images import Data
from mpcompile.driver import memory_forecast as forecast_module
from mpcompile.driver.memory_forecast import MemoryForecast, memory_forecast
from mpcompile.driver.run_plan import plan_of
from mpcompile.passes.reconstruct.calibration_batches import BATCH, open_bytes, peak_bytes
from mpcompile.passes.reconstruct.second_moments import solving_bytes
from mpcompile.recipe.schema import Recipe
from mpcompile.testing import tiny_data, tiny_vit

PLAN = plan_of(Recipe.checked({"passes": ["nm-mask"], "target": "eager"}))


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forecast_module, "resident_bytes", lambda: 1000)


def test_activations_beyond_the_limit_go_to_files(known: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_vit()
    data = tiny_data(model)
    each, images = 2 * peak_bytes(model), len(data.calibration)
    weights = 2 * sum(p.numel() * 4 for p in model.graph.parameters())
    solving = max(solving_bytes(layer) for _, layer in model.layers())
    for activations, in_files in ((images * each, 0), (32 * each, (images - 32) * each), (0, (images - BATCH) * each)):
        unused = int(weights + solving + open_bytes(model) + activations)
        monkeypatch.setattr(forecast_module, "unused_bytes", lambda device, found=unused: found)
        found = memory_forecast(PLAN, model, data)
        kept = max(activations, BATCH * each)  # an open batch is in memory
        assert found == MemoryForecast(1000 + weights + solving + int(kept), int(in_files))


def test_without_images_it_is_the_weights(known: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forecast_module, "unused_bytes", lambda device: 10**9)
    model = tiny_vit()
    weights = 2 * sum(p.numel() * 4 for p in model.graph.parameters())
    assert memory_forecast(PLAN, model, Data()) == MemoryForecast(1000 + weights, 0)


def test_nothing_is_said_where_the_system_reports_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forecast_module, "resident_bytes", lambda: None)
    assert memory_forecast(PLAN, tiny_vit(), Data()) == MemoryForecast(None, None)
