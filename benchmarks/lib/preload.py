"""Imported once by the server that the processes of isolated.py are forked from: the libraries, and what a first export
to ONNX imports and caches.
"""

import logging
import warnings

import onnxruntime  # noqa: F401
import timm  # noqa: F401
import torch
import torchvision  # noqa: F401
import transformers  # noqa: F401

import mpcompile.export.onnx_export
import mpcompile.passes.nm_mask.nm_mask  # noqa: F401

torch.set_num_threads(1)
logging.disable(logging.WARNING)
warnings.simplefilter("ignore")
torch.onnx.export(torch.nn.Linear(1, 1), (torch.zeros(2, 1),), dynamo=True, verbose=False)
