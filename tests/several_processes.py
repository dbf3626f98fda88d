"""Runs passes on tiny models in groups of 1, 2 and 4 processes, and writes each rank's result to a folder.

python several_processes.py FOLDER NAME…
"""

import os
import socket
import sys
import traceback
from pathlib import Path

import torch
from safetensors.torch import save_file

from mpcompile.ir.pattern import NM
from mpcompile.ir.structure import tensors_of
from mpcompile.passes import BatchNorm, Certify, Confidence, Distill, MPBudget, NMMask, Permute, Restore, ToMe
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


def run(name: str, folder: Path) -> None:
    """What `compile` and `follow` do, without files."""
    make, passes = RUNS[name]
    model = make()  # type: ignore[operator]
    with process_group() as here:
        result, _ = PassManager(passes).run(model, tiny_data(model, 200), ranks=True)
    certified = {} if result.certificate is None else {"certificate": torch.tensor(result.certificate.shift_mean)}
    tensors = {**tensors_of(result), **certified}
    kept = {key: value.detach().clone().contiguous() for key, value in tensors.items()}
    save_file(kept, folder / f"{name}-{here.size}-{here.rank}.safetensors")


def ranks(name: str, size: int, folder: Path) -> None:
    """Runs the ranks of a group in forks of this process, which has imported everything. Raises if one fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    children = []
    for rank in range(size):
        child = os.fork()
        if not child:
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            status = 1
            try:
                run(name, folder)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        children.append(child)
    failed = [rank for rank, child in enumerate(children) if os.waitpid(child, 0)[1]]
    if failed:
        raise SystemExit(f"{name}: ranks {failed} of {size} failed")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for given in sys.argv[2:]:
        for count in (1, 2, 4):
            ranks(given, count, Path(sys.argv[1]))
