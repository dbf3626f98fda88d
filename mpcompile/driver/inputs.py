"""Loads the inputs of a run, a model and images, which are given by a path or in memory."""

from dataclasses import replace
from pathlib import Path

from torch import nn

from mpcompile.analysis.output_head import with_head
from mpcompile.data.decode import decode_once, memory_limit
from mpcompile.data.images import Data
from mpcompile.data.loading import load_data
from mpcompile.driver.processor_check import require_same_pixels
from mpcompile.frontend.capture import capture, noise
from mpcompile.frontend.load_model import Loaded, Request, load
from mpcompile.frontend.module_kinds import plain_module
from mpcompile.frontend.preprocessing import assumption, source_of
from mpcompile.ir.head import Head, head_for
from mpcompile.ir.model import Model
from mpcompile.passes.reconstruct.calibration_batches import peak_bytes
from mpcompile.recipe.schema import DataChoice
from mpcompile.system.hashing import state_sha256

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
    return Path(name) if isinstance(name, str | Path) else None


def data_for(data: str | Path | Data | None, dense: Model, choice: DataChoice, head: str = "auto") -> Data:
    """The images of a run, divided into splits. Raises LoadError.

    `data` is returned if it is a `Data`. A path is read as a folder or an .npz file, with the preprocessing of `dense`
    and the numbers of images in `choice`. None gives empty splits.
    `head` is the one that the recipe asks for; it says how many labels there are. Raises UsageError if it does not
    fit the outputs.
    """
    if data is None:
        return Data()
    if isinstance(data, Data):
        return data
    dense, _ = with_head(dense, head, None)
    logits = dense(dense.example_inputs)
    # Outputs with more axes have no classes.
    decides = head_for(dense.head, logits)
    classes = decides.classes(logits.shape[1]) if logits.ndim == 2 else 0
    path = Path(data)
    images = load_data(
        path,
        dense.source,
        classes,
        choice.calibration,
        choice.held_out,
        choice.seed,
        choice.validation,
        classes=Path(choice.classes) if choice.classes is not None else None,
        exif=choice.exif,
        alpha=choice.alpha,
        skip_broken=choice.skip_broken,
        multilabel=decides.kind == "multilabel",
    )
    assumed = assumption(dense.source, pixels_only=path.is_file())
    return replace(images, notes=(*images.notes, assumed)) if assumed else images


def headed(dense: Model, data: Data, head: str) -> tuple[Model, Data]:
    """The model with its head, and the data with notes on what the outputs are. Raises UsageError."""
    count = min(EXAMINED_IMAGES, len(data.calibration))
    dense, notes = with_head(dense, head, data.calibration.first_inputs(count) if count else None)
    data = replace(data, notes=(*data.notes, *dense.notes, *notes))
    return dense, with_fitting_labels(data, dense.head)


def with_fitting_labels(data: Data, head: Head | None) -> Data:
    """The data, without labels and with a note if the head needs several labels per image and there is one class."""
    if head is None or head.kind != "multilabel" or not data.held_out.labelled:
        return data
    _, labels = next(data.held_out.batches(1))
    if labels.ndim > 1:
        return data
    note = "the images have one class each, and the head is multilabel: agreement is measured, and not accuracy"
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
    return decode_once(data, memory_limit(reserved))
