"""The sections of a recipe: images, benchmark, gates and search. The description of each key is its comment in YAML."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

MAX_BATCH = 65536  # upper bound of a dynamic batch in the exported file
MAX_THREADS = 4096


class Strict(BaseModel):
    """Base of the frozen models of a recipe: an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class DataChoice(Strict):
    """How many images are used for what, and how folders of images are read. The seed decides which images."""

    calibration: Annotated[
        int, Field(ge=1, description="Number of images that passes take statistics from and fit on.")
    ] = 256
    validation: Annotated[
        int,
        Field(
            ge=0,
            description="Number of training images on which passes choose between results. Nothing is fitted on them.",
        ),
    ] = 256
    held_out: Annotated[
        Annotated[int, Field(ge=1)] | None,
        Field(description="Number of images to evaluate on. No pass that changes the model sees them. null: all."),
    ] = None
    examples: Annotated[
        int,
        Field(
            ge=0,
            le=100,
            description="Number of held-out images whose prediction changed that the report shows, as thumbnails.",
        ),
    ] = 8
    seed: Annotated[int, Field(ge=0, description="Seed of the choice of images.")] = 0
    classes: Annotated[
        str | None, Field(description="Path of a file with the output of each class folder. null: in order of names.")
    ] = None
    exif: Annotated[
        Literal["apply", "ignore"],
        Field(description="Whether image files are turned by their EXIF orientation, or read as stored."),
    ] = "apply"
    alpha: Annotated[
        Literal["drop", "white", "black"],
        Field(description="Transparent pixels keep their stored colour, or are put on white or black."),
    ] = "drop"
    skip_broken: Annotated[
        bool, Field(description="Whether image files that cannot be decoded are left out and counted.")
    ] = False


class BenchOptions(Strict):
    """How latency is measured: the batch sizes, the seconds of timing for each, and the number of CPU threads."""

    batches: Annotated[
        tuple[Annotated[int, Field(ge=1, le=MAX_BATCH)], ...],
        Field(description="Batch sizes to time, and to build for if the batch size is free."),
    ] = (1, 8)
    seconds: Annotated[
        float, Field(gt=0, allow_inf_nan=False, description="Seconds of timing for each batch size.")
    ] = 4.0
    threads: Annotated[
        Annotated[int, Field(ge=1, le=MAX_THREADS)] | None,
        Field(description="Threads of the runtime. null: its own choice."),
    ] = None


class Gates(Strict):
    """Limits of the result on held-out images. If one does not hold, the command fails.

    The exit code is 6 for `max_drop`, `max_ece` and `max_kl`, 7 for `engine`.
    """

    max_drop: Annotated[
        Annotated[float, Field(ge=0, allow_inf_nan=False)] | None,
        Field(description="Largest drop of top-1 in percentage points, or of the metric in its units. null: no limit."),
    ] = None
    max_ece: Annotated[
        Annotated[float, Field(ge=0, allow_inf_nan=False)] | None,
        Field(description="Largest rise of the expected calibration error (0 to 1) over dense. null: no limit."),
    ] = None
    max_kl: Annotated[
        Annotated[float, Field(ge=0, allow_inf_nan=False)] | None,
        Field(description="Largest divergence from the dense model's probabilities, mean, in nats. null: no limit."),
    ] = None
    dense: Annotated[
        bool, Field(description="With max_drop, whether to fail if the dense model's own accuracy cannot be right.")
    ] = True
    engine: Annotated[
        bool,
        Field(description="Whether the target must build an engine on this machine. If not, a checked file is enough."),
    ] = False

    @property
    def on_outputs(self) -> bool:
        """Whether any limit is on the outputs for held-out images."""
        return any(limit is not None for limit in (self.max_drop, self.max_ece, self.max_kl))


class Tune(Strict):
    """A search for the fastest recipe whose top-1 drop is within `gates.max_drop`, from this recipe to milder ones.

    mpcompile/driver/recipe_search.py defines the candidates.
    """

    evaluations: Annotated[int, Field(ge=1, description="Largest number of recipes tried.")] = 8
