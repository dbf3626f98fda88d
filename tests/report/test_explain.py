"""Why a layer is as it is: what stands in the report, no more, and in sentences that say who decided."""

from pathlib import Path

import pytest
from small_reports import LAYERS, VERDICTS, dense_layer, int8_report, layer, small_report

from mpcompile.errors import UsageError
from mpcompile.passes import MPBudget
from mpcompile.passes.mp_budget import mp_budget
from mpcompile.pipeline.pass_record import Effect, PassRecord
from mpcompile.recipe.schema import Recipe
from mpcompile.report.explained_layer import KEPT_DENSE, explain, layers_named, one_line_each
from mpcompile.report.explained_values import amount, ordinal, rank
from mpcompile.report.schema import Report
from mpcompile.report.search_schema import Point, Tuning


def told(report: Report, name: str, topic: str) -> str:
    """The sentences of one topic about a layer."""
    [row] = layers_named(report, name)
    return " ".join(text for of, text in explain(report, row).sentences if of == topic)


def with_passes(*passes: object) -> Report:
    return small_report(recipe=Recipe.checked({"passes": list(passes)}))


def test_a_masked_layer_is_told_from_its_pattern_to_its_loss() -> None:
    report = small_report()
    [row] = layers_named(report, "blocks.0.attn.qkv")
    assert explain(report, row).sentences == (
        (
            "layer",
            "blocks.0.attn.qkv is a Linear with a weight of 64×64 and 20.0 % of the dense model's multiply-accumulates "
            "(the largest of 5 layers, as 4 others).",
        ),
        ("cost", "50.0 % of its multiply-accumulates are left, with zeros skipped and tokens merged."),
        ("pattern", "It is masked to 2:4: 50.0 % of its weights are kept."),
        (
            "pattern",
            "The pass mp-budget planned it: without a limit on cost, every eligible layer gets the pattern 2:4.",
        ),
        (
            "spectrum",
            "5 of its 64 singular values lie above the noise edge of 0.33, and 90.0 % lie in the fitted bulk. σ is "
            "0.02.",
        ),
        (
            "spectrum",
            "The distance from the law is 0.041, and 0.012 with its entries shuffled: the order of its entries has "
            "structure that the law does not describe.",
        ),
        ("channels", "Its input channels were reordered, so that the pattern keeps more of the important weights."),
        (
            "refit",
            "After the refit its outputs miss the dense model's by a relative squared error of 1.23 % on 256 "
            "calibration images (the 2nd largest of 2 layers).",
        ),
        (
            "kernel",
            "The target ort runs it on the sparse kernel NMGemm: the sparse kernel is faster. It took 0.25 ms with "
            "sparse kernels and 0.4 ms without: 1.60 times as fast.",
        ),
        (
            "loss",
            "It causes 30.0 % of the squared logit shift, to first order (the 2nd largest of 2 layers). Its outputs "
            "change by at most 0.2, mean over images.",
        ),
    )


def test_a_layer_on_a_dense_kernel_says_why_and_claims_no_speed() -> None:
    text = told(small_report(), "blocks.0.mlp.fc1", "kernel")
    assert text == (
        "The target ort runs it on a dense kernel: the sparse kernel is slower. It took 0.35 ms with sparse kernels "
        "and 0.3 ms without."
    )
    assert told(small_report(), "blocks.0.mlp.fc1", "channels") == (
        "Its channels were not reordered: another layer reads its channels too."
    )


def test_a_dense_layer_gives_its_reason_and_no_pass_that_did_not_decide() -> None:
    report = small_report()
    assert told(report, "head", "pattern") == "It is dense. The reason: it is the last layer."
    assert told(report, "head", "kernel") == told(report, "head", "refit") == ""
    assert told(report, "stem", "spectrum") == ""  # why there is no fit is the reason for which it is dense
    assert told(report, "stem", "channels") == "Its channels were not reordered: it reads the image."


def test_the_budget_is_named_where_it_decided() -> None:
    assert KEPT_DENSE in Path(mp_budget.__file__).read_text(encoding="utf-8")
    report = with_passes({"mp-budget": {"patterns": ["2:4", "1:4"], "macs": 0.7, "signal": "lamp"}}, "nm-mask")
    text = told(report, "blocks.0.mlp.fc2", "pattern")
    assert text == (
        "It is dense. The reason: the budget keeps it dense. The pass mp-budget decided it: it chose patterns out of "
        "2:4, 1:4, so that 70.0 % of the model's multiply-accumulates are left, by the signal lamp."
    )
    assert "The spectrum decided nothing here: the budget's signal was lamp." in told(
        report, "blocks.0.mlp.fc2", "spectrum"
    )
    by_default = with_passes({"mp-budget": {"macs": 0.7}}, "nm-mask")
    assert MPBudget().signal == "mp"
    assert "by the signal mp." in told(by_default, "blocks.0.attn.qkv", "pattern")


def test_without_a_budget_the_recipe_chose_the_pattern() -> None:
    report = with_passes({"nm-mask": {"pattern": "2:4"}})
    assert "No budget chose layers: nm-mask masks every eligible layer" in told(report, "blocks.0.attn.qkv", "pattern")


