"""Short distillation: trains the compressed model on the dense model's outputs, with masks held.

passes/distill/loss.py has the loss, passes/distill/trainer.py the training loop. The defaults are the paper's recipe
for ViT-B (arXiv 2606.02608, Online Resource 2): AdamW with learning rate 1e-5, weight decay 0.01 except on biases,
norms and embeddings, 3 epochs in batches of 32 after 1,000 warm-up steps, RandAugment and random erasing. Few images or
a small model need a higher rate.

Under torchrun, each rank trains on its share of every batch, and all ranks end with the same weights.
"""

import logging
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from torch import Tensor, fx

from mpcompile.data.images import Data, Split
from mpcompile.errors import PassError, UsageError
from mpcompile.ir.head import Head
from mpcompile.ir.model import Model
from mpcompile.ir.results import Epoch
from mpcompile.ir.source import Source
from mpcompile.passes.distill.augmentation import Augmentation
from mpcompile.passes.distill.loss import ElasticNet
from mpcompile.passes.distill.trainer import Objective, Schedule, Training
from mpcompile.passes.distill.training_key import training_key
from mpcompile.pipeline.partial_results import PartialResults
from mpcompile.pipeline.pass_record import Effect
from mpcompile.system.distributed import process_rank

log = logging.getLogger(__name__)

# timm's optimizers whose state consists of tensors only, so that a resumed run ends with the same weights.
OPTIMIZERS = ("adamw", "nadamw", "radam", "lion", "madgrad", "sgd")


