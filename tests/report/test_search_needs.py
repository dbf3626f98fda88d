"""Which recipe of a search is named for which need."""

from dataclasses import replace

from searches import search_of, tried

from mpcompile.report.search_needs import needs
from mpcompile.report.sentences import last_tried, which_recipe

STRONG, MIDDLE, MILD, MILDEST = (
    tried("strong", 6.0, 2.3), tried("middle", 0.7, 1.4), tried("mild", 0.3, 1.2), tried("mildest", 0.1, 1.1)
)  # fmt: skip
INT8 = tried("int8, static", 0.1, 1.7)


def test_the_chosen_recipe_is_first_and_the_others_are_better_in_some_way() -> None:
    search = search_of(STRONG, MIDDLE, MILD, MILDEST, chosen="middle", references=(INT8,))
    found = needs(search)
    assert [(need.need, need.point.name, need.file) for need in found] == [
        ("the fastest within the limit", "middle", "recipe.yaml"),
        ("the fastest within half of the limit", "mild", "tried/3.yaml"),
        ("the smallest loss", "mildest", "tried/4.yaml"),
        ("the fastest, if the limit may be 6.2", "strong", "tried/1.yaml"),
        ("faster, dense in 8 bits without a mask", "int8, static", None),
    ]
    assert which_recipe(search)[0] == (
        "The fastest within the limit: middle, 1.40 times as fast as dense, drop 0.70 ± 0.20 points (recipe.yaml)."
    )


def test_a_recipe_that_meets_several_needs_is_named_once() -> None:
    assert [need.point.name for need in needs(search_of(MILDEST, chosen="mildest"))] == ["mildest"]


def test_int8_is_named_only_if_it_holds_and_is_surely_faster() -> None:
    for other in (replace(INT8, holds=False), tried("int8, static", 0.1, 1.44), replace(INT8, drop=None, failed="no")):
        found = needs(search_of(MIDDLE, chosen="middle", references=(other,)))
        assert "int8, static" not in [need.point.name for need in found]


def test_if_no_recipe_keeps_the_limit_the_chosen_one_loses_least() -> None:
    worse = tried("worse", 3.0, 1.1)
    found = needs(search_of(worse, STRONG, chosen="worse"))
    assert [(need.need, need.point.name) for need in found] == [
        ("the smallest loss", "worse"),
        ("the fastest, if the limit may be 6.2", "strong"),
    ]


def test_failed_recipes_are_told_as_they_are_tried_and_never_named() -> None:
    failed = replace(MILD, name="broken", drop=None, error=None, speedups=(), failed="no layer takes 3:5")
    search = search_of(MIDDLE, failed)
    assert last_tried(search) == "recipe 2 of at most 12, broken: failed, no layer takes 3:5"
    assert [need.point.name for need in needs(replace(search, chosen="middle"))] == ["middle"]


def test_untimed_and_metric_searches_have_their_own_units() -> None:
    point = replace(MIDDLE, speedups=(), drop=0.01234, error=0.002)
    search = replace(search_of(point, chosen="middle"), batches=(), metric="IoU")
    assert last_tried(search).endswith("2.00 times fewer MACs than dense, IoU 0.01234 ± 0.002 lower, within the limit")
