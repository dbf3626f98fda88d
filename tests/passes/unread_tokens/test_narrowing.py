"""Laws of narrowing, on random graphs: the outputs stay the same, and what is computed is what is read."""

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mpcompile.data.images import Data
from mpcompile.frontend.capture import capture
from mpcompile.ir.model import Model
from mpcompile.passes import DropUnreadTokens
from mpcompile.passes.unread_tokens.axis_read import Read, if_small, union
from mpcompile.passes.unread_tokens.selection import selection_of
from mpcompile.pipeline.pass_manager import PassManager
from mpcompile.testing import assert_same_function, tiny_source

# float64: one product's rounding is below 1e-14 of the outputs, and a wrong token moves them by more than 1e-3.
ROUNDING = 1e-12
TOKENS, WIDTH, HEADS = 16, 8, 2


def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    first, second = x.chunk(2, dim=-1)
    return first, second


def gated(gate: Tensor, x: Tensor) -> Tensor:
    return torch.cat([F.silu(gate) * x, gate], -1)[..., :WIDTH]


# Each takes (n, c) tokens of a batch to tokens of the same shape, in one of the ways that models write it.
TOKENWISE: dict[str, Callable[[Any, Tensor], Any]] = {
    "mlp": lambda m, x: m.linear(F.gelu(m.norm(x))),
    "residual": lambda m, x: x + m.linear(x),
    "scale": lambda m, x: x * m.gamma,
    "positions": lambda m, x: x + m.positions,
    "gated": lambda m, x: gated(*halves(m.wide(x))),
    "functional": lambda m, x: F.layer_norm(F.linear(x, m.linear.weight), (WIDTH,), m.norm.weight, eps=1e-5),
    "by hand": lambda m, x: (x - x.mean(-1, keepdim=True)) * torch.rsqrt(x.var(-1, keepdim=True) + 1e-3),
    "softmax": lambda m, x: F.softmax(x, dim=-1),
    "heads": lambda m, x: m.split(x).transpose(1, 2).flatten(2),
    "asked sizes": lambda m, x: m.linear(x).reshape(x.shape[0], x.shape[1], HEADS, -1).flatten(2),
    "tokens first": lambda m, x: m.linear(x.permute(1, 0, 2)).permute(1, 0, 2).contiguous(),
    "matrix": lambda m, x: x @ m.linear.weight,
    "squeezed": lambda m, x: m.linear(x.unsqueeze(2)).squeeze(2),
    "dropout": lambda m, x: F.dropout(x, 0.5, training=False),
}
MIXING: dict[str, Callable[[Any, Tensor], Any]] = {
    "attention": lambda m, x: x + m.attended(x),
    "softmax by hand": lambda m, x: x + (F.softmax(x @ x.mT, dim=-1) @ m.linear(x)),
    "flipped": lambda m, x: x.flip(1),
    "over tokens": lambda m, x: F.softmax(x, dim=1) + m.linear(x),
    "in place": lambda m, x: m.linear(x).add_(x),
    "rolled": lambda m, x: m.linear(torch.cat([x[:, 3:], x[:, :3]], 1)),
}
READS: dict[str, Callable[[Tensor], Tensor]] = {
    "class token": lambda x: x[:, 0],
    "last": lambda x: x[:, -1],
    "two": lambda x: (x[:, 0] + x[:, 1]) / 2,
    "apart": lambda x: x[:, 1] + x[:, 5],
    "twice": lambda x: x[:, 2] + F.relu(x)[:, 2],
    "slice": lambda x: x[:, 2:5].flatten(1)[:, :WIDTH],
    "every other": lambda x: x[:, 0:6:2].mean(1),
    "selected": lambda x: x.select(1, 3) + x.narrow(1, -14, 2).sum(1),
    "ellipsis": lambda x: x[..., 4, :],
    "nested": lambda x: x[:, 2:8][:, 1],
    "sized": lambda x: x[:, 2 : x.shape[2]][:, 1],
    "mean": lambda x: x.mean(1),
    "all but one": lambda x: x[:, 1:].amax(1),
}


