"""Started by torchrun: runs passes on a tiny model in a process group, and writes each rank's result to a folder."""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from mpcompile.ir.pattern import NM
from mpcompile.passes import BatchNorm, Certify, Confidence, Distill, MPBudget, NMMask, Permute, Restore, ToMe
from mpcompile.pipeline.fingerprint import tensors_of
from mpcompile.pipeline.pass_manager import Pass, PassManager
from mpcompile.system.distributed import process_group
from mpcompile.testing import tiny_cnn, tiny_data, tiny_vit

COMPRESSING = (
    MPBudget(patterns=(NM(2, 4),)),
    Permute(),
    NMMask(),
    BatchNorm(),
    Restore(max_shift=0.1),
    Confidence(),
    Certify(),
)
RUNS: dict[str, tuple[object, tuple[Pass, ...]]] = {
    "distill": (
        tiny_vit,
        (
            NMMask(criterion="magnitude", refit="none"),
            ToMe(r=3),
            Distill(epochs=2, batch=16, rate=0.01, warmup=2, accumulate=2, optimizer="sgd"),
        ),
    ),
    "vit": (tiny_vit, COMPRESSING),
    "cnn": (tiny_cnn, COMPRESSING),
}


def main(run: str, folder: Path) -> None:
    """What `compile` and `follow` do, without files."""
    make, passes = RUNS[run]
    model = make()  # type: ignore[operator]
    with process_group() as here:
        result, _ = PassManager(passes).run(model, tiny_data(model, 200), ranks=True)
    certified = {} if result.certificate is None else {"certificate": torch.tensor(result.certificate.shift_mean)}
    tensors = {**tensors_of(result), **certified}
    name = f"{run}-{here.size}-{here.rank}.safetensors"
    save_file({key: value.detach().clone().contiguous() for key, value in tensors.items()}, folder / name)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
