"""TensorRT's log lines and inspector JSON, old and new, complete, truncated and garbled, and the verdicts from them."""

import json

from hypothesis import given
from hypothesis import strategies as st

from mpcompile.export.mask_check import ProvenMask
from mpcompile.measure.layer_verdict import LayerVerdict, tally
from mpcompile.runtimes.tensorrt.layer_verdicts import completed
from mpcompile.runtimes.tensorrt.logs import SparsityLog, dumped, inspected, nodes_in, sparsity_in

# As in NVIDIA/TensorRT issues 4054 and 1403 (8.x), and the developer guide's own example.
OLD = """\
[08/05/2024-12:06:54] [I] [TRT] (Sparsity) Layers eligible for sparse math: MatMul_401, Conv_619 + Relu_620, Conv_626
[08/05/2024] [I] [TRT] (Sparsity) TRT inference plan picked sparse implementation for layers: Conv_619 + Relu_620
[08/05/2024-12:06:55] [I] Engine built in 31.1935 sec.
"""
OLD_NONE = """\
[TensorRT] INFO: (Sparsity) Layers eligible for sparse math: Conv_0
[TensorRT] INFO: (Sparsity) TRT inference plan picked sparse implementation for layers:
[TensorRT] INFO: Total Host Persistent Memory: 160
"""
# TensorRT 10.3 and later; names only at VERBOSE. The pair of lines appears once per round of tactics.
NEW = """\
[V] [TRT] (Sparsity) Found 39 layer(s) eligible to use sparse tactics
[V] [TRT] (Sparsity) Chose 12 layer(s) using sparse tactics
[I] [TRT] (Sparsity) Found 39 layer(s) eligible to use sparse tactics
[I] [TRT] (Sparsity) Chose 0 layer(s) using sparse tactics
"""
NEW_NAMED = """\
(Sparsity) Found 2 layer(s) eligible to use sparse tactics: node_MatMul_1, node_MatMul_2 + node_Add_3
(Sparsity) Chose 1 layer(s) using sparse tactics: node_MatMul_2 + node_Add_3
"""
SPARSE_KERNEL = "sm80_xmma_sparse_gemm_f16f16_f16f32_f32_tn_n_tilesize128x64x64_sptensor16x8x32"
# Written by hand with the keys of 10.x (`Format/Datatype`, `Bindings`) and of 11.x (`Datatype`, `I/O Tensors`).
INSPECTED_10 = json.dumps(
    {
        "Layers": [
            {
                "Name": "node_MatMul_2 + node_Add_3",
                "LayerType": "CaskGemmMatrixMultiply",
                "Inputs": [
                    {"Name": "x", "Dimensions": [8, 197, 384], "Format/Datatype": "Row major linear FP16 format"}
                ],
                "Outputs": [{"Name": "y", "Format/Datatype": "Row major linear FP16 format"}],
                "HasSparseWeights": 1,
                "TacticName": SPARSE_KERNEL,
                "Metadata": "[ONNX Layer: node_MatMul_2]\x1f[ONNX Layer: node_Add_3]",
            }
        ],
        "Bindings": ["images", "logits"],
    }
)
INSPECTED_11 = json.dumps(
    {
        "Layers": [
            {
                "Name": "__myl_FcAdd_myl0_3",
                "LayerType": "gemm",
                "Inputs": [{"Name": "x", "Format": "Linear", "Datatype": "Float"}],
                "Outputs": [{"Name": "y", "Format": "Linear", "Datatype": "Float"}],
                "TacticName": "sm80_xmma_gemm_f32f32_tf32f32_f32",
                "Metadata": "[ONNX Layer: node_MatMul_1]",
            }
        ],
        "I/O Tensors": [{"Name": "images"}],
    }
)


def test_old_lines_are_counted_by_their_names() -> None:
    assert sparsity_in(OLD) == SparsityLog(
        3, ("MatMul_401", "Conv_619 + Relu_620", "Conv_626"), 1, ("Conv_619 + Relu_620",)
    )
    assert sparsity_in(OLD_NONE) == SparsityLog(1, ("Conv_0",), 0, ())


def test_the_last_pair_of_new_lines_is_used() -> None:
    assert sparsity_in(NEW) == SparsityLog(39, (), 0, ())
    named = sparsity_in(NEW_NAMED)
    assert (named.eligible, named.chosen) == (2, 1)
    assert named.chosen_names == ("node_MatMul_2 + node_Add_3",)


def test_a_truncated_log_gives_unknown_and_not_zero() -> None:
    for whole in (OLD, OLD_NONE, NEW_NAMED):
        start = whole.index("(Sparsity)", whole.index("(Sparsity)") + 1)
        end = whole.index("\n", start)
        assert sparsity_in(whole[: end + 1]).chosen is not None
        for cut in range(start, end + 1):  # at every position in the second line, and just before its end
            assert sparsity_in(whole[:cut]).chosen is None


