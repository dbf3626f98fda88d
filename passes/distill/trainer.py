"""The training loop of `distill` and `polish`: steps, masks held, a record of each epoch, and exact resume.

A step depends only on the checkpoint and on its number. The checkpoint holds the weights, the optimizer's moments and
the sums of the epoch; the number determines the order of images, their augmentation, the learning rate and the softness
of masks. So a run that was killed and resumed ends with the same weights as one that was not.

A `Watch` looks at the model after steps, and can end the training. Its state is in the checkpoint, too.

The graph is trained in evaluation mode: no dropout, and fixed batch-norm statistics. So one process computes the same
on a batch as several on their shares of it, up to rounding.
"""

import json
import logging
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn.parallel import DistributedDataParallel

from mpcompile.data.images import Split
from mpcompile.errors import PassError
from mpcompile.ir.batch import primary
from mpcompile.ir.head import Head, head_for
from mpcompile.ir.placement import place
from mpcompile.ir.results import Epoch
from mpcompile.ir.source import Source
from mpcompile.passes.distill.augmentation import Augmentation, Batches, TrainingImages, loader
from mpcompile.passes.distill.loss import ElasticNet, labels_loss, teacher_loss
from mpcompile.passes.distill.parameters import RelativeSteps, used_parameters, weight_decay_groups
from mpcompile.passes.distill.spectra import spectra
from mpcompile.pipeline.partial_results import PartialResults
from mpcompile.system.distributed import all_reduced, broadcast, share
from mpcompile.system.progress import tracked

if TYPE_CHECKING:
    from timm.scheduler import CosineLRScheduler

log = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
WARMUP_START_LR = 1e-6  # share of the learning rate at the first warm-up step


class NotFiniteError(PassError):
    """The loss of a step is not finite."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """Length, learning rate, optimizer and precision of a training; fields as in Distill.

    With `steps`, the training ends after so many steps, and no epoch is recorded. `relative` makes the learning rate
    relative to the size of each weight's row (RelativeSteps); it needs a weight decay of 0.
    """

    epochs: int
    batch: int
    accumulate: int
    rate: float
    weight_decay: float
    warmup: int
    optimizer: str
    clip: float | None
    precision: str
    soft: float
    seed: int
    workers: int
    minutes: float
    steps: int | None = None
    relative: bool = False


@dataclass(frozen=True, slots=True)
class Objective:
    """Weights of the parts of the loss (passes/distill/loss.py)."""

    alpha: float
    temperature: float
    smoothing: float
    net: ElasticNet
    head: Head | None = None  # None: by the number of outputs


@runtime_checkable
class Watch(Protocol):
    """Looks at a training after each of its steps, for example to keep the best weights."""

    @property
    def ended(self) -> bool:
        """Whether the training ends before the next step."""
        ...

    def after_step(self, step: int, graph: fx.GraphModule) -> None:
        """Called after step number `step`, from 1, with the graph, whose weights it must not change."""
        ...

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps of the watch."""
        ...

    def restore(self, kept: Mapping[str, Tensor]) -> None:
        """Takes the state of a checkpoint."""
        ...


