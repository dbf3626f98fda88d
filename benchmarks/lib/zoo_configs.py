"""Small configurations of transformers' vision models, shared by zoo_encoders.py and zoo_dense.py."""

from functools import partial
from typing import Any

from torch import nn

from lib.zoo_model import ZooModel

WIDTH = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
VIT = {**WIDTH, "image_size": 64, "patch_size": 16}
DINO = {key: value for key, value in VIT.items() if key != "intermediate_size"}
DEEP = {"num_hidden_layers": 4}
LABELS = {"num_labels": 10}
STAGES = ["stage1", "stage2", "stage3", "stage4"]
SWIN = {"image_size": 64, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
SWIN_4_STAGES = SWIN | {"depths": [1, 1, 1, 1], "num_heads": [1, 2, 2, 4]}
CONVNEXT = {"hidden_sizes": [16, 32, 32, 64], "depths": [1, 1, 2, 1]}
RESNET = {"embedding_size": 16, "hidden_sizes": [16, 32, 32, 64], "depths": [1, 1, 1, 1]}
PYRAMID = {"hidden_sizes": [16, 32, 32, 64], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 2, 4]}


def config(name: str, **arguments: Any) -> Any:
    """A configuration of transformers, by the name of its class without `Config`."""
    import transformers

    return getattr(transformers, f"{name}Config")(**arguments)


def create(name: str, arguments: dict[str, Any]) -> nn.Module:
    """A model of transformers by the name of its class; an argument that can be called makes the value."""
    import transformers

    kind = getattr(transformers, name)
    made = {key: value() if callable(value) else value for key, value in arguments.items()}
    module: nn.Module = kind(kind.config_class(**made))
    return module


def model(name: str, arguments: dict[str, Any], **more: Any) -> ZooModel:
    """The entry of a model class; `more` are ZooModel's other fields."""
    return ZooModel(partial(create, name, arguments), **more)
