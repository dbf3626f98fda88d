"""Which modules are recorded as one call, so that passes find them as layers."""

from torch import nn

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
# Layers that are stored and computed as torch's: their forward only pads or selects a faster branch.
PLAIN_CLASSES = frozenset(
    {
        "torch.nn.modules.linear.Linear",
        "torch.nn.modules.linear.NonDynamicallyQuantizableLinear",
        "torch.nn.modules.conv.Conv2d",
        "timm.layers.linear.Linear",
        "timm.layers.conv2d_same.Conv2dSame",
    }
)
# Norms with an activation behind them, which batch-norm passes know by their class.
NORM_CLASSES = frozenset(
    {
        "timm.layers.norm_act.BatchNormAct2d",
        "timm.layers.norm_act.FrozenBatchNormAct2d",
        "timm.layers.norm_act.SyncBatchNormAct",
        "timm.layers.inplace_abn.InplaceAbn",
    }
)


def class_name(module: nn.Module) -> str:
    """The qualified name of a module's class."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def is_leaf(module: nn.Module) -> bool:
    """Whether a module is recorded as one call: torch.nn's own ones and subclasses that inherit their forward.

    A module with a forward of its own, as tools set it on an instance, is not: it may compute with other weights.
    Containers and torch's transformers are not: their layers are recorded one by one.
    """
    if "forward" in vars(module):
        return False
    if class_name(module) in PLAIN_CLASSES | NORM_CLASSES:
        return True
    defined_in = str(getattr(type(module).forward, "__module__", ""))
    if isinstance(module, CONTAINERS) or defined_in == "torch.nn.modules.transformer":
        return False
    return defined_in.startswith("torch.nn.modules.")
