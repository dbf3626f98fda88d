"""CRITERIA is the one table of criterion names: recipes, checks, help texts and docs agree with it."""

import re
from pathlib import Path

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor
from typer.main import get_command

from mpcompile.cli.app import app
from mpcompile.data.images import Data
from mpcompile.driver.run_plan import build_pass
from mpcompile.errors import PassError, UsageError
from mpcompile.ir.pattern import NM
from mpcompile.ir.weight_groups import pattern_violation
from mpcompile.passes import NMMask
from mpcompile.passes.nm_mask.criteria import CRITERIA, DEFAULT, DEFAULT_WITHOUT_REFIT
from mpcompile.passes.nm_mask.criterion import MaskProblem
from mpcompile.pipeline.pass_manager import PassManager
from mpcompile.recipe.schema import Step
from mpcompile.testing import tiny_mlp

DOCS = Path(__file__).parents[3] / "docs"


def names_in(text: str) -> list[str]:
    """The criteria that a text names as words, in its order."""
    return [word for word in re.findall(r"[\w-]+", text) if word in CRITERIA]


def problem(gram: Tensor) -> MaskProblem:
    weight = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    return MaskProblem(weight, weight.double(), gram, NM(2, 4, rows=2))


@pytest.mark.parametrize("name", CRITERIA)
def test_every_criterion_follows_the_pattern_and_needs_what_it_declares(name: str) -> None:
    criterion = CRITERIA[name]
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    mask = criterion.select(problem((x.T @ x / 64)[None]))
    assert mask.dtype == torch.bool
    assert mask.shape == (8, 16)
    assert pattern_violation(mask, NM(2, 4, rows=2)) is None
    if not criterion.needs_images:
        assert torch.equal(mask, criterion.select(problem(torch.empty(0, 16, 16))))


def test_the_defaults_are_criteria_that_work_without_settings() -> None:
    assert CRITERIA[DEFAULT].needs_refit
    assert not CRITERIA[DEFAULT_WITHOUT_REFIT].needs_images
    assert not CRITERIA[DEFAULT_WITHOUT_REFIT].needs_refit


def test_recipes_accept_the_names_of_the_table() -> None:
    schema = TypeAdapter(NMMask).json_schema()["properties"]["criterion"]
    [accepted] = [option["enum"] for option in schema["anyOf"] if "enum" in option]
    assert accepted == list(CRITERIA)


def test_an_unknown_criterion_is_refused_with_the_names() -> None:
    step = NMMask()
    object.__setattr__(step, "criterion", "luck")  # in tests, jaxtyping already refuses it as an argument
    with pytest.raises(UsageError, match=f"criterion is 'luck'; the criteria are {', '.join(CRITERIA)}"):
        step.__post_init__()
    with pytest.raises(UsageError, match=f"pass nm-mask: criterion: .*{'.*'.join(CRITERIA)}.*found 'luck'"):
        build_pass(Step(name="nm-mask", params={"criterion": "luck"}))


@pytest.mark.parametrize("name", CRITERIA)
def test_what_a_criterion_needs_is_checked(name: str) -> None:
    criterion = CRITERIA[name]
    if criterion.needs_refit:
        with pytest.raises(UsageError, match=f"the criterion {name} selects weights for their refit"):
            NMMask(criterion=name, refit="none")
    if not criterion.uses_prior:
        with pytest.raises(UsageError, match=r"prior is 0.1; it applies to one criterion, so set criterion to"):
            NMMask(criterion=name, prior=0.1)
    if criterion.needs_images:
        with pytest.raises(PassError, match=f"the criterion {name} needs calibration images; give --data"):
            PassManager([NMMask(criterion=name)]).run(tiny_mlp(), Data())


def test_the_help_of_the_command_line_names_every_criterion() -> None:
    command = get_command(app).commands["compile"]  # type: ignore[attr-defined]
    [option] = [option for option in command.params if "--criterion" in option.opts]
    # The names in the order of the table, then the two defaults.
    assert names_in(option.help.partition("[")[0]) == list(CRITERIA)
    assert names_in(option.help.partition("[")[2]) == [DEFAULT, DEFAULT_WITHOUT_REFIT]


def test_the_docs_name_every_criterion() -> None:
    concepts, recipes = ((DOCS / f"{page}.md").read_text(encoding="utf-8") for page in ("concepts", "recipes"))
    table = re.search(r"^\| criterion \|.*\n\|.*\n((?:\|.*\n)+)", concepts, re.MULTILINE)
    assert table is not None
    assert [row.split("`")[1] for row in table[1].splitlines()] == list(CRITERIA)
    [row] = re.findall(r"^\| `criterion` \|.*$", recipes, re.MULTILINE)
    assert names_in(row.partition("; `null`")[0]) == list(CRITERIA)