@given(st.data())
def test_garbled_logs_are_parsed_without_errors(data: st.DataObject) -> None:
    text = data.draw(st.sampled_from([OLD, NEW_NAMED]))
    position = data.draw(st.integers(0, len(text)))
    noise = data.draw(st.text(max_size=20))
    found = sparsity_in(text[:position] + noise + text[data.draw(st.integers(position, len(text))) :])
    for count, names in ((found.eligible, found.eligible_names), (found.chosen, found.chosen_names)):
        assert count is None or count >= 0
        assert count is not None or not names


def test_the_inspector_of_10_and_11_is_parsed() -> None:
    [old], [new] = inspected(INSPECTED_10), inspected(INSPECTED_11)
    assert old.onnx == ("node_MatMul_2", "node_Add_3")
    assert old.sparse
    assert old.in_half_precision
    assert new.onnx == ("node_MatMul_1",)
    assert not new.sparse
    assert not new.in_half_precision


def test_without_detailed_profiling_layers_are_names_only() -> None:
    [layer] = inspected('{"Layers": ["Conv_619 + Relu_620"], "Bindings": []}')
    assert layer.onnx == ("Conv_619", "Relu_620")
    assert (layer.kernel, layer.types) == ("", ())
    assert nodes_in("a || b + c") == ("a", "b", "c")


@given(st.integers(0, len(INSPECTED_10) - 1), st.text(max_size=5))
def test_truncated_or_garbled_json_gives_no_layers_or_fewer(cut: int, noise: str) -> None:
    assert inspected(INSPECTED_10[:cut]) == []
    inspected(INSPECTED_10[:cut] + noise + INSPECTED_10[cut:])  # it must not raise


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)
    )
)
def test_any_json_is_parsed_without_errors(content: object) -> None:
    inspected(json.dumps(content))
    inspected(json.dumps({"Layers": content}))
    inspected(json.dumps({"Layers": [{"Name": content, "Inputs": content, "Outputs": content, "TacticName": content}]}))


def test_the_layers_in_the_compilers_log_are_parsed() -> None:
    log = (
        "Name: __myl_Fc_myl0_5, LayerType: gemm, Inputs: [ { Name: a, Dimensions: [8,4], Datatype: Half, Format: x }], "
        "Outputs: [ { Name: b, Datatype: Half }], TacticName: sm80_gemm_mha_v2_0x1, StreamId: 0\n"
        "Name: cut off, LayerType: kgen"
    )
    [layer] = dumped(log)
    assert layer.attention
    assert layer.types == ("Half", "Half")


def mask(layer: str, node: str) -> ProvenMask:
    return ProvenMask(layer, f"{layer}.weight", (node,), "MatMul", 0, "2:4", 4, 8, 16)


def verdict(layer: str, eligible: bool | None = True) -> LayerVerdict:
    return LayerVerdict(layer, f"{layer}.weight", "MatMul", "2:4", eligible, "pattern", "by the rules")


def test_each_layer_gets_its_kernel_its_times_and_its_reason() -> None:
    layers = (*inspected(INSPECTED_10), *inspected(INSPECTED_11))
    times = {"node_MatMul_2 + node_Add_3": 0.02, "__myl_FcAdd_myl0_3": 0.05}
    masks = [mask("one", "node_MatMul_1"), mask("two", "node_MatMul_2")]
    one, two = completed(
        [verdict("one"), verdict("two")],
        masks,
        sparsity_in(NEW_NAMED),
        layers,
        times,
        {"__myl_FcAdd_myl0_3": 0.04},
        layers,
    )
    assert (one.chosen, one.sparse_ms, one.dense_ms) == (False, 0.05, 0.04)
    assert "eligible and did not choose a sparse kernel" in one.reason
    assert (two.chosen, two.kernel, two.dense_ms) == (True, SPARSE_KERNEL, None)
    assert tally([one, two]) == ("2 of 2 masked layers are eligible for sparse kernels by the rules; 1 run on them.")


def test_what_a_log_does_not_report_stays_unknown() -> None:
    masks = [mask("one", "node_MatMul_1")]

    def chosen_and_reason(log: str, eligible: bool | None = True) -> tuple[bool | None, str]:
        [row] = completed([verdict("one", eligible)], masks, sparsity_in(log), (), {}, {})
        return row.chosen, row.reason

    chosen, reason = chosen_and_reason("")
    assert chosen is None
    assert "no line on sparsity" in reason
    chosen, reason = chosen_and_reason(
        "(Sparsity) Found 3 layer(s) eligible to use sparse tactics\n(Sparsity) Chose 2 layer(s) using sparse tactics\n"
    )
    assert chosen is None
    assert "does not name them" in reason
    chosen, reason = chosen_and_reason(NEW)
    assert chosen is False
    assert "none of 39 eligible" in reason
    assert chosen_and_reason(NEW_NAMED, eligible=False) == (
        False,
        "the builder found it eligible and did not choose a sparse kernel",
    )
    assert chosen_and_reason(OLD, eligible=False) == (False, "by the rules")


def test_a_sparse_kernel_is_recognised_by_its_name() -> None:
    [row] = completed(
        [verdict("two")], [mask("two", "node_MatMul_2")], sparsity_in(""), inspected(INSPECTED_10), {}, {}
    )
    assert row.chosen
    assert SPARSE_KERNEL in row.reason