class Training:
    """The state of one training. Trains `graph` in place."""

    def __init__(
        self,
        graph: fx.GraphModule,
        teacher: fx.GraphModule,
        masks: Mapping[str, Tensor],
        schedule: Schedule,
        objective: Objective,
        device: torch.device,
    ) -> None:
        from timm.optim import create_optimizer_v2

        self._device, self._schedule, self._objective = device, schedule, objective
        for one in (graph, teacher):
            place(one, device)
        self._graph, self._teacher = graph.eval(), teacher.eval()
        self._masked = [(graph.get_parameter(f"{name}.weight"), mask.to(device)) for name, mask in masks.items()]
        reached = used_parameters(graph)
        for name, parameter in graph.named_parameters():
            parameter.requires_grad_(name in reached)
        self._dtype = next(graph.parameters()).dtype
        groups = weight_decay_groups(graph, schedule.weight_decay)
        self._optimizer = create_optimizer_v2(groups, opt=schedule.optimizer, lr=schedule.rate)
        self._relative = RelativeSteps(graph) if schedule.relative else None
        self._scaler = torch.amp.GradScaler(device.type, enabled=schedule.precision == "fp16")
        self._step = 0
        self._sums = torch.zeros(
            3, dtype=torch.float64, device="cpu"
        )  # over this epoch: loss, loss on labels, distillation loss
        self._epochs: list[Epoch] = []

    def run(
        self,
        images: Split,
        source: Source,
        augmentation: Augmentation,
        finished: PartialResults | None,
        watch: Watch | None = None,
    ) -> tuple[Epoch, ...]:
        """Trains to the end, from the checkpoint in `finished` if there is one. Returns a record of each epoch.

        Raises NotFiniteError if the loss is not finite, PassError if a removed weight is not zero at the end.
        """
        schedule, here = self._schedule, share()
        stored = finished.get("training") if finished is not None and here.first else None
        if kept := broadcast((stored or {}) if here.first else None):
            self._restore(kept)
            if watch is not None:
                watch.restore(_under("watch.", kept))
            log.info("resumed after step %d", self._step)
        epochs = schedule.epochs if schedule.steps is None else -(-schedule.steps // (len(images) // schedule.batch))
        order = Batches(images.order, schedule.batch, epochs, schedule.seed, here, self._step)
        total, saved = schedule.steps or epochs * order.per_epoch, time.monotonic()
        rates = cosine_schedule(self._optimizer, total, min(schedule.warmup, total // 2), schedule.rate)
        model = self._graph if here.size == 1 else DistributedDataParallel(self._graph)
        read = loader(TrainingImages(images, source, augmentation, schedule.seed), order, schedule.workers)
        # The steps come first: with `steps`, the last epoch has more batches.
        for step, (pixels, labels) in zip(tracked(range(self._step, total), "step {}".format), read, strict=False):
            if watch is not None and watch.ended:
                break
            rates.step_update(step)
            answers = labels.to(self._device) if images.labelled else None
            self._train(model, pixels.to(self._device, self._dtype), answers)
            self._step = step + 1
            self._hold_masks(total)
            if schedule.steps is None and self._step % order.per_epoch == 0:
                self._close_epoch(order.per_epoch, images.labelled)
            if watch is not None:
                watch.after_step(self._step, self._graph)
            last = self._step == total or (watch is not None and watch.ended)
            if finished is not None and here.first and (last or time.monotonic() - saved > 60 * schedule.minutes):
                looked = {} if watch is None else {f"watch.{name}": value for name, value in watch.state().items()}
                finished.put("training", {**self._state(), **looked})
                saved = time.monotonic()
        self._require_masks()
        for graph in (self._graph, self._teacher):
            graph.requires_grad_(True)
        return tuple(self._epochs)

    def _train(self, model: nn.Module, pixels: Tensor, labels: Tensor | None) -> None:
        """One optimizer step on one batch, with gradients accumulated over its parts.

        Raises NotFiniteError if the loss is not finite.
        """
        parts = pixels.tensor_split(min(self._schedule.accumulate, len(pixels)))
        answers = [None] * len(parts) if labels is None else labels.tensor_split(len(parts))
        self._optimizer.zero_grad()
        for number, (piece, answer) in enumerate(zip(parts, answers, strict=True), start=1):
            more = number < len(parts)
            waits = model.no_sync() if more and isinstance(model, DistributedDataParallel) else nullcontext()
            with waits:
                losses = self._losses(model, piece, answer)
                share = len(piece) / len(pixels)
                self._scaler.scale(share * losses[0]).backward()
            self._sums += share * losses.detach().double().cpu()
        if not self._sums.isfinite().all():
            raise NotFiniteError(f"the loss is not finite at step {self._step}; try a smaller rate, or precision fp32")
        if self._schedule.clip is not None:
            self._scaler.unscale_(self._optimizer)
            nn.utils.clip_grad_norm_(self._graph.parameters(), self._schedule.clip)
        if self._relative is None:
            self._scaler.step(self._optimizer)
        else:
            self._relative.take(lambda: self._scaler.step(self._optimizer))
        self._scaler.update()

    def _losses(self, model: nn.Module, pixels: Tensor, labels: Tensor | None) -> Tensor:
        """The loss, the loss on labels (0 without labels) and the distillation loss, as a tensor of 3 values."""
        objective, dtype = self._objective, DTYPES[self._schedule.precision]
        single = dtype is torch.float32
        with nullcontext() if single else torch.autocast(self._device.type, dtype):
            logits = primary(model(pixels))
            with torch.no_grad():
                dense = primary(self._teacher(pixels))
        head = head_for(objective.head, dense)
        teacher = teacher_loss(logits, dense, objective.temperature, head)
        answered = teacher.new_zeros(()) if labels is None else labels_loss(logits, labels, objective.smoothing, head)
        alpha = 1.0 if labels is None else objective.alpha
        loss = (1 - alpha) * answered + alpha * teacher
        if objective.net:
            loss = loss + objective.net.of(self._masked)
        return torch.stack([loss, answered, teacher])

    @torch.no_grad()
    def _hold_masks(self, total: int) -> None:
        """Sets removed weights to zero; while masks are soft, fades them, so that they are zero when that phase ends.

        `total` is the number of steps of the training.
        """
        until = self._schedule.soft * total
        for weight, mask in self._masked:
            if self._step < until:
                faded = (until - self._step) / (until - self._step + 1)
                weight.mul_(torch.where(mask, 1.0, faded))
            else:
                weight.masked_fill_(~mask, 0.0)

    def _require_masks(self) -> None:
        """Raises PassError if a removed weight is not zero."""
        broken = sum(int((weight[~mask] != 0).sum()) for weight, mask in self._masked)
        if broken:
            raise PassError(f"{broken} removed weights are not zero after training")

    def _close_epoch(self, steps: int, labelled: bool) -> None:
        """Appends the record of an epoch, with its losses averaged over steps and processes."""
        loss, answered, teacher = (all_reduced(self._sums) / steps / share().size).tolist()
        self._sums.zero_()
        edge, spikes = spectra([weight for weight, _ in self._masked])
        rate = max(group["lr"] for group in self._optimizer.param_groups)
        epoch = Epoch(steps, loss, answered if labelled else None, teacher, rate, edge, spikes)
        self._epochs.append(epoch)
        log.info(
            "epoch %d: loss %.4f, to the teacher %.4f, mean edge %s, %s spikes",
            len(self._epochs),
            loss,
            teacher,
            edge,
            spikes,
        )

    def _state(self) -> dict[str, Tensor]:
        """The content of a checkpoint."""
        moments = {
            f"moment.{index}.{key}": value if isinstance(value, Tensor) else torch.tensor(value)
            for index, values in self._optimizer.state_dict()["state"].items()
            for key, value in values.items()
        }
        scaler = self._scaler.state_dict()
        rest = json.dumps({"step": self._step, "epochs": [asdict(e) for e in self._epochs], "scaler": scaler})
        return {
            **{f"weight.{name}": value for name, value in self._graph.state_dict().items()},
            **moments,
            "sums": self._sums,
            "rest": torch.from_numpy(np.frombuffer(rest.encode(), np.uint8).copy()),
        }

    def _restore(self, kept: Mapping[str, Tensor]) -> None:
        """Restores the state of a checkpoint."""
        self._graph.load_state_dict(_under("weight.", kept))
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in _under("moment.", kept).items():
            index, _, key = name.partition(".")
            state.setdefault(int(index), {})[key] = value
        self._optimizer.load_state_dict({**self._optimizer.state_dict(), "state": state})
        rest = json.loads(bytes(kept["rest"].numpy()))
        self._scaler.load_state_dict(rest["scaler"])
        self._step, self._sums = rest["step"], kept["sums"].clone()
        self._epochs = [Epoch(**epoch) for epoch in rest["epochs"]]


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names start with a prefix, under their names without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def cosine_schedule(optimizer: torch.optim.Optimizer, total: int, warmup: int, rate: float) -> "CosineLRScheduler":
    """The learning-rate schedule by step: linear warm-up, then a cosine."""
    from timm.scheduler import CosineLRScheduler

    return CosineLRScheduler(
        optimizer,
        t_initial=total,
        warmup_t=warmup,
        warmup_lr_init=WARMUP_START_LR * rate,
        warmup_prefix=False,
        t_in_epochs=False,
    )
