"""Operators and modules by what they do to channels."""

from torch import nn

ELEMENTWISE = frozenset(
    """
    relu relu_ relu6 gelu silu silu_ hardswish hardswish_ hardsigmoid sigmoid tanh leaky_relu elu mish
    softplus dropout alpha_dropout clamp clamp_ clamp_min hardtanh abs neg exp log sqrt rsqrt pow square
    float half double to type type_as contiguous clone detach add add_ iadd sub sub_ isub rsub mul mul_ imul
    div div_ truediv itruediv addcmul maximum minimum reciprocal
    """.split()  # noqa: SIM905
)


MOVES = frozenset(
    """
    reshape view flatten unflatten permute transpose movedim swapaxes t roll flip chunk split
    split_with_sizes unbind tensor_split select narrow getitem squeeze unsqueeze expand repeat
    repeat_interleave pixel_shuffle pixel_unshuffle channel_shuffle rot90
    """.split()  # noqa: SIM905
)


REDUCTIONS = frozenset(["mean", "sum", "norm", "amax", "amin", "vector_norm", "var", "std"])
SPATIAL = frozenset(
    ["max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d", "interpolate", "boolean_dispatch"]
)


UNARY_MODULES = (
    nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Sigmoid, nn.Tanh, nn.LeakyReLU,
    nn.ELU, nn.Mish, nn.Softplus, nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d,
)  # fmt: skip


SPATIAL_MODULES = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Upsample)
MOVING_MODULES = (nn.Flatten, nn.Unflatten, nn.PixelShuffle, nn.PixelUnshuffle)
