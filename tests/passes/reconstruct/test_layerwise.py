"""Layer by layer on pruned inputs: the moments are those of plain forward passes, whatever the graph does."""

import errno
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpcompile.analysis.eligibility import eligible
from mpcompile.analysis.layer_interpreter import LayerInterpreter
from mpcompile.data.images import Data, Split
from mpcompile.errors import LoadError, PassError
from mpcompile.frontend.capture import capture
from mpcompile.ir.model import Model
from mpcompile.ir.pattern import NM
from mpcompile.passes import NMMask
from mpcompile.passes.reconstruct import layerwise as lockstep
from mpcompile.passes.reconstruct.layerwise import TiedWeight, peak_bytes, rewrite_in_order
from mpcompile.passes.reconstruct.second_moments import SecondMoments, columns
from mpcompile.pipeline.partial_results import keeping
from mpcompile.pipeline.pass_manager import PassManager
from mpcompile.system.progress import listening
from mpcompile.testing import Noise, tiny_cnn, tiny_data, tiny_mlp, tiny_source, tiny_vit

HALF = NM(2, 4)


def due(model: Model) -> list[str]:
    return [name for name, reason in eligible(model, HALF).items() if reason is None]


@pytest.mark.parametrize("make", [tiny_mlp, tiny_cnn, tiny_vit])
def test_every_layer_sees_what_the_rewritten_layers_before_it_give(make: object) -> None:
    model: Model = make()  # type: ignore[operator]
    images = tiny_data(model, 40).calibration
    pixels = images.first(40)
    names = due(model)
    order = []

    def rewrite(site: TiedWeight, moments: SecondMoments | None) -> None:
        assert moments is not None
        [name] = site.names
        order.append(name)
        seen: list[Tensor] = []
        with torch.no_grad():  # an independent pass over the model as it now is
            LayerInterpreter(
                model.graph, lambda n, layer, x, y: seen.append(columns(layer, x)) if n == name else None
            ).run(pixels)
            rows = torch.cat(seen, 1).double()
            found = moments.problem(centred=False)
            wanted = rows.mT @ rows / rows.shape[1]
            # Products of one batch are float32.
            torch.testing.assert_close(found.gram, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))
            model.layer(name).weight.mul_(0.5)

    rewrite_in_order(model, images, names, rewrite)
    assert sorted(order) == sorted(names)


def test_wanted_outputs_are_those_of_the_model_as_it_was() -> None:
    model = tiny_vit()
    data = tiny_data(model, 32)
    before = model(data.calibration.first(32))
    result, _ = PassManager([NMMask(HALF)]).run(model, data)
    plain, _ = PassManager([NMMask(HALF, "magnitude", "none")]).run(model, data)
    once, _ = PassManager([NMMask(HALF, sequential=False)]).run(model, data)
    own, _ = PassManager([NMMask(HALF, refit="layer")]).run(model, data)

    def off(other: Model) -> float:
        return float((other(data.calibration.first(32)) - before).square().mean())

    assert off(result) < off(own) < 0.2 * off(plain)
    assert off(once) < 0.2 * off(plain)


def test_the_mean_output_of_a_convolution_without_bias_is_put_into_its_norm() -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.conv = nn.Conv2d(1, 16, 3), nn.Conv2d(16, 32, 1, bias=False)
            self.norm, self.head = nn.BatchNorm2d(32), nn.Linear(32, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.norm(self.conv(F.relu(self.stem(x)))))
            return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]

    model = capture(Normed().eval(), tiny_source())
    data = tiny_data(model, 48)
    result, _ = PassManager([NMMask(NM(1, 4))]).run(model, data)
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> object:
        return lambda module, args, output: seen.update({name: output})

    with torch.no_grad():
        for side, graph in (("dense", model.graph), ("masked", result.graph)):
            graph.get_submodule("norm").register_forward_hook(keep(side))  # type: ignore[arg-type]
            graph(data.calibration.first(48))
    means = [seen[side].mean((0, 2, 3)) for side in ("dense", "masked")]
    torch.testing.assert_close(means[0], means[1], rtol=1e-4, atol=1e-5)


def test_a_weight_used_twice_gets_one_mask_from_all_its_inputs() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.body, self.head = nn.Linear(64, 32), nn.Linear(32, 32), nn.Linear(32, 4)
            self.tied = nn.Linear(32, 32)
            self.tied.weight = self.body.weight

        def forward(self, x: Tensor) -> Tensor:
            x = F.gelu(self.body(F.gelu(self.stem(x.flatten(1)))))
            return self.head(F.gelu(self.tied(F.gelu(self.body(x)))))  # type: ignore[no-any-return]

    model = capture(Twice(), tiny_source())
    data = tiny_data(model, 32)
    result, _ = PassManager([NMMask(HALF)]).run(model, data)
    assert torch.equal(result.plan["body"].mask, result.plan["tied"].mask)  # type: ignore[arg-type]
    assert result.layer("body").weight is result.layer("tied").weight
    assert torch.equal(result.layer("body").bias, model.layer("body").bias)  # type: ignore[arg-type]


def test_beit_which_fetches_its_weights_is_calibrated_too() -> None:
    from timm.models.beit import Beit

    beit = Beit(img_size=16, patch_size=4, in_chans=1, num_classes=5, embed_dim=32, depth=2, num_heads=2)
    model = capture(beit.eval(), tiny_source((1, 16, 16)))
    data = tiny_data(model, 32)
    result, _ = PassManager([NMMask(HALF)]).run(model, data)
    plain, _ = PassManager([NMMask(HALF, "magnitude", "none")]).run(model, data)
    wanted = model(data.calibration.first(32))
    off = [float((m(data.calibration.first(32)) - wanted).square().mean()) for m in (result, plain)]
    assert result.plan["blocks.0.attn.qkv"].relative_error is not None
    assert off[0] < off[1]


