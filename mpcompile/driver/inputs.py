"""Loads the inputs of a run, a model and images, which are given by a path or in memory."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mpcompile.analysis.output_head import named_output, with_head
from mpcompile.data.dataset_images import load_dataset_images
from mpcompile.data.dataset_name import dataset_named
from mpcompile.data.decode import decode_once, kept_limit
from mpcompile.data.divide import Numbers
from mpcompile.data.given import given_data
from mpcompile.data.images import Data
from mpcompile.data.loading import exists, load_data
from mpcompile.data.metric import Metric
from mpcompile.driver.processor_check import require_same_pixels
from mpcompile.errors import LoadError, UsageError, first_line
from mpcompile.frontend.capture import capture, noise
from mpcompile.frontend.load_model import Loaded, Request, load
from mpcompile.frontend.module_kinds import plain_module
from mpcompile.frontend.preprocessing import assumption, source_of
from mpcompile.ir.head import head_for
from mpcompile.ir.model import Model
from mpcompile.ir.source import Source
from mpcompile.passes.reconstruct.calibration_batches import peak_bytes
from mpcompile.recipe.schema import DataChoice, Recipe
from mpcompile.system.tensor_hashing import state_sha256
from mpcompile.system.user_functions import imported_function, is_function_name, working_folder_importable

EXAMINED_IMAGES = 32  # calibration images whose outputs tell what the outputs are


def loaded_from(model: str | Path | nn.Module | Request) -> tuple[Loaded, Request]:
    """The module with its source, and the request, which says how to capture it. Raises LoadError."""
    if isinstance(model, nn.Module):
        model = plain_module(model, type(model).__name__)
        name = type(model).__name__
        return Loaded(model, source_of(model, name=name, arch=name, sha256=state_sha256(model))), Request(name)
    request = model if isinstance(model, Request) else Request(str(model))
    loaded = load(request)
    if loaded.processor is not None:
        require_same_pixels(loaded.processor, loaded.source)
    return loaded, request


def captured(loaded: Loaded, request: Request) -> Model:
    """The captured model, as the options of a request say. Raises CaptureError."""
    images = noise(loaded.source.size)
    others = {name: spec.example(len(images)) for name, spec in request.inputs.items()}
    return capture(loaded.module, loaded.source, images, request.leaves, inputs=others, primary=request.output_name)


def path_of(given: object) -> Path | None:
    """The path of a model or of images, or None if they are in memory."""
    name = given.model if isinstance(given, Request) else given
    if not isinstance(name, str | Path):
        return None
    dataset = None if isinstance(given, Request) or exists(Path(name)) else dataset_named(str(name))
    return Path(name if dataset is None else dataset.name)


def data_for(data: Any, dense: Model, choice: DataChoice, head: str = "auto") -> Data:
    """The images of a run, divided into splits. Raises LoadError.

    A `Data` is returned, without labels if they do not fit the outputs. Samples, and `pkg.mod:fn`, a function of the
    user that returns them, are described in mpcompile/data/given.py; `wds/…`, `hfds/…`, `hfids/…` and `tfds/…` in
    mpcompile/data/dataset_images.py. Any other path is read as a folder or an .npz file. All but samples get the
    preprocessing of `dense`. `choice` has the numbers of images. None gives empty splits.

    `head` is the one that the recipe asks for; it says how many labels there are. Raises UsageError if it does not fit
    the outputs.
    """
    if data is None:
        return Data()
    dense, _ = with_head(dense, head, None)
    data = with_samples(data, dense.source, dense.input_names, choice)
    if isinstance(data, Data):
        return with_fitting_labels(data, dense)
    logits = dense(dense.example_inputs)
    # Outputs with more axes have no classes.
    decides = head_for(dense.head, logits)
    classes = decides.classes(logits.shape[1]) if logits.ndim == 2 else 0
    return read_images(data, dense.source, classes, choice, decides.kind == "multilabel")


def read_images(data: str | Path, source: Source, classes: int, choice: DataChoice, multilabel: bool) -> Data:
    """The images at a path or of a dataset, preprocessed as `source` says. `classes` is 0 if the outputs are none.

    What exists as a path is read as one, also if its name is that of a dataset. Raises LoadError.
    """
    path = Path(data)
    dataset = None if exists(path) else dataset_named(str(data))
    if dataset is not None:
        images = load_dataset_images(
            dataset,
            source,
            classes,
            Numbers(choice.calibration, choice.validation, choice.held_out, choice.seed),
            classes=Path(choice.classes) if choice.classes is not None else None,
            exif=choice.exif,
            alpha=choice.alpha,
            skip_broken=choice.skip_broken,
        )
        return _with_assumption(images, source)
    images = load_data(
        path,
        source,
        classes,
        choice.calibration,
        choice.held_out,
        choice.seed,
        choice.validation,
        classes=Path(choice.classes) if choice.classes is not None else None,
        exif=choice.exif,
        alpha=choice.alpha,
        skip_broken=choice.skip_broken,
        multilabel=multilabel,
    )
    return _with_assumption(images, source, pixels_only=path.is_file())


def _with_assumption(images: Data, source: Source, pixels_only: bool = False) -> Data:
    """The data with a note if the preprocessing was assumed."""
    assumed = assumption(source, pixels_only=pixels_only)
    return replace(images, notes=(*images.notes, assumed)) if assumed else images


def _called(name: str) -> Any:
    """What a function `pkg.mod:fn` of the user returns. Raises LoadError."""
    function = imported_function(name)
    try:
        with working_folder_importable():
            return function()
    except Exception as error:
        raise LoadError(f"{name} could not be called: {type(error).__name__}: {first_line(error)}") from error


def with_samples(data: Any, source: Source, names: tuple[str, ...], choice: DataChoice) -> str | Path | Data:
    """The splits of samples, or of what `pkg.mod:fn` returns; a path and a `Data` as they are. Raises LoadError.

    `names` are those of the inputs that each sample has.
    """
    if isinstance(data, str | Path) and is_function_name(str(data)) and not Path(data).exists():
        return _from_samples(_called(str(data)), source, names, choice, str(data))
    return data if isinstance(data, str | Path | Data) else _from_samples(data, source, names, choice, "the data")


def _from_samples(given: Any, source: Source, names: tuple[str, ...], choice: DataChoice, name: str) -> Data:
    """The splits of samples; `name` is what errors call them. Raises LoadError."""
    numbers = choice.calibration, choice.validation, choice.held_out, choice.seed
    with working_folder_importable():
        return given_data(given, source, names, *numbers, name)


def metric_of(recipe: Recipe, given: Callable[[Tensor, Any], Any] | None = None) -> Metric | None:
    """The metric that was given or that a recipe names, or None. Its module is imported. Raises LoadError."""
    if given is not None:
        return Metric(getattr(given, "__name__", type(given).__name__), given)
    if recipe.metric is None:
        return None
    return Metric(recipe.metric.partition(":")[2], imported_function(recipe.metric))


def judged(data: Data, metric: Metric | None) -> Data:
    """The data with the metric. Raises UsageError if the held-out images have nothing that it compares outputs with."""
    held_out = data.held_out
    if metric is not None and len(held_out) and not held_out.labelled and not hasattr(held_out.images, "target"):
        raise UsageError(
            f"the metric {metric.name} needs a target for each image, and the images have none; give --data "
            "PKG.MOD:FN, a function that returns (inputs, target) pairs"
        )
    return data.judged_by(metric)


def headed(dense: Model, data: Data, head: str) -> tuple[Model, Data]:
    """The model with its head, and the data with notes on what the outputs are. Raises UsageError."""
    count = min(EXAMINED_IMAGES, len(data.calibration))
    dense, notes = with_head(dense, head, data.calibration.first_inputs(count) if count else None)
    data = replace(data, notes=(*data.notes, *dense.notes, *notes))
    return dense, with_fitting_labels(data, dense)


def with_fitting_labels(data: Data, dense: Model) -> Data:
    """The data, without labels and with a note if the outputs have no decision that one label for each image fits.

    The model has its head.
    """
    head, splits = dense.head, (data.calibration, data.held_out, data.validation, data.training)
    if head is None or not any(split.labelled for split in splits):
        return data
    name = named_output(dense)
    if not head.decides:
        note = f"the labels of the images are not used, as {name} has no decision"
        return _without_labels(replace(data, notes=(*data.notes, note)))
    if dense(dense.example_inputs).ndim > 2:
        note = f"the labels of the images are not used, as {name} has a decision at each position"
        return _without_labels(replace(data, notes=(*data.notes, note)))
    if head.kind != "multilabel" or not data.held_out.labelled:
        return data
    _, labels = next(data.held_out.batches(1))
    if labels.ndim > 1:
        return data
    note = "the images have one class each, and the head is multilabel: accuracy is not measured, and agreement is"
    return _without_labels(replace(data, notes=(*data.notes, note)))


def _without_labels(data: Data) -> Data:
    """The same images, whose labels are not used."""
    names = ("calibration", "held_out", "validation", "training")
    splits = {name: replace(getattr(data, name), labelled=False) for name in names}
    return replace(data, **splits)


def decoded_for(data: Data, dense: Model, output_bytes: int) -> Data:
    """The images of a run, those for calibration and validation decoded once. Raises LoadError.

    Decoded images are kept only in memory that the passes and the output, of `output_bytes`, do not need.
    """
    # A reconstruction holds the values of all calibration images in two graphs. A batch-norm pass holds them in one,
    # and converts them to float64.
    reserved = output_bytes + 4 * len(data.calibration) * peak_bytes(dense)
    return decode_once(data, kept_limit(reserved))
