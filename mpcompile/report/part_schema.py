"""The part of a model that was compressed (--submodule), in report.json and in sentences."""

from pydantic import BaseModel, ConfigDict

from mpcompile.measure.whole_difference import WholeComparison

SHOWN = 4  # outputs in a sentence


class PartInput(BaseModel):
    """An input of the part: its name, and the shape for one image."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    shape: tuple[int, ...]


class Part(BaseModel):
    """The part of a model that was compressed, beside the whole. Everything else in the report is about the part.

    `macs` are multiply-accumulates for one image, `whole_macs` those of the whole model. `time_share` is the share of a
    run of the whole model in PyTorch on the CPU that the part takes, at batch 1. `whole` compares the whole models on
    held-out images; it is None if there are none.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str  # qualified name in the whole model
    kind: str  # its class
    inputs: tuple[PartInput, ...]
    outputs: tuple[str, ...]  # their names, the primary one first
    parameters: int
    whole_parameters: int
    macs: float
    whole_macs: float
    time_share: float
    images_as_list: bool  # whether the whole model takes a list of images instead of a batch
    row_for_each_image: bool  # whether each output of the whole model has one row for each image
    whole: WholeComparison | None = None

    @property
    def shares(self) -> str:
        """The part's shares of the whole model, as words."""
        return (
            f"{self.parameters / self.whole_parameters:.1%} of the parameters, "
            f"{self.macs / self.whole_macs:.1%} of the multiply-accumulates and {self.time_share:.0%} of the time in "
            "PyTorch at batch 1"
        )

    @property
    def description(self) -> str:
        """What was compressed, as a sentence without its period."""
        return (
            f"only the part {self.name} ({self.kind}) is compressed, which has {self.shares} of the whole model; the "
            "other figures are those of this part"
        )

    def sentences(self) -> tuple[str, ...]:
        """What was compressed, and how far the whole model's outputs moved."""
        first = f"{self.description[0].upper()}{self.description[1:]}."
        found = self.whole
        if found is None:
            return (first, "No images were given (--data), so the whole model was not compared.")
        where = f"On {found.images:,} held-out images"
        sentences = [first]
        if found.dense and found.compressed:
            sentences.append(
                f"{where}, top-1 of the whole model is {found.compressed.top1:.2%} with the compressed part and "
                f"{found.dense.top1:.2%} dense."
            )
        if found.metric is not None:
            m = found.metric
            sentences.append(
                f"{where}, {m.name} of the whole model is {m.compressed:.4g} with the compressed part and "
                f"{m.dense:.4g} dense ({m})."
            )
        if found.agreement is not None:
            sentences.append(f"{where}, the whole model gives {found.agreement:.2%} of the dense model's answers.")
        if found.comparable < found.images:
            sentences.append(
                f"{where}, the outputs of the whole model have the dense model's structure for "
                f"{found.comparable:,}; only these are compared as numbers."
            )
        if found.outputs:
            rows = [f"{row.name} {row.relative_error:.2%}" for row in found.outputs[:SHOWN]]
            more = f" and {len(found.outputs) - SHOWN} more" if len(found.outputs) > SHOWN else ""
            order = "" if self.row_for_each_image else ", in the order in which each model returns them"
            sentences.append(f"Relative error of the whole model's outputs{order}: {', '.join(rows)}{more}.")
        return tuple(sentences)
