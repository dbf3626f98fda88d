"""Every pass in PASSES against one contract."""

from functools import cache
from pathlib import Path

import pytest

from mpcompile.export.onnx_export import lower
from mpcompile.ir.model import Model
from mpcompile.ir.precision import Precision
from mpcompile.passes import PASSES, Distill, NMMask, Polish
from mpcompile.pipeline.checkpoint_file import State, rest_of
from mpcompile.pipeline.pass_manager import Pass, PassManager
from mpcompile.testing import check_contract, tiny_cnn, tiny_data, tiny_mlp, tiny_vit

BEFORE_MASKS = ("drop-unread-tokens", "mp-budget", "permute", "scale-migration")  # refused after masks
TINY = {"mlp": tiny_mlp, "cnn": tiny_cnn, "vit": tiny_vit}
NEED_IMAGES = ("confidence", "distill", "polish", "quantize", "scale-migration")
QUICK: dict[str, Pass] = {"distill": Distill(epochs=1, batch=16, warmup=1), "polish": Polish(steps=10)}


def skip_where_refused(name: str, model: Model) -> None:
    """Token merging is for transformers; that it refuses others is tested with it."""
    if name == "tome" and "attn" not in str(dict(model.graph.named_modules())):
        pytest.skip("the model has no tokens")


@cache
def masked(kind: str) -> Model:
    """The tiny model of this kind with masks, made once: no test may change a model that it was given."""
    model = TINY[kind]()
    return PassManager([NMMask()]).run(model, tiny_data(model, 32))[0]


@pytest.mark.parametrize("name", PASSES)
def test_every_pass_keeps_the_contract(name: str, tiny: Model) -> None:
    kind = PASSES[name]
    assert kind.name == name
    assert (kind.__doc__ or "").strip()
    skip_where_refused(name, tiny)
    check_contract(kind(), tiny, tiny_data(tiny))


@pytest.mark.parametrize("name", [name for name in PASSES if name not in BEFORE_MASKS])
@pytest.mark.parametrize("kind", TINY)
def test_every_pass_keeps_the_contract_after_the_masks(name: str, kind: str) -> None:
    model = masked(kind)
    skip_where_refused(name, model)
    check_contract(QUICK["polish"] if name == "polish" else PASSES[name](), model, tiny_data(model))


@pytest.mark.parametrize("name", PASSES)
def test_every_result_exports(name: str, tmp_path: Path) -> None:
    model = tiny_vit() if name == "tome" else tiny_mlp()
    result = check_contract(PASSES[name](), model, tiny_data(model) if name in NEED_IMAGES else None)
    batch = 2 if name == "tome" else None  # test_tome.py exports a free batch
    precision: Precision = "int8" if name == "quantize" else "fp32"
    assert lower(result, tmp_path / "model.onnx", batch=batch, precision=precision).onnx.is_file()


@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize("kind", TINY)
def test_every_pass_gives_the_same_result_twice(name: str, kind: str) -> None:
    model = TINY[kind]() if name in (*BEFORE_MASKS, "nm-mask") else masked(kind)
    skip_where_refused(name, model)
    step, data = QUICK[name] if name in QUICK else PASSES[name](), tiny_data(model, 32)
    (one, first), (other, second) = (PassManager([step]).run(model, data) for _ in range(2))
    assert State.of(one) == State.of(other)
    assert rest_of(one) == rest_of(other)
    assert first[-1].notes == second[-1].notes
