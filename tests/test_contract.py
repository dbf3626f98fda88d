"""Every pass in PASSES against one contract."""

from pathlib import Path

import pytest

from mpcompile.export.onnx_export import lower
from mpcompile.ir.model import Model
from mpcompile.ir.precision import Precision
from mpcompile.passes import PASSES, Distill, NMMask, Polish
from mpcompile.pipeline.checkpoint_file import State, rest_of
from mpcompile.pipeline.pass_manager import Pass, PassManager
from mpcompile.testing import check_contract, tiny_data, tiny_mlp, tiny_vit

BEFORE_MASKS = ("drop-unread-tokens", "mp-budget", "permute", "scale-migration")  # refused after masks
NEED_IMAGES = ("confidence", "distill", "polish", "quantize", "scale-migration")
QUICK: dict[str, Pass] = {"distill": Distill(epochs=1, batch=16, warmup=1), "polish": Polish(steps=10)}


def skip_where_refused(name: str, model: Model) -> None:
    """Token merging is for transformers; that it refuses others is tested with it."""
    if name == "tome" and "attn" not in str(dict(model.graph.named_modules())):
        pytest.skip("the model has no tokens")


@pytest.mark.parametrize("name", PASSES)
def test_every_pass_keeps_the_contract(name: str, tiny: Model) -> None:
    kind = PASSES[name]
    assert kind.name == name
    assert (kind.__doc__ or "").strip()
    skip_where_refused(name, tiny)
    check_contract(kind(), tiny, tiny_data(tiny))


@pytest.mark.parametrize("name", [name for name in PASSES if name not in BEFORE_MASKS])
def test_every_pass_keeps_the_contract_after_the_masks(name: str, tiny: Model) -> None:
    skip_where_refused(name, tiny)
    data = tiny_data(tiny)
    masked, _ = PassManager([NMMask()]).run(tiny, data)
    check_contract(QUICK["polish"] if name == "polish" else PASSES[name](), masked, data)


@pytest.mark.parametrize("name", PASSES)
def test_every_result_exports(name: str, tmp_path: Path) -> None:
    model = tiny_vit() if name == "tome" else tiny_mlp()
    result = check_contract(PASSES[name](), model, tiny_data(model) if name in NEED_IMAGES else None)
    batch = 2 if name == "tome" else None  # test_tome.py exports a free batch
    precision: Precision = "int8" if name == "quantize" else "fp32"
    assert lower(result, tmp_path / "model.onnx", batch=batch, precision=precision).onnx.is_file()


@pytest.mark.parametrize("name", PASSES)
def test_every_pass_gives_the_same_result_twice(name: str, tiny: Model) -> None:
    skip_where_refused(name, tiny)
    data, steps = tiny_data(tiny, 32), [] if name in (*BEFORE_MASKS, "nm-mask") else [NMMask()]
    step = QUICK[name] if name in QUICK else PASSES[name]()
    (one, first), (other, second) = (PassManager([*steps, step]).run(tiny, data) for _ in range(2))
    assert State.of(one) == State.of(other)
    assert rest_of(one) == rest_of(other)
    assert first[-1].notes == second[-1].notes
