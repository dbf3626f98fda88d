"""nn.MultiheadAttention becomes Linear layers, and keeps its parameters' names in files; some calls stay whole."""

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from mpcompile.analysis.eligibility import eligible, unsupported_modules
from mpcompile.frontend.capture import capture
from mpcompile.frontend.multihead_attention import decompose_attention, reasons_whole
from mpcompile.frontend.stored_weights import layer_weight, stored_tensor
from mpcompile.ir.model import Model
from mpcompile.ir.pattern import TWO_OF_FOUR
from mpcompile.testing import tiny_source

# What a call gives as query, key and value, and the layers that its projections become.
CALLS = {
    "self": ["in_proj"],
    "cross": ["in_proj_q", "in_proj_kv"],
    "positions": ["in_proj_qk", "in_proj_v"],
    "three": ["in_proj_q", "in_proj_k", "in_proj_v"],
    "widths": ["q_proj", "k_proj", "v_proj"],
}


class Attends(nn.Module):
    def __init__(self, call: str, batch_first: bool = True, bias: bool = True) -> None:
        super().__init__()
        widths = {"kdim": 12, "vdim": 4} if call == "widths" else {}
        self.inner = nn.MultiheadAttention(16, 2, batch_first=batch_first, bias=bias, **widths)
        self.call = call
        if bias:
            nn.init.normal_(self.inner.in_proj_bias)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        inputs = {
            "self": (x, x, x),
            "cross": (x, y, y),
            "positions": (x, x, x * 2),
            "three": (x, y, y * 2),
            "widths": (x, y[..., :12], y[..., :4]),
        }[self.call]
        out: Tensor = self.inner(*inputs)[0]
        return out


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_each_call_becomes_linear_layers(call: str, batch_first: bool, bias: bool) -> None:
    torch.manual_seed(0)
    module = Attends(call, batch_first, bias).eval()
    x, y = torch.randn(3, 5, 16), torch.randn(3, 7, 16)
    x, y = (x, y) if batch_first else (x.transpose(0, 1), y.transpose(0, 1))
    graph = fx.symbolic_trace(module)
    decompose_attention(graph)
    linears = [name for name, part in graph.named_modules() if isinstance(part, nn.Linear)]
    assert linears == [f"inner.{layer}" for layer in (*CALLS[call], "out_proj")]
    # Fused and plain attention sum in another order.
    assert torch.allclose(graph(x, y), module(x, y), atol=1e-5)
    assert torch.allclose(graph(x[:, 0], y[:, 0]), module(x[:, 0], y[:, 0]), atol=1e-5)  # without a batch
    # The original names, from the graph's tensors, and back.
    own = graph.state_dict()
    for name, value in module.state_dict().items():
        found, parts = stored_tensor(name, own, value.shape)
        assert found is not None and torch.equal(found, value), name  # noqa: PT018
        assert set(parts) <= own.keys()
    for name in linears:
        weight = layer_weight(name, module.state_dict())
        assert weight is not None and torch.equal(weight, own[f"{name}.weight"]), name  # noqa: PT018


class Whole(nn.Module):
    """One call of each kind that stays whole."""

    def __init__(self) -> None:
        super().__init__()
        names = ("masked", "padded", "weights", "added", "read", "both", "shared", "sharing", "hooked")
        self.attentions = nn.ModuleDict(
            {name: nn.MultiheadAttention(8, 2, batch_first=True, add_bias_kv=name == "added") for name in names}
        )
        self.attentions["sharing"].in_proj_weight = self.attentions["shared"].in_proj_weight
        self.attentions["hooked"].register_forward_hook(lambda module, args, output: None)
        self.register_buffer("mask", torch.zeros(4, 4))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        parts: dict[str, Any] = dict(self.attentions.items())
        x = parts["masked"](x, x, x, attn_mask=self.mask)[0]
        x = parts["padded"](x, x, x, key_padding_mask=x[..., 0] > 9)[0]
        x = x + parts["weights"](x, x, x)[1].sum()
        x = parts["added"](x, x, x)[0]
        x = parts["read"](x, x, x)[0] + parts["read"].in_proj_weight.sum()
        x = parts["both"](parts["both"](x, x, x)[0], y, y)[0]
        x = parts["sharing"](parts["shared"](x, y, y)[0], y, y)[0]
        out: Tensor = parts["hooked"](x, x, x)[0]
        return out