class Stage(nn.Module):
    """Layers for one step of TOKENWISE or MIXING."""

    def __init__(self, step: str) -> None:
        super().__init__()
        self.linear, self.wide, self.norm = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.gamma, self.positions = nn.Parameter(torch.randn(WIDTH)), nn.Parameter(torch.randn(1, TOKENS, WIDTH))
        self.step = (TOKENWISE | MIXING)[step]

    def split(self, x: Tensor) -> Any:
        b, n, _ = x.shape
        return self.linear(x).view(b, n, HEADS, WIDTH // HEADS).transpose(1, 2)

    def attended(self, x: Tensor) -> Any:
        b, n, c = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(b, n, 3, HEADS, c // HEADS).permute(2, 0, 3, 1, 4).unbind(0)
        return self.linear(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c))

    def forward(self, x: Tensor) -> Any:
        return self.step(self, x)


class Stages(nn.Module):
    """16 tokens of width 8 from an image, some steps, and a head on what `read` takes."""

    def __init__(self, steps: list[str], read: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Conv2d(1, WIDTH, 2, 2)
        self.stages = nn.Sequential(*map(Stage, steps))
        self.head = nn.Linear(WIDTH, 3)
        self.read = READS[read]

    def forward(self, x: Tensor) -> Any:
        return self.head(self.read(self.stages(self.embed(x).flatten(2).transpose(1, 2))))


def images(count: int = 3) -> Tensor:
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def dropped(steps: list[str], read: str) -> tuple[Model, Model, str]:
    model = capture(Stages(steps, read).double().eval(), tiny_source())
    result, [record] = PassManager([DropUnreadTokens()]).run(model, Data())
    return model, result, record.notes[0]


@settings(max_examples=40)
@given(
    steps=st.lists(st.sampled_from(sorted(TOKENWISE | MIXING)), min_size=1, max_size=5),
    read=st.sampled_from(sorted(READS)),
)
def test_the_outputs_stay_the_same(steps: list[str], read: str) -> None:
    model, result, note = dropped(steps, read)
    assert_same_function(model.graph, result.graph, images(), ROUNDING)
    if note.startswith("no tokens"):
        assert result.graph.code == model.graph.code


@pytest.mark.parametrize("step", TOKENWISE)
def test_each_tokenwise_operator_is_narrowed(step: str) -> None:
    """The Linear layer before the step computes one token, so the step passed the Read on."""
    model, result, note = dropped(["attention", "residual", step], "class token")
    assert note.startswith("1 of 16 tokens"), note
    assert rows(result)["stages_1_linear"] == 1
    assert_same_function(model.graph, result.graph, images(), ROUNDING)


@pytest.mark.parametrize("step", MIXING)
def test_no_token_is_dropped_in_front_of_an_operator_that_mixes_them(step: str) -> None:
    model, result, _ = dropped(["residual", step, "residual"], "class token")
    assert rows(result)["stages_0_linear"] == TOKENS
    assert rows(result)["stages_2_linear"] == 1
    assert_same_function(model.graph, result.graph, images(), ROUNDING)


@pytest.mark.parametrize(
    ("read", "count"),
    [
        *[(read, 1) for read in ("class token", "last", "twice", "ellipsis", "nested", "sized")],
        *[("two", 2), ("apart", 5), ("slice", 3), ("every other", 5), ("selected", 2)],
        *[(read, TOKENS) for read in ("mean", "all but one")],
    ],
)
def test_the_tokens_computed_are_those_between_the_first_and_the_last_that_is_read(read: str, count: int) -> None:
    model, result, _ = dropped(["attention", "residual"], read)
    assert rows(result)["stages_1_linear"] == count
    assert_same_function(model.graph, result.graph, images(), ROUNDING)


def rows(model: Model) -> dict[str, int]:
    """The tokens that each Linear layer computes, by node. The pass manager has run ShapeProp."""
    nodes = [node for node in model.graph.graph.nodes if node.op == "call_module" and "linear" in str(node.target)]
    return {node.name: node.meta["tensor_meta"].shape[1] for node in nodes}


def test_nodes_that_nothing_reads_do_not_keep_tokens() -> None:
    """PiT reshapes the patch tokens of its last stage back to an image that nothing reads."""

    class Unused(Stages):
        def forward(self, x: Tensor) -> Any:
            tokens = self.stages(self.embed(x).flatten(2).transpose(1, 2))
            tokens[:, 4:].transpose(1, 2).reshape(x.shape[0], WIDTH, 3, 4)
            return self.head(tokens[:, 0])

    model = capture(Unused(["attention", "residual"], "class token").double().eval(), tiny_source())
    result, _ = PassManager([DropUnreadTokens()]).run(model, Data())
    assert rows(result)["stages_1_linear"] == 1
    assert_same_function(model.graph, result.graph, images(), ROUNDING)


def test_a_selection_of_the_batch_starts_no_read() -> None:
    """The batch size is free, so positions along it mean nothing."""
    model = capture(Stages(["residual"], "class token").double().eval(), tiny_source())
    graph = model.graph.graph
    relu = next(node for node in graph.nodes if node.name == "stages_0_linear")
    with graph.inserting_after(relu):
        first = graph.call_function(operator.getitem, (relu, 0))
    first.meta["tensor_meta"] = relu.meta["tensor_meta"]._replace(shape=relu.meta["tensor_meta"].shape[1:])
    found = selection_of(first)
    assert found is not None
    assert found.source_read(None) is None


@given(
    ends=st.lists(st.tuples(st.integers(0, 9), st.integers(1, 9)), min_size=2, max_size=2),
    axes=st.tuples(*[st.integers(1, 2)] * 2),
)
def test_a_union_covers_both_reads(ends: list[tuple[int, int]], axes: tuple[int, int]) -> None:
    one, other = (Read(axis, start, start + count) for axis, (start, count) in zip(axes, ends, strict=True))
    both = union(one, other)
    assert union(one, None) is None
    assert (both is None) == (one.axis != other.axis)
    if both is not None:
        assert both.start <= min(one.start, other.start)
        assert both.stop >= max(one.stop, other.stop)
        assert one.within(both) == slice(one.start - both.start, one.stop - both.start)


def test_more_than_half_of_an_axis_counts_as_all() -> None:
    assert if_small(Read(1, 0, 8), 16) == Read(1, 0, 8)
    assert if_small(Read(1, 0, 9), 16) is None
