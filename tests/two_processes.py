"""Started by torchrun in tests/passes/distill/test_distill.py: distils a tiny model, and writes each process's weights
to a folder.
"""

import sys
from pathlib import Path

from safetensors.torch import save_file

from mpcompile.passes import Distill, NMMask, ToMe
from mpcompile.pipeline.pass_manager import PassManager
from mpcompile.system.distributed import process_group
from mpcompile.testing import tiny_data, tiny_vit


def main(folder: Path) -> None:
    """What `compile` and `follow` do, without files."""
    model = tiny_vit()
    data = tiny_data(model)
    step = Distill(epochs=2, batch=16, rate=0.01, warmup=2, accumulate=2, optimizer="sgd")
    with process_group() as here:
        if here.first:
            masks = NMMask(criterion="magnitude", refit="none")
            result, _ = PassManager([masks, ToMe(r=3), step]).run(model, data)
            weights = dict(result.graph.state_dict())
        else:
            followed = step.follow(data.for_passes(), model.source)
            assert followed is not None
            weights = dict(followed.state_dict())
    save_file({n: v.contiguous() for n, v in weights.items()}, folder / f"{here.size}-{here.rank}.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
