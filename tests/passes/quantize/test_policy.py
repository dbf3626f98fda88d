"""Which layers are quantised: defaults, shell patterns, tied weights and fetched weights, each with its reason."""

from collections.abc import Mapping

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpcompile.errors import UsageError
from mpcompile.frontend.capture import capture
from mpcompile.ir.model import Model
from mpcompile.passes.quantize.policy import BIAS_APART, WITHIN_MODULE, quantizable
from mpcompile.testing import tiny_cnn, tiny_mlp, tiny_source, tiny_vit

STEM = "stem: it reads the image itself"
HEAD = "output layer: no layer after it could make up for a loss"


def captured(net: nn.Module) -> Model:
    return capture(net.eval(), tiny_source())


def quantised(reasons: Mapping[str, str | None]) -> list[str]:
    return [name for name, reason in reasons.items() if reason is None]


def test_stem_and_head_stay_by_default() -> None:
    assert quantizable(tiny_mlp()) == {"stem": STEM, "hidden": None, "head": HEAD}
    cnn = quantizable(tiny_cnn())
    assert quantised(cnn) == ["body", "depthwise", "grouped", "odd", "widen"]
    vit = quantizable(tiny_vit())
    assert {name: reason for name, reason in vit.items() if reason} == {"patch_embed.proj": STEM, "head": HEAD}
    assert len(quantised(vit)) == 8


@pytest.mark.parametrize("make", [tiny_mlp, tiny_cnn, tiny_vit])
def test_every_layer_is_quantised_or_has_a_reason(make: object) -> None:
    model: Model = make()  # type: ignore[operator]
    reasons = quantizable(model)
    assert list(reasons) == [name for name, _ in model.layers()]
    assert all(reason is None or len(reason) > 10 for reason in reasons.values())


def test_include_and_exclude_are_shell_patterns_and_exclude_wins() -> None:
    model = tiny_mlp()
    assert quantised(quantizable(model, include=["stem"])) == ["stem", "hidden"]
    assert quantised(quantizable(model, include=["*"])) == ["stem", "hidden", "head"]
    reasons = quantizable(model, include=["*"], exclude=["h*"])
    assert reasons == {"stem": None, "hidden": "excluded by 'h*'", "head": "excluded by 'h*'"}


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_a_pattern_that_matches_nothing_is_refused(option: str) -> None:
    text = r"no layer name matches 'blocks\.\*'; the layers are stem, hidden, head"
    with pytest.raises(UsageError, match=text):
        quantizable(tiny_mlp(), **{option: ["blocks.*"]})


class Tied(nn.Module):
    """Two layers that share a weight, and one that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Linear(64, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.twice, self.head = nn.Linear(16, 16), nn.Linear(16, 3)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(F.relu(self.a(F.relu(self.stem(x.flatten(1))))))
        return self.head(self.twice(F.relu(self.b(F.relu(x)))))  # type: ignore[no-any-return]


def test_layers_that_share_a_weight_are_quantised_together_or_not_at_all() -> None:
    model = captured(Tied())
    assert quantised(quantizable(model)) == ["a", "twice", "b"]
    reasons = quantizable(model, exclude=["b"])
    assert quantised(reasons) == ["twice"]
    assert reasons["a"] == "shares its weight with b, which stays in floating point (excluded by 'b')"
    assert reasons["b"] == "excluded by 'b'"


class Odd(nn.Module):
    """Layers whose weights are used in unusual ways."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.fetched, self.apart = nn.Linear(64, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.altered = nn.Linear(16, 16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.register_buffer("mask", torch.zeros(1, 1))
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x.flatten(1)))
        x = F.relu(F.linear(x, self.fetched.weight, self.fetched.bias))
        x = F.relu(F.linear(x, self.apart.weight) + self.apart.bias)
        x = F.relu(F.linear(x, self.altered.weight / self.altered.weight.norm()))
        x = self.attention(x[:, None], x[:, None], x[:, None], attn_mask=self.mask)[0][:, 0]
        return self.head(x)  # type: ignore[no-any-return]


def test_weights_that_are_not_applied_by_their_layer() -> None:
    reasons = quantizable(captured(Odd()))
    assert reasons["fetched"] is None
    assert reasons["apart"] == BIAS_APART
    assert str(reasons["altered"]).startswith("an operator other than linear or convolution uses its weight")
    assert str(reasons["attention"]).endswith("and this one is called with attn_mask")
    assert reasons["attention.out_proj"] == WITHIN_MODULE
    assert list(quantised(reasons)) == ["fetched"]


def test_a_layer_inside_a_module_that_is_kept_whole_stays() -> None:
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.block, self.head = nn.Linear(64, 16), Branching(), nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.block(F.relu(self.stem(x.flatten(1)))))  # type: ignore[no-any-return]

    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.inner(x)) if bool(x.isfinite().all()) else x

    model = capture(Whole().eval(), tiny_source(), leaves=("block",))
    assert quantizable(model) == {"stem": STEM, "block.inner": WITHIN_MODULE, "head": HEAD}


def test_a_constant_branch_stays_and_says_so() -> None:
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query = nn.Parameter(torch.randn(1, 8))
            self.stem, self.of_query, self.head = nn.Linear(64, 16), nn.Linear(8, 16), nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.relu(self.stem(x.flatten(1)) + self.of_query(self.query)))  # type: ignore[no-any-return]

    reasons = quantizable(captured(Constant()))
    assert reasons["of_query"] == "its input does not depend on the image: it computes a constant"
