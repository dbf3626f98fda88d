"""Every pass in PASSES, and the example pass of CONTRIBUTING.md, against one contract."""

import re
from pathlib import Path

import pytest

from mpcompile.lower import lower
from mpcompile.model import Model
from mpcompile.passes import PASSES
from mpcompile.testing import check_contract, tiny_mlp

CONTRIBUTING = Path(__file__).parents[1] / "CONTRIBUTING.md"


@pytest.mark.parametrize("name", PASSES)
def test_every_pass_keeps_the_contract(name: str, tiny: Model) -> None:
    kind = PASSES[name]
    assert kind.name == name
    assert (kind.__doc__ or "").strip()
    check_contract(kind(), tiny)


@pytest.mark.parametrize("name", PASSES)
def test_every_result_exports(name: str, tmp_path: Path) -> None:
    result = check_contract(PASSES[name](), tiny_mlp())
    assert lower(result, tmp_path / "model.onnx").onnx.is_file()


def test_a_stranger_can_write_a_pass() -> None:
    """The code blocks of CONTRIBUTING.md, in order, as one program; its asserts are the test."""
    blocks = re.findall(r"^```python\n(.*?)^```", CONTRIBUTING.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert len(blocks) >= 2
    source = "\n".join(blocks)
    assert "check_contract(" in source
    namespace: dict[str, object] = {"__name__": "stranger"}
    exec(compile(source, str(CONTRIBUTING), "exec"), namespace)
    assert "RoundToBF16" in namespace
