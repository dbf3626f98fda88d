"""The operators that a .pt2 program may call.

The list is explicit. `torch.ops.aten` alone is no limit: `aten.from_file` creates a file of any name. Operators with
random results, with memory that nothing wrote, and with addresses of their own (as_strided, empty, set_) are left out.
"""

import math
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch

from mpcompile.frontend.exported.refusal import ProgramRefused, shown

ATEN = frozenset(
    """
    _adaptive_avg_pool2d _assert_async _assert_scalar _assert_tensor_metadata _log_softmax _safe_softmax
    _native_batch_norm_legit_no_training _shape_as_tensor _softmax _to_copy _unsafe_index _unsafe_view
    _upsample_bicubic2d_aa _upsample_bilinear2d_aa _weight_norm _weight_norm_interface abs acos acosh
    adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d add addcdiv
    addcmul addmm affine_grid_generator alias all amax amin aminmax any arange arccos arcsin arctan argmax argmin
    argsort asin asinh atan atan2 atanh atleast_1d atleast_2d atleast_3d avg_pool1d avg_pool2d avg_pool3d baddbmm
    batch_norm bitwise_and bitwise_left_shift bitwise_not bitwise_or bitwise_right_shift bitwise_xor bmm
    broadcast_tensors broadcast_to bucketize cat cdist ceil celu channel_shuffle chunk clamp clamp_max clamp_min
    clip clone col2im complex concat concatenate conj constant_pad_nd contiguous conv1d conv2d conv3d
    conv_transpose1d conv_transpose2d conv_transpose3d convolution copy copysign cos cosh cosine_similarity
    count_nonzero cross cummax cummin cumprod cumsum deg2rad detach detach_copy diag diag_embed diagonal diff div
    divide dot dropout dsplit einsum elu embedding  eq erf erfc erfinv exp exp2 expand expand_as expm1 eye
    feature_alpha_dropout feature_dropout fft_fft fft_fft2 fft_fftfreq fft_fftn fft_fftshift fft_ifft fft_ifft2
    fft_ifftn fft_ifftshift fft_irfft fft_irfft2 fft_irfftn fft_rfft fft_rfft2 fft_rfftfreq fft_rfftn fill flatten
    flip fliplr flipud floor floor_divide fmax fmin fmod frac full full_like gather ge gelu glu greater
    greater_equal grid_sampler grid_sampler_2d group_norm gt hardshrink hardsigmoid hardswish hardtanh heaviside
    hsplit hstack hypot im2col imag index index_add index_copy index_fill index_put index_select inner instance_norm
    inverse is_nonzero isclose isfinite isinf isnan isneginf isposinf kron kthvalue layer_norm le leaky_relu lerp
    less less_equal lift_fresh_copy linalg_cross linalg_inv linalg_matrix_norm linalg_norm linalg_vector_norm linear
    linspace log log10 log1p log2 log_sigmoid log_softmax logaddexp logaddexp2 logical_and logical_not logical_or
    logical_xor logit logspace logsumexp lt mT masked_fill masked_scatter masked_select matmul max max_pool1d
    max_pool2d max_pool2d_with_indices max_pool3d maximum mean median meshgrid min minimum mish mm moveaxis movedim
    mul multiply mv nan_to_num nanmean nansum narrow native_group_norm native_layer_norm ne neg negative new_full
    new_ones new_zeros nonzero nonzero_numpy norm not_equal numpy_T one_hot ones ones_like outer pad
    pairwise_distance permute pixel_shuffle pixel_unshuffle polar positive pow prelu prod rad2deg ravel real
    reciprocal reflection_pad1d reflection_pad2d reflection_pad3d relu relu6 remainder repeat repeat_interleave
    replication_pad1d replication_pad2d replication_pad3d reshape reshape_as resolve_conj resolve_neg rms_norm roll
    rot90 round rsqrt rsub scalar_tensor scaled_dot_product_attention scatter scatter_add scatter_reduce
    searchsorted select select_scatter selu sigmoid sign silu sin sinc sinh size slice slice_scatter softmax
    softplus softshrink sort split split_with_sizes sqrt square squeeze stack std std_mean sub subtract sum swapaxes
    swapdims sym_constrain_range sym_constrain_range_for_size sym_numel sym_size sym_storage_offset sym_stride t
    take take_along_dim tan tanh tensor_split threshold tile to topk transpose tril triu true_divide trunc type_as
    unbind unflatten unfold unsafe_chunk unsafe_split unsafe_split_with_sizes unsqueeze upsample_bicubic2d
    upsample_bilinear2d upsample_linear1d upsample_nearest1d upsample_nearest2d upsample_trilinear3d var var_mean
    vdot view view_as view_as_complex view_as_real vsplit vstack where xlogy zeros zeros_like
    """.split()  # noqa: SIM905
)
WRITING = frozenset(  # in-place variants of the above
    """
    add_ addcmul_ addcdiv_ alias_ bitwise_and_ bitwise_or_ ceil_ clamp_ clamp_max_ clamp_min_ copy_ cos_ detach_
    div_ dropout_ elu_ exp_ fill_ floor_ hardsigmoid_ hardswish_ hardtanh_ index_add_ index_copy_ index_fill_
    index_put_ leaky_relu_ lerp_ log_ logical_and_ logical_not_ logical_or_ masked_fill_ masked_scatter_ mish_ mul_
    neg_ pow_ reciprocal_ relu6_ relu_ round_ rsqrt_ scatter_ scatter_add_ selu_ sigmoid_ silu_ sin_ sqrt_ square_
    squeeze_ sub_ tanh_ threshold_ transpose_ tril_ triu_ unsqueeze_ zero_
    """.split()  # noqa: SIM905
)
# Arithmetic on sizes, by the names that torch writes.
ON_SIZES: Mapping[str, Callable[..., Any]] = {
    **{
        f"_operator.{name}": getattr(operator, name)
        for name in (
            "add", "sub", "mul", "floordiv", "truediv", "mod", "pow", "neg", "pos", "eq", "ne", "lt", "le", "gt", "ge",
            "and_", "or_",
        )
    },
    "math.trunc": math.trunc,
    **{
        target: getattr(torch, name)
        for name in ("sym_not", "sym_int", "sym_float", "sym_ite", "sym_max", "sym_min", "sym_sum")
        for target in (f"torch.{name}", f"torch.fx.experimental.symbolic_shapes.{name}")
        if hasattr(torch, name)
    },
}  # fmt: skip
# Operators that run a part of the graph in another mode, with the position of that part among their arguments, and that
# of the argument that must be False: autocast computes in another type.
GROUPS: Mapping[str, tuple[int, int | None]] = {
    "torch.ops.higher_order.wrap_with_set_grad_enabled": (1, None),
    "torch.ops.higher_order.wrap_with_autocast": (4, 2),
}
ATEN_TARGET = re.compile(r"torch\.ops\.aten\.([a-zA-Z_]\w{0,60})\.([a-zA-Z_]\w{0,60})", re.ASCII)


def allowed_operator(target: object) -> Callable[..., Any]:
    """The operator of a call target. Raises ProgramRefused, before anything is looked up, if it is not on the list."""
    if not isinstance(target, str):
        raise ProgramRefused(f"calls {shown(target)}; the name of an operator is needed")
    if target in ON_SIZES:
        return ON_SIZES[target]
    found = ATEN_TARGET.fullmatch(target)
    if found is None or found[1] not in ATEN | WRITING or found[2] == "out" or found[2].endswith("_out"):
        raise ProgramRefused(f"calls {shown(target)}, which is not on the list of operators that a program may call")
    packet = getattr(torch.ops.aten, found[1], None)
    overload = getattr(packet, found[2], None) if packet is not None and found[2] in packet.overloads() else None
    if not isinstance(overload, torch._ops.OpOverload):
        raise ProgramRefused(f"calls {shown(target)}, which torch {torch.__version__} does not have")
    return overload