@dataclass(frozen=True)
class Distill:
    """Trains the compressed model on labels and on the dense model's outputs; every masked weight stays zero.

    Args:
        alpha: weight of the distillation loss; the loss on labels has 1 − alpha. Without labels, alpha is 1.
        tau: temperature of the distillation loss.
        smoothing: label smoothing.
        epochs: epochs over the training images.
        rate: learning rate after warm-up; then a cosine decay.
        weight_decay: weight decay, except on biases, norms and embeddings.
        optimizer: the optimizer of the training.
        warmup: warm-up steps.
        clip: largest norm of the gradient; None for no limit.
        batch: images per step, over all processes.
        accumulate: number of parts in which a batch is computed.
        precision: number format of the training: fp32, bf16 or fp16, by autocast.
        scale: the smallest share of an image's area that a random crop keeps (passes/distill/augmentation.py).
        flip: probability of a horizontal flip.
        policy: augmentation policy, by timm's name, for images of 3 channels; None for none.
        erasing: probability of random erasing.
        kept_l1: absolute penalty on kept weights.
        kept_l2: squared penalty on kept weights.
        removed_l1: absolute penalty on removed weights, while masks are soft.
        removed_l2: squared penalty on removed weights, while masks are soft.
        soft: share of the training during which removed weights may grow again. They fade to zero by the end of it.
        seed: seed of image order and augmentation.
        workers: processes that load images.
        minutes: minutes between checkpoints.
    """

    name: ClassVar[str] = "distill"
    effect: ClassVar[Effect] = Effect.LOSSY
    requires: ClassVar[tuple[str, ...]] = ()
    shares_work: ClassVar[bool] = True

    alpha: float = 0.5
    tau: float = 2.0
    smoothing: float = 0.1
    epochs: int = 3
    batch: int = 32
    accumulate: int = 1
    rate: float = 1e-5
    weight_decay: float = 0.01
    warmup: int = 1000
    optimizer: str = "adamw"
    clip: float | None = None
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    scale: float = 0.08
    flip: float = 0.5
    policy: str | None = "rand-m9-mstd0.5-inc1"
    erasing: float = 0.25
    kept_l1: float = 0.0
    kept_l2: float = 0.0
    removed_l1: float = 0.0
    removed_l2: float = 0.0
    soft: float = 0.0
    seed: int = 0
    workers: int = 0
    minutes: float = 10.0

    def __post_init__(self) -> None:
        """Raises UsageError for invalid options."""
        positive = ("tau", "epochs", "batch", "accumulate", "rate", "scale")
        for field in positive:
            if not 0 < getattr(self, field) < float("inf"):
                raise UsageError(f"distill: {field} is {getattr(self, field)}; it must be a number above 0")
        for field in (
            "weight_decay",
            "warmup",
            "kept_l1",
            "kept_l2",
            "removed_l1",
            "removed_l2",
            "seed",
            "workers",
            "minutes",
        ):
            if not 0 <= getattr(self, field) < float("inf"):
                raise UsageError(f"distill: {field} is {getattr(self, field)}; it must be a number of 0 or more")
        for field in ("alpha", "smoothing", "scale", "flip", "erasing", "soft"):
            if not 0 <= getattr(self, field) <= 1:
                raise UsageError(f"distill: {field} is {getattr(self, field)}; it must be between 0 and 1")
        if self.clip is not None and not 0 < self.clip < float("inf"):
            raise UsageError(f"distill: clip is {self.clip}; it must be a norm above 0")
        if not self.soft and (self.removed_l1 or self.removed_l2):
            raise UsageError(
                "distill: removed_l1 and removed_l2 have no effect while removed weights are zero; set soft, too"
            )
        if self.optimizer not in OPTIMIZERS:
            raise UsageError(f"distill: optimizer is {self.optimizer!r}; it must be one of {', '.join(OPTIMIZERS)}")
        if not self._augmentation.understood():
            raise UsageError(f"distill: timm knows no augmentation policy {self.policy!r}; try rand-m9-mstd0.5-inc1")

    @property
    def _augmentation(self) -> Augmentation:
        return Augmentation(self.scale, self.flip, self.policy, self.erasing)

    def __call__(self, model: Model, data: Data) -> Model:
        """The trained model, with an Epoch for each epoch. Raises PassError without enough training images."""
        assert model.dense is not None  # the pass manager stores it before the first lossy pass
        images = data.for_training()
        self._require(images)
        if len(images) <= len(data.calibration):
            log.warning(
                "training on the %d calibration images only; for more, give folders train/ and val/", len(images)
            )
        masks = model.masks()
        finished = PartialResults(lambda: self._key(model, images))
        epochs = self._trained(model.graph, model.dense, masks, images, model.source, model.head, finished)
        return replace(model, epochs=(*model.epochs, *epochs))

    def require_inputs(self, model: Model, data: Data) -> None:
        """Raises PassError if the images do not fill a batch, or if the ranks do not divide a batch."""
        self._require(data.for_training())

    def _require(self, images: Split) -> None:
        """Raises PassError if the images do not fill a batch, or if the ranks do not divide a batch."""
        size = process_rank().size
        if not len(images):
            raise PassError("distillation needs training images; give --data")
        if len(images) < self.batch:
            raise PassError(
                f"{len(images)} training images do not fill a batch of {self.batch}; give more, or a smaller batch"
            )
        if self.batch % size:
            raise PassError(
                f"a batch of {self.batch} cannot be divided among {size} processes; give a multiple of {size}"
            )

    def _key(self, model: Model, images: Split) -> str:
        """A key that identifies this training: options, model, dense model, masks and images."""
        return training_key(repr(replace(self, workers=0, minutes=0.0)), model, images)

    def _trained(
        self,
        graph: fx.GraphModule,
        dense: fx.GraphModule,
        masks: dict[str, Tensor],
        images: Split,
        source: Source,
        head: Head | None,
        finished: PartialResults,
    ) -> tuple[Epoch, ...]:
        """Trains the graph in place. Returns a record of each epoch."""
        net = ElasticNet(self.kept_l1, self.kept_l2, self.removed_l1, self.removed_l2)
        training = Training(
            graph,
            dense,
            masks,
            Schedule(**{name: getattr(self, name) for name in Schedule.__dataclass_fields__ if hasattr(self, name)}),
            Objective(self.alpha, self.tau, self.smoothing, net, head),
            images.device,
        )
        return training.run(images, source, self._augmentation, finished)
