"""Unwraps modules of torch.compile and data parallelism, and refuses modules that hold no floating-point weights."""

import logging

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from mpcompile.errors import LoadError
from mpcompile.frontend.plain_copy import copied, wrapped

log = logging.getLogger(__name__)

QUANTIZED_PACKAGES = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized", "torch.nn.quantized", "bitsandbytes")


def plain_module(module: nn.Module, name: str) -> nn.Module:
    """The module without wrappers, in a type that the runtimes compute in. The given module is not changed.

    Wrappers of torch.compile, DataParallel, DistributedDataParallel and AveragedModel compute what the module inside
    computes. If a part of the module is wrapped, a copy without wrappers is returned, whose names have no `_orig_mod`.
    Float64 weights are converted to float32, in a copy, and a warning says so: ONNX Runtime has no float64 convolution.
    Raises LoadError for a quantised module, a TorchScript module, and one without values.
    """
    while (inner := wrapped(module)) is not None:
        module = inner
    if any(wrapped(part) is not None for part in module.modules()):
        module = copied(module)
    _require_float_weights(module, name)
    doubles = [key for key, value in module.named_parameters() if value.dtype == torch.float64]
    if not doubles:
        return module
    log.warning(
        "%s: %d of its parameters are float64 (the first is %s); the model is converted to float32, as runtimes "
        "have no float64 convolutions",
        name,
        len(doubles),
        doubles[0],
    )
    try:
        return copied(module).float()
    except Exception as error:
        raise LoadError(
            f"{name} has float64 weights and cannot be copied; give it in float32: module.float()"
        ) from error


def _require_float_weights(module: nn.Module, name: str) -> None:
    """Raises LoadError if the module is TorchScript or quantised, or if a weight has no values yet."""
    for path, part in module.named_modules():
        where, kind = path or "the module", type(part)
        if isinstance(part, torch.jit.ScriptModule):
            raise LoadError(
                f"{name}: {where} is TorchScript, which torch.fx cannot trace; give the module it was made from"
            )
        if kind.__module__.startswith(QUANTIZED_PACKAGES):
            raise LoadError(
                f"{name} is quantised: {where} is {kind.__module__}.{kind.__name__}, and masks are chosen on "
                "floating-point weights; give the module before quantisation"
            )
    for key, value in [*module.named_parameters(), *module.named_buffers()]:
        if is_lazy(value):
            raise LoadError(f"{name}: {key} has no shape yet; run the module once on a batch before it is returned")
        if value.device.type == "meta":
            raise LoadError(f"{name}: {key} is on the device meta and has no values; load the weights first")
        if value.is_quantized:
            raise LoadError(
                f"{name} is quantised: {key} has the type {str(value.dtype).removeprefix('torch.')}, and masks are "
                "chosen on floating-point weights; give the module before quantisation"
            )
