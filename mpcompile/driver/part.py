"""Captures a model, or the part of it that the recipe names (`submodule`), with the images that it is run on.

For a part, the images of all splits are the inputs that the part gets in the whole model: the model is run up to the
part on each image. Labels are those of the whole model, so they are kept for its comparison alone.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from mpcompile.analysis.macs import macs_of_run
from mpcompile.data.images import NONE, Data, Images, Split
from mpcompile.data.metric import Metric
from mpcompile.data.metric_values import MetricValues
from mpcompile.driver.inputs import captured, data_for, headed, judged, metric_of, read_images, with_samples
from mpcompile.errors import UsageError
from mpcompile.frontend.call_inputs import IMAGES
from mpcompile.frontend.capture import capture, noise
from mpcompile.frontend.load_model import Loaded, Request
from mpcompile.frontend.primary_output import outputs_in_order
from mpcompile.frontend.submodule import parameter_count
from mpcompile.frontend.whole_model import Whole, open_whole
from mpcompile.ir.head import Head, HeadChoice
from mpcompile.ir.model import Model
from mpcompile.ir.source import Source
from mpcompile.measure.metric_comparison import MetricComparison
from mpcompile.measure.whole_comparison import Outputs, compare_whole
from mpcompile.measure.whole_difference import WholeComparison
from mpcompile.recipe.schema import DataChoice, Recipe
from mpcompile.report.part_schema import Part, PartInput

BATCH = 16  # images of a run of the whole model, if its outputs have one row for each image
EXAMPLES = 2  # images of the example that the part is captured with
PART_HEAD = "values"  # the outputs of a part are no answers
OTHERS = 3  # images of the run that shows which inputs change


@dataclass(frozen=True)
class PartImages:
    """The inputs that a part gets for each image of a set. Each access runs the model up to the part."""

    images: Images
    whole: Whole = field(repr=False)

    @property
    def classes(self) -> int:
        return self.images.classes

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        image, label = self.images[index]
        inputs = tuple(one[0] for one in self.whole.part_inputs(_in_type(image[None], self.whole)))
        return (inputs if len(inputs) > 1 else inputs[0]), label


@dataclass(frozen=True)
class OpenPart:
    """A part of a model in the whole model.

    Attributes:
        whole: the model around the part.
        row: the part for the report, without a comparison.
        head: how the whole model's primary output becomes a decision; None if it has no class scores.
        primary: the path of that output.
        held_out: the held-out images of the whole model, with its labels or targets.
        metric: the user's own, of the whole model; None if there is none.
    """

    whole: Whole
    row: Part
    head: Head | None
    primary: str | None
    held_out: Split
    metric: Metric | None = None

    def judged_by(self, metric: Metric | None) -> "OpenPart":
        """The part with a metric of the whole model. Raises UsageError if the held-out images have no targets."""
        return replace(self, metric=metric, held_out=judged(Data(held_out=self.held_out), metric).held_out)

    def compared(self, model: Model) -> Part:
        """The part for the report, with the comparison of the whole models on the held-out images."""
        return self.row.model_copy(update={"whole": self.comparison(model)})

    def comparison(self, model: Model) -> WholeComparison | None:
        """The whole model with the compressed part beside the dense one; None without held-out images."""
        if not len(self.held_out):
            return None
        values: tuple[list[MetricValues], list[MetricValues]] = ([], [])  # of the dense and of the compressed model

        def measured() -> Iterator[Outputs]:
            targets = self.held_out.targets(self._batch)
            for dense, compressed, labels in self.outputs(model):
                if self.metric is not None:
                    goal = next(targets)
                    for found, outputs in zip(values, (dense, compressed), strict=True):
                        found.append(self.metric.of_batch(outputs, goal))
                yield dense, compressed, labels

        found = compare_whole(measured(), self.head, self.held_out.labelled, self.primary)
        if self.metric is None:
            return found
        return replace(found, metric=MetricComparison.between(self.metric.name, *values))

    @property
    def _batch(self) -> int:
        """The images of one run of the whole model."""
        return BATCH if self.whole.by_batch else 1

    def outputs(self, model: Model) -> Iterator[Outputs]:
        """For each batch of held-out images: what the dense model returns, what it returns with the compressed part in
        place, and the labels. A model whose outputs have no row for each image gets one image at a time.
        """
        for images, labels in self.held_out.batches(self._batch):
            images = _in_type(images, self.whole)
            yield self.whole.run(images), self.whole.run_with(model, images), labels


def captured_run(
    loaded: Loaded,
    request: Request,
    data: Any,
    choice: DataChoice,
    head: str,
    submodule: str | None,
) -> tuple[Model, Data, OpenPart | None]:
    """The captured model with its images, and the part that was captured; None stands for the whole model.

    Args:
        loaded: the module and its source.
        request: how to capture it. Its further inputs are those of the whole model, its output that of the part.
        data: the images, as `data_for` takes them; None for none.
        choice: how images are read and divided.
        head: the recipe's head, which is that of the whole model.
        submodule: a shell pattern over names of modules; None for the whole model.

    Raises a MpcompileError.
    """
    if submodule is None:
        dense = captured(loaded, request)
        return dense, data_for(data, dense, choice, head), None
    if request.inputs:
        raise UsageError(
            "--input does not go with --submodule: the part gets its inputs from the model, which runs on images alone"
        )
    given, others = noise(loaded.source.size, EXAMPLES), noise(loaded.source.size, OTHERS, seed=1)
    whole = open_whole(loaded.module, submodule, given, others)
    images = _whole_images(whole, loaded, data, choice, head)
    if len(images.calibration) >= EXAMPLES:  # the part is captured on a run of real images
        given = images.calibration.first(EXAMPLES)
    dense = captured_part(whole, loaded.source, given, request.leaves, request.output_name)
    decides, primary = _decision(whole, whole.run(_in_type(given, whole)), head)
    part = OpenPart(whole, _row(whole, dense, given), decides, primary, images.held_out)
    return dense, _of_part(images, whole, part), part


def judged_run(loaded: Loaded, request: Request, data: Any, recipe: Recipe) -> tuple[Model, Data]:
    """The captured model and its images, with the recipe's metric and head. Raises a MpcompileError."""
    dense, images, part = captured_run(loaded, request, data, recipe.data, recipe.head, recipe.submodule)
    if part is None:
        return headed(dense, judged(images, metric_of(recipe)), recipe.head)
    return headed(dense, images, PART_HEAD)