def test_what_stays_whole_names_its_reason() -> None:
    graph = fx.symbolic_trace(Whole().eval())
    expected = {
        "masked": "is called with attn_mask",
        "padded": "is called with key_padding_mask",
        "weights": "returns attention weights that the model uses",
        "added": "adds a key and a value of its own (add_bias_kv or add_zero_attn)",
        "read": "has parameters that another operator reads",
        "both": "is called as self-attention and as cross-attention",
        "shared": "shares its packed weight with another module",
        "sharing": "shares its packed weight with another module",
        "hooked": "has hooks",
    }
    assert reasons_whole(graph) == {f"attentions.{name}": reason for name, reason in expected.items()}
    nodes = len(graph.graph.nodes)
    decompose_attention(graph)
    assert len(graph.graph.nodes) == nodes
    found = unsupported_modules(Model(graph=graph, example=torch.zeros(1), source=tiny_source()))
    assert found["attentions.masked"].endswith("belongs to no Linear, and this one is called with attn_mask")


class Transformer(nn.Module):
    """torch's own encoder and decoder, on patches of an image."""

    def __init__(self, batch_first: bool, masked: bool = False) -> None:
        super().__init__()
        self.batch_first, self.masked = batch_first, masked
        self.stem = nn.Conv2d(1, 16, 2, 2)
        self.queries = nn.Parameter(torch.randn(3, 16))
        self.body = nn.Transformer(16, 2, 1, 1, 32, batch_first=batch_first)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        tokens, queries = self.stem(x).flatten(2).transpose(1, 2), self.queries.expand(x.shape[0], 3, 16)
        if not self.batch_first:
            tokens, queries = tokens.transpose(0, 1), queries.transpose(0, 1)
        mask = torch.zeros(16, 16) if self.masked else None
        out: Tensor = self.body(tokens, queries, src_mask=mask)
        return self.head(out.mean(1 if self.batch_first else 0))  # type: ignore[no-any-return]


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor")  # torch on batch_first=False
def test_transformers_of_torch_are_masked_layer_by_layer(batch_first: bool) -> None:
    reasons = eligible(capture(Transformer(batch_first), tiny_source()), TWO_OF_FOUR)
    attentions = {
        "encoder.layers.0.self_attn": ["in_proj", "out_proj"],
        "decoder.layers.0.self_attn": ["in_proj", "out_proj"],
        "decoder.layers.0.multihead_attn": ["in_proj_q", "in_proj_kv", "out_proj"],
    }
    for name, layers in attentions.items():
        for layer in layers:
            assert f"body.{name}.{layer}" in reasons
    # Without image: what the decoder's first attention computes from its queries alone.
    constant = {name for name, reason in reasons.items() if reason and "does not depend on the image" in reason}
    assert constant == {
        *(f"body.decoder.layers.0.self_attn.{layer}" for layer in ("in_proj", "out_proj")),
        "body.decoder.layers.0.multihead_attn.in_proj_q",
    }
    assert [name for name, reason in reasons.items() if reason and name not in constant] == ["stem", "head"]


def test_a_mask_of_an_encoder_is_the_reason() -> None:
    reasons = eligible(capture(Transformer(True, masked=True), tiny_source()), TWO_OF_FOUR)
    assert str(reasons["body.encoder.layers.0.self_attn"]).endswith("and this one is called with attn_mask")
    assert reasons["body.encoder.layers.0.self_attn.out_proj"] is None
