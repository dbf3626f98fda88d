"""The architectures of benchmarks/capture.py, with random weights: LIBRARY/NAME -> ZooModel.

Building the list imports no library; a model is made when ZooModel.build is called.
"""

from lib import zoo_dense, zoo_encoders, zoo_timm, zoo_torchvision
from lib.zoo_model import ZooModel


def zoo() -> dict[str, ZooModel]:
    """Each architecture by its name."""
    parts = {
        "timm": zoo_timm.models(),
        "torchvision": zoo_torchvision.models(),
        "transformers": {**zoo_encoders.models(), **zoo_dense.models()},
    }
    return {f"{library}/{name}": model for library, models in parts.items() for name, model in models.items()}