def captured_part(
    whole: Whole, source: Source, images: Tensor, leaves: tuple[str, ...] = (), primary: str | None = None
) -> Model:
    """The part of a model, captured with the inputs that it gets for these images (b, c, h, w).

    Its layers have the names that they have in the whole model. Its source is that of the whole model: it tells how
    images are preprocessed, and not which inputs the part takes. Raises CaptureError.
    """
    example = whole.part_inputs(_in_type(images, whole))
    model = capture(whole.held_part(), source, example, leaves, primary=primary)
    model = replace(model, around=(whole.layers_before, whole.layers_after))
    whole.require_put_back(model, _in_type(images, whole))
    return model


def _in_type(images: Tensor, whole: Whole) -> Tensor:
    """The images in the type that the whole model computes in."""
    own = next((one.dtype for one in whole.module.parameters() if one.is_floating_point()), images.dtype)
    return images.to(own)


def _whole_images(whole: Whole, loaded: Loaded, data: Any, choice: DataChoice, head: str) -> Data:
    """The images of the whole model, with labels if it returns class scores."""
    if data is None:
        return Data()
    data = with_samples(data, loaded.source, (IMAGES,), choice)
    if isinstance(data, Data):
        return data
    outputs = whole.run(_in_type(noise(loaded.source.size), whole))
    decides, primary = _decision(whole, outputs, head)
    count = 0 if decides is None else _by_name(outputs)[str(primary)].shape[1]
    classes = decides.classes(count) if decides else 0
    return read_images(data, loaded.source, classes, choice, decides is not None and decides.kind == "multilabel")


def _decision(whole: Whole, outputs: Any, head: str) -> tuple[Head | None, str | None]:
    """The whole model's decision and the path of its primary output; None if that has no row of class scores."""
    name, scores = outputs_in_order(outputs, "the model", None).tensors[0]
    if scores.ndim != 2 or not whole.by_batch or head == "values":
        return None, None
    bounded = bool(((scores >= 0) & (scores <= 1)).all())
    try:
        return HeadChoice.parse(head).resolved(scores.shape[1], probabilities=bounded), name
    except ValueError as error:
        raise UsageError(str(error)) from error


def _by_name(outputs: Any) -> dict[str, Tensor]:
    return dict(outputs_in_order(outputs, "the model", None).tensors)


def _of_part(images: Data, whole: Whole, part: OpenPart) -> Data:
    """The inputs of the part in place of the images, without labels."""

    def split(given: Split) -> Split:
        if not len(given):
            return NONE
        return Split(PartImages(given.images, whole), given.order, labelled=False)

    return Data(
        calibration=split(images.calibration),
        held_out=split(images.held_out),
        notes=(*images.notes, part.row.description),
        validation=split(images.validation),
        training=split(images.training),
    )


def _row(whole: Whole, dense: Model, images: Tensor) -> Part:
    """The part for the report."""
    one = _in_type(images[:1], whole)
    part = whole.held_part()
    inputs = whole.part_inputs(one)
    return Part(
        name=whole.call.part,
        kind=type(whole.part).__name__,
        inputs=tuple(
            PartInput(name=name, shape=tuple(example.shape[1:]))
            for name, example in zip(dense.input_names, dense.example_inputs, strict=True)
        ),
        outputs=dense.output_names,
        parameters=parameter_count(whole.part),
        whole_parameters=parameter_count(whole.module),
        macs=macs_of_run(lambda: part(*inputs)),
        whole_macs=macs_of_run(lambda: whole.run(one)),
        time_share=whole.time_share(one),
        images_as_list=whole.images_as_list,
        row_for_each_image=whole.by_batch,
    )