def test_images_that_are_not_numbers_are_named() -> None:
    model = tiny_mlp()

    class Bad(Noise):
        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            image, label = super().__getitem__(index)
            return image * float("nan") if index == 21 else image, label

    images = Split(Bad((1, 8, 8), 32), tuple(range(32)), labelled=True)
    with pytest.raises(LoadError, match="calibration image 21 holds numbers that are not finite"):
        PassManager([NMMask(HALF)]).run(model, Data(images))


def test_images_that_are_all_alike_leave_a_sound_model() -> None:
    model = tiny_cnn()
    images = Split(Noise((1, 8, 8), 1), (0,) * 20, labelled=True)
    result, _ = PassManager([NMMask(HALF)]).run(model, Data(images))
    assert result(model.example).isfinite().all()


def test_more_than_memory_holds_is_refused_before_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_vit()
    monkeypatch.setattr(lockstep, "available_bytes", lambda: 2 * 10 * int(peak_bytes(model)))
    with pytest.raises(PassError, match=r"calibration on 64 images holds .* GiB at once.*at most 10 images"):
        PassManager([NMMask(HALF)]).run(model, tiny_data(model))


def test_peak_bytes_count_what_is_alive_at_once() -> None:
    model = tiny_mlp()
    # At the widest place, the 64 pixels and their flattened copy.
    assert peak_bytes(model) == 4 * (64 + 64)


@pytest.mark.parametrize(
    ("step", "text"),
    [
        (NMMask(HALF, "wanda"), "the criterion wanda needs calibration images; give --data"),
        (NMMask(HALF, refit="model"), "the refit to the model needs calibration images"),
    ],
)
def test_what_needs_images_says_so(step: NMMask, text: str) -> None:
    with pytest.raises(PassError, match=text):
        PassManager([step]).run(tiny_mlp(), Data())


def test_finished_layers_are_taken_up(tmp_path: Path) -> None:
    model = tiny_vit()
    data = tiny_data(model, 32)
    whole, _ = PassManager([NMMask(HALF)]).run(model, data)
    kept = tmp_path / "kept"

    class StopError(Exception):
        pass

    def stop_at_fifth(label: str, done: int, count: int) -> None:
        if done == 5:
            raise StopError

    with pytest.raises(PassError, match="StopError"), keeping(kept), listening(stop_at_fifth):
        PassManager([NMMask(HALF)]).run(model, data)
    [run] = kept.iterdir()
    finished = sorted(path.name for path in run.iterdir())
    assert len(finished) == 5
    stamps = {path.name: path.stat().st_mtime_ns for path in run.iterdir()}
    # Another pass, and other images, find nothing there.
    with pytest.raises(PassError), keeping(kept), listening(stop_at_fifth):
        PassManager([NMMask(HALF, damping=0.5)]).run(model, data)
    assert len(list(kept.iterdir())) == 2
    with keeping(kept):
        again, _ = PassManager([NMMask(HALF)]).run(model, data)
        assert {name: (run / name).stat().st_mtime_ns for name in finished} == stamps
    for name, value in whole.graph.state_dict().items():
        assert torch.equal(value, again.graph.state_dict()[name]), name


@pytest.mark.parametrize("full", ["reserve", "write"])
def test_a_disk_without_room_for_finished_layers_is_no_failure(
    full: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, written = tiny_vit(), Path.write_bytes
    whole, _ = PassManager([NMMask(HALF)]).run(model, tiny_data(model, 16))

    def third_fails(path: Path, content: bytes) -> int:
        if len(list(path.parent.glob("*.safetensors"))) == 2:
            written(path, content[:10])
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return written(path, content)

    if full == "write":
        monkeypatch.setattr(Path, "write_bytes", third_fails)
    with keeping(tmp_path / "kept", reserve_bytes=1 << 60 if full == "reserve" else 0):
        result, _ = PassManager([NMMask(HALF)]).run(model, tiny_data(model, 16))
    for name, value in whole.graph.state_dict().items():
        assert torch.equal(value, result.graph.state_dict()[name]), name
    [line] = caplog.messages
    assert line.startswith("results of this pass are no longer saved (")
    kept = [path.suffix for path in (tmp_path / "kept").rglob("*.*")]
    assert kept == ([".safetensors"] * 2 if full == "write" else [])


def test_a_killed_process_leaves_only_whole_layers(tmp_path: Path) -> None:
    """SIGKILL in the middle, as from an out-of-memory killer; what is kept can be read."""
    code = (
        "from pathlib import Path\n"
        "from mpcompile.passes import NMMask\n"
        "from mpcompile.pipeline.pass_manager import PassManager\n"
        "from mpcompile.pipeline.partial_results import keeping\n"
        "from mpcompile.testing import tiny_data, tiny_vit\n"
        "model = tiny_vit()\n"
        f"with keeping(Path({str(tmp_path / 'kept')!r})):\n"
        "    while True:\n"
        "        PassManager([NMMask()]).run(model, tiny_data(model))\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code])
    kept = tmp_path / "kept"
    deadline = time.monotonic() + 60
    while not list(kept.glob("run-*/*.safetensors")) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    model = tiny_vit()
    with keeping(kept):
        result, _ = PassManager([NMMask()]).run(model, tiny_data(model))
    fresh, _ = PassManager([NMMask()]).run(model, tiny_data(model))
    state = fresh.graph.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in result.graph.state_dict().items())


def test_the_given_model_and_images_are_left_alone() -> None:
    model = tiny_cnn()
    data = tiny_data(model, 16)
    before = replace(model, graph=model.graph)(model.example).clone()
    PassManager([NMMask(HALF)]).run(model, data)
    assert torch.equal(model(model.example), before)
