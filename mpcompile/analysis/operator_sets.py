"""Sets of torch operators and module classes, for graph analyses and graph rewrites.

The target of a torch.fx node is a function object (`call_function`) or a method name (`call_method`). The first part
holds both forms in one set, to be compared with `node.target`. The second part holds names only, to be compared
with a method name or with the `__name__` of a function, so that one entry covers `torch.`, `F.` and `operator.`
functions of that name. In-place variants are members only where they are listed.
"""

import operator

import torch
import torch.nn.functional as F
from torch import nn

# ---- targets: function objects, and method names as strings

ADDITIONS = frozenset({operator.add, operator.iadd, torch.add, "add", "add_"})
MULTIPLICATIONS = frozenset({operator.mul, operator.imul, torch.mul, "mul", "mul_"})
MATRIX_PRODUCTS = frozenset({operator.matmul, torch.matmul, torch.bmm, "matmul", "bmm", "__matmul__"})
MEANS = frozenset({torch.mean, "mean"})

# Without method names: attention_layers.py accepts the name "softmax" only on a `call_method` node, so that a parameter
# of that name does not count; attention.py accepts it on any node.
SOFTMAX_FUNCTIONS = frozenset({F.softmax, torch.softmax})
SOFTMAXES = SOFTMAX_FUNCTIONS | {"softmax"}
ATTENTION_FUNCTIONS = SOFTMAX_FUNCTIONS | {F.scaled_dot_product_attention}
WEIGHT_FUNCTIONS = frozenset({F.linear, F.conv2d, torch.conv2d})  # (input, weight, bias, …)

# Residual tracing inverts a transpose, so it needs both axes among the arguments. Attention matching compares shapes
# instead, so it also takes `mT`, which has no arguments, and `swapaxes`.
AXIS_TRANSPOSES = frozenset({torch.transpose, "transpose"})
TRANSPOSES = AXIS_TRANSPOSES | {"mT", "swapaxes"}
AXIS_PERMUTATIONS = AXIS_TRANSPOSES | {torch.permute, "permute"}

# ---- names: of a function (`__name__`) or of a method

ELEMENTWISE_NAMES = frozenset(
    """
    relu relu_ relu6 gelu silu silu_ hardswish hardswish_ hardsigmoid sigmoid tanh leaky_relu elu mish
    softplus dropout alpha_dropout clamp clamp_ clamp_min hardtanh abs neg exp log sqrt rsqrt pow square
    float half double to type type_as contiguous clone detach add add_ iadd sub sub_ isub rsub mul mul_ imul
    div div_ truediv itruediv addcmul maximum minimum reciprocal
    """.split()  # noqa: SIM905
)
DATA_MOVEMENT_NAMES = frozenset(  # copy or reorder elements and compute nothing
    """
    reshape view flatten unflatten permute transpose movedim swapaxes t roll flip chunk split
    split_with_sizes unbind tensor_split select narrow getitem squeeze unsqueeze expand repeat
    repeat_interleave pixel_shuffle pixel_unshuffle channel_shuffle rot90 split_packed_heads join_heads
    """.split()  # noqa: SIM905
)
RESHAPE_AS_NAMES = frozenset(["reshape_as", "view_as"])  # data movement whose second tensor only lends its shape
SHAPE_QUERY_NAMES = frozenset(["size", "shape", "dim", "numel", "stride"])
CONCATENATION_NAMES = frozenset(["cat", "concat", "stack"])
MATRIX_PRODUCT_NAMES = frozenset(["matmul", "bmm"])  # not `__matmul__`: channel tracing has no rule for that method
REDUCTION_NAMES = frozenset(["mean", "sum", "norm", "amax", "amin", "vector_norm", "var", "std"])
SPATIAL_NAMES = frozenset(  # pooling and resizing along the last two axes
    ["max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d", "interpolate", "boolean_dispatch"]
)

# ---- module classes

EVAL_IDENTITY_MODULES = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d)  # return their input in evaluation mode
ELEMENTWISE_MODULES = (
    nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Sigmoid, nn.Tanh, nn.LeakyReLU,
    nn.ELU, nn.Mish, nn.Softplus, *EVAL_IDENTITY_MODULES,
)  # fmt: skip
SPATIAL_MODULES = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Upsample)
DATA_MOVEMENT_MODULES = (nn.Flatten, nn.Unflatten, nn.PixelShuffle, nn.PixelUnshuffle)
