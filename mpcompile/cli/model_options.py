"""The options that say which model is loaded and how its images are prepared, as types of parameters."""

from typing import Annotated

import typer

from mpcompile.cli.choices import CHANNEL_ORDERS, INTERPOLATIONS, PREPROCESSING, completion, listed
from mpcompile.cli.completed_values import architectures

MODELS = (
    "A weights file, a .pt2 file, a Hugging Face folder, hf:ORG/NAME (downloaded from the hub), timm:NAME, or "
    "pkg.mod:factory."
)
ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help=MODELS)]


ArchOption = Annotated[
    str | None,
    typer.Option(
        "--arch",
        help="Architecture of a weights file: a timm name, hf:CLASS or pkg.mod:factory.",
        autocompletion=architectures,
    ),
]


ArchArgOption = Annotated[
    list[str] | None,
    typer.Option(
        "--arch-arg", metavar="KEY=VALUE", help="Argument for the architecture, such as img_size=384. Can be repeated."
    ),
]


PretrainedOption = Annotated[
    bool, typer.Option("--pretrained", help="With timm:NAME, download the pretrained weights from the hub.")
]


AllowPickleOption = Annotated[
    bool,
    typer.Option(
        "--allow-pickle", help="Load a pickled model. This runs code in the file: use it only for files that you trust."
    ),
]


WeightsKeyOption = Annotated[
    str | None,
    typer.Option(
        "--weights-key",
        metavar="KEY",
        help="Weights to take from a checkpoint that holds several sets, such as ema or state_dict.student.",
    ),
]


InputSizeOption = Annotated[
    str | None, typer.Option("--input-size", metavar="CxHxW", help="Shape of one image, such as 3x224x224.")
]


MeanOption = Annotated[
    str | None, typer.Option("--mean", metavar="M,M,M", help="Per-channel mean of pixels scaled to [0, 1].")
]


StdOption = Annotated[
    str | None,
    typer.Option("--std", metavar="S,S,S", help="Per-channel standard deviation of pixels scaled to [0, 1]."),
]


PreprocessOption = Annotated[
    str | None,
    typer.Option(
        "--preprocess",
        metavar="NAME",
        help=f"Preprocessing of the images: {listed(PREPROCESSING)}; FILE.json; or torchvision:WEIGHTS. "
        "The options below override it.",
        autocompletion=completion(PREPROCESSING),
    ),
]


ResizeOption = Annotated[
    str | None,
    typer.Option(
        "--resize",
        metavar="N|HxW",
        help="Resize images before the centre crop: the shorter side to N pixels, or both sides to HxW.",
    ),
]


CropPctOption = Annotated[
    float | None,
    typer.Option(
        "--crop-pct", help="Resize images to the input's size divided by this, such as 0.875, then crop the centre."
    ),
]


InterpolationOption = Annotated[
    str | None,
    typer.Option(
        "--interpolation",
        help=f"Interpolation of the resize: {listed(INTERPOLATIONS)}.",
        autocompletion=completion(INTERPOLATIONS),
    ),
]


ChannelOrderOption = Annotated[
    str | None,
    typer.Option(
        "--channel-order",
        help=f"Order of the channels that the model takes: {listed(CHANNEL_ORDERS)}. --mean and --std follow it.",
        autocompletion=completion(CHANNEL_ORDERS),
    ),
]


LeafOption = Annotated[
    list[str] | None,
    typer.Option("--leaf", metavar="NAME", help="Record this module as one call. Can be repeated."),
]


InputOption = Annotated[
    list[str] | None,
    typer.Option(
        "--input",
        metavar="NAME=SHAPE",
        help="Input of the model beside the images: its shape without the batch axis, such as mask=224x224, and its "
        "type if that is not float32, such as ids=16:int64. Can be repeated.",
    ),
]


OutputNameOption = Annotated[
    str | None,
    typer.Option(
        "--output-name",
        metavar="NAME",
        help="Output that accuracy, agreement and certificates compare, if the model has several, such as logits.",
    ),
]


SubmoduleOption = Annotated[
    str | None,
    typer.Option(
        "--submodule",
        metavar="PATTERN",
        help="Compress only this part of the model, such as backbone (a shell pattern over module names). The weights "
        "of the whole model are written.",
    ),
]