def test_passes_that_changed_it_and_a_search_are_told() -> None:
    rows = tuple(PassRecord(name, Effect.LOSSY, 1.0, 0.0, ("blocks.0.mlp.fc2",), ()) for name in ("nm-mask", "restore"))
    tuning = Tuning(1.0, 8, 64, (1,), (Point("2:4", drop=0.1, holds=True), Point("1:4")), "2:4")
    text = told(small_report(passes=rows, tuning=tuning), "blocks.0.mlp.fc2", "pattern")
    assert "Passes that changed the layer or its plan, in order: nm-mask, restore." in text
    assert "The recipe is 2:4, which the search chose from 2 recipes." in text
    assert "Passes" not in told(small_report(passes=rows), "head", "pattern")


def test_int8_says_what_was_quantised_what_ran_and_why_not() -> None:
    report = int8_report()
    assert told(report, "blocks.0.attn.qkv", "format") == (
        "Its weights and inputs are in int8. Rounding its weights costs a relative squared error of 0.07 %. The target "
        "ran it on an 8-bit kernel of mpcompile, NMGemmInt8, 0.1 ms a call."
    )
    assert "ran it in floating point all the same, 0.2 ms a call: its inputs are not quantised." in told(
        report, "blocks.0.mlp.fc1", "format"
    )
    assert told(report, "head", "format") == "It stays in floating point: head is sensitive."
    assert told(small_report(), "head", "format") == ""


def test_what_the_run_did_not_measure_is_said_to_be_unknown() -> None:
    bare = small_report(certificate=None, verdicts=(), idle="there is no GPU")
    assert told(bare, "blocks.0.attn.qkv", "kernel") == (
        "Which kernel runs it on the target ort is unknown: there is no GPU."
    )
    assert "What it costs is unknown" in told(bare, "blocks.0.attn.qkv", "loss")
    without = small_report(verdicts=(), accelerated=False)
    assert told(without, "blocks.0.attn.qkv", "kernel").endswith("no kernel for this pattern. Its zeros save no time.")
    silent = small_report(
        verdicts=(VERDICTS[0].__class__("blocks.0.attn.qkv", "w", "Gemm", "2:4", False, "width", "no"),)
    )
    assert told(silent, "blocks.0.attn.qkv", "kernel") == (
        "Which kernel the target ort runs it on is unknown: no. The rule that decides this is width."
    )


def test_a_shared_weight_is_told_with_the_kernel_of_its_owner() -> None:
    twin = layer("twin", shares_weight_with="blocks.0.attn.qkv")
    report = small_report(layers=(*LAYERS, twin))
    assert "It has the same weight as blocks.0.attn.qkv" in told(report, "twin", "layer")
    assert "sparse kernel NMGemm" in told(report, "twin", "kernel")


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("blocks.0.mlp.fc3", "the nearest are blocks.0.mlp.fc1, blocks.0.mlp.fc2"),
        ("qvk", "the nearest are blocks.0.attn.qkv"),
        ("mpl.fc2", "the nearest are blocks.0.mlp.fc2"),
        ("Head", "the nearest are head"),
        ("blocks.9.*", "the nearest are blocks.0"),
    ],
)
def test_an_unknown_layer_is_refused_with_the_nearest_names(name: str, nearest: str) -> None:
    with pytest.raises(UsageError) as refused:
        layers_named(small_report(), name)
    assert str(refused.value).startswith(f"no layer is called {name!r}; {nearest}")


def test_a_shell_pattern_names_several_layers_and_a_name_with_brackets_itself() -> None:
    assert [row.name for row in layers_named(small_report(), "*.mlp.*")] == ["blocks.0.mlp.fc1", "blocks.0.mlp.fc2"]
    odd = small_report(layers=(dense_layer("a[0]", "x"), *LAYERS))
    assert [row.name for row in layers_named(odd, "a[0]")] == ["a[0]"]


def test_every_layer_has_one_line() -> None:
    assert dict(one_line_each(small_report())) == {
        "stem": "dense: it is the first layer",
        "blocks.0.attn.qkv": "2:4, refit error 1.23 %, 30.0 % of the logit shift, sparse kernel",
        "blocks.0.mlp.fc1": "2:4, refit error 4.56 %, 60.0 % of the logit shift, dense kernel",
        "blocks.0.mlp.fc2": "dense: the budget keeps it dense",
        "head": "dense: it is the last layer",
    }
    assert dict(one_line_each(int8_report()))["head"] == "dense, floating point: it is the last layer"


def test_ranks_and_shares_are_written_plainly() -> None:
    assert [ordinal(n) for n in (1, 2, 3, 4, 11, 12, 13, 21, 22, 101, 111)] == [
        "1st", "2nd", "3rd", "4th", "11th", "12th", "13th", "21st", "22nd", "101st", "111th",
    ]  # fmt: skip
    assert rank(2.0, [1.0, None, 3.0, 2.0]) == "the 2nd largest of 3 layers"
    assert rank(1.0, [1.0]) == "the largest of 1 layer"
    assert rank(3.0, [3.0, 3.0, 1.0]) == "the largest of 3 layers, as 1 other"
    assert [amount(value) for value in (0.0, 1.0, 0.5, 0.0123, 0.00004567)] == [
        "0.0 %", "100.0 %", "50.0 %", "1.23 %", "0.00457 %",
    ]  # fmt: skip
