"""The names that options accept, each with a short description: for help texts and shell completion.

The tables that define these names (`RUNTIMES`, `PASSES` and the parameters of the passes) import torch, which takes
seconds. Help and completion must answer at once, so the names are repeated here; tests/cli/test_help.py holds them to
those tables.
"""

from collections.abc import Callable, Iterable, Mapping

TARGETS: Mapping[str, str] = {
    "ort": "ONNX Runtime on a CPU",
    "ort-cuda": "ONNX Runtime on an NVIDIA GPU",
    "trt": "TensorRT",
    "rtx": "TensorRT for RTX, which needs no GPU to compile",
    "eager": "PyTorch",
}
PATTERNS: Mapping[str, str] = {  # examples, not all that the option accepts
    "2:4": "half of the weights, on GPUs and CPUs",
    "50%": "half of the weights, in the freest pattern at the speed of 2:4",
    "1:4": "a quarter of the weights",
    "25%": "a quarter of the weights, in the freest pattern",
    "8:16": "half of the weights, less loss than 2:4",
    "16:32": "half of the weights, less loss than 8:16",
    "2:4x4": "four neighbouring rows share one pattern",
    "4:8v8": "each row takes one of 8 patterns in each block",
    "2:4,1:4": "the budget chooses one for each layer",
    "auto": "the budget chooses from the densities that are fast, with --macs",
}
PRECISIONS: Mapping[str, str] = {
    "fp32": "32-bit float",
    "fp16": "16-bit float",
    "bf16": "bfloat16",
    "int8": "8-bit integer, weights and activations",
    "fp8": "8-bit float E4M3, for TensorRT",
}
SIGNALS: Mapping[str, str] = {
    "mp": "Marchenko-Pastur edge",
    "magnitude": "magnitude of the removed weights",
    "std": "standard deviation of the weights",
    "uniform": "the same density everywhere",
    "lamp": "LAMP scores",
    "owl": "outlier-weighted layerwise sparsity",
    "sensitivity": "measured loss on calibration images",
}
DEVICES: Mapping[str, str] = {
    "auto": "a CUDA GPU if there is one",
    "cpu": "the processor",
    "cuda": "a CUDA GPU; cuda:N for one of several",
}
CRITERIA: Mapping[str, str] = {
    "magnitude": "the largest weights",
    "wanda": "weight times input norm",
    "covariance": "second moments of the inputs",
    "joint": "mask and weights selected together",
}
REFITS: Mapping[str, str] = {
    "model": "to the dense model's activations",
    "layer": "to the layer's own dense outputs",
    "none": "no refit",
}
EXIF: Mapping[str, str] = {
    "apply": "turn images by their EXIF orientation",
    "ignore": "read images as stored",
}
ALPHA: Mapping[str, str] = {
    "drop": "keep the stored colour of transparent pixels",
    "white": "put images on white",
    "black": "put images on black",
}
PREPROCESSING: Mapping[str, str] = {
    "imagenet": "ImageNet's mean and deviation, bicubic, centre crop of 0.875",
    "cifar10": "CIFAR-10's mean and deviation, no crop",
    "clip": "OpenAI CLIP's mean and deviation, bicubic",
    "dinov2": "ImageNet's mean and deviation, bicubic, 256 for 224",
}
INTERPOLATIONS: Mapping[str, str] = {
    "nearest": "nearest pixel",
    "bilinear": "PIL's bilinear",
    "bicubic": "PIL's bicubic",
    "lanczos": "PIL's Lanczos",
    "box": "PIL's box",
    "hamming": "PIL's Hamming",
}
CHANNEL_ORDERS: Mapping[str, str] = {"rgb": "red, green, blue", "bgr": "blue, green, red, as OpenCV and Caffe"}
HEADS: Mapping[str, str] = {
    "auto": "by the shape and the name of the output",
    "softmax": "the largest output",
    "sigmoid": "one output against a threshold",
    "multilabel": "each output against a threshold",
    "ordinal": "the number of outputs above a threshold",
    "values": "no decision: maps, boxes, embeddings, depth",
}
PASSES: Mapping[str, str] = {
    "mp-budget": "plan a pattern for each layer",
    "drop-unread-tokens": "compute only the tokens that the head reads after the last attention",
    "permute": "reorder channels",
    "nm-mask": "select and refit weights",
    "tome": "merge tokens",
    "batch-norm": "correct batch-norm statistics",
    "restore": "restore layers to dense",
    "distill": "fine-tune against the dense model",
    "polish": "train against the dense model for some minutes, without labels",
    "confidence": "give back lost confidence by a factor on the logits",
    "scale-migration": "move the spread of activations into the weights after layer norms",
    "quantize": "quantise weights and activations to 8 bits",
    "certify": "prove unchanged predictions",
}
# The metrics of `compare --fail-if`, with their units.
METRICS: Mapping[str, str] = {
    "top1": "right decisions, in per cent",
    "top1_change": "change of top1, in percentage points",
    "top5": "top-5 accuracy, in per cent",
    "metric": "your own metric",
    "metric_change": "change of your own metric",
    "agreement": "same decision as the dense model, in per cent",
    "logit_shift": "largest change of an output of an image, mean",
    "ece": "expected calibration error, from 0 to 1",
    "kl": "divergence from the dense model, in nats",
    "relative_error": "error of outputs that are values, in per cent",
    "cosine": "cosine similarity of outputs that are values",
    "proven": "decisions that are proven unchanged, in per cent",
    "agreement_bound": "least agreement on unseen images, in per cent",
    "speedup": "times as fast as dense",
    "speedup_low": "lower end of the interval of speedup",
    "speedup_int8": "times as fast as the fastest dense int8",
    "speedup_int8_low": "lower end of the interval of speedup_int8",
    "speedup_fp8": "times as fast as the fastest dense fp8",
    "speedup_fp8_low": "lower end of the interval of speedup_fp8",
    "latency_ms": "median time of a call, in milliseconds",
    "size_mb": "the ONNX file that is deployed, in MB",
    "size_ratio": "its size as a multiple of the dense file",
    "macs": "multiply-accumulates left, in per cent",
    "kept": "weights that are not zero, in per cent",
    "masked_layers": "number of masked layers",
    "sparse_layers": "number of layers on sparse kernels",
}


def listed(names: Iterable[str]) -> str:
    """The names as a phrase: `a, b or c`."""
    *first, last = names
    return f"{', '.join(first)} or {last}" if first else last


def completion(choices: Mapping[str, str]) -> Callable[[str], list[tuple[str, str]]]:
    """A completion function for Typer: it returns the choices that begin with the typed text, each with its help."""

    def complete(incomplete: str) -> list[tuple[str, str]]:
        return [(name, text) for name, text in choices.items() if name.startswith(incomplete)]

    return complete
