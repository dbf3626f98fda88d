"""An artifact loaded again: as a module, in ONNX Runtime, as an engine; and what it refuses."""

import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import mpcompile
from mpcompile.driver.artifact import Artifact
from mpcompile.driver.load_artifact import module_of
from mpcompile.errors import BuildError, LoadError, ParityError, RuntimeMissing, UsageError
from mpcompile.frontend.load_model import Request
from mpcompile.frontend.preprocessing import source_of
from mpcompile.ir.parity import relative_difference
from mpcompile.passes import NMMask
from mpcompile.recipe.schema import Recipe
from mpcompile.runtimes import Eager, OnnxRuntime, TensorRT, TensorRTForRTX, native
from mpcompile.runtimes.ort.session import OrtEngine
from mpcompile.testing import TinyMLP

QUICK = Recipe.checked({"target": "eager", "bench": {"batches": [1], "seconds": 0.05}})


class Net(TinyMLP):
    """A module that is given in Python."""

    pretrained_cfg = {"input_size": (1, 8, 8), "mean": (0.5,), "std": (0.5,)}  # noqa: RUF012


class Doubled(Net):
    """A module with the same weights that computes another function."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The artifact of a module given in Python, for target eager."""
    torch.manual_seed(0)
    return mpcompile.compile(Net(), QUICK, passes=[NMMask()], output=tmp_path_factory.mktemp("own") / "out")


def images_for(artifact: Artifact, count: int = 3) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    shape = (count, *artifact.report.model.size)
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


# ---- in the original class


def test_a_timm_model_is_built_anew(artifact: Artifact) -> None:
    module = artifact.load("torch")
    assert type(module).__name__ == "VisionTransformer"
    assert type(module).__module__.startswith("timm.")
    assert not module.training
    stored = load_file(artifact.folder / "model.safetensors")
    assert all(torch.equal(value, stored[name]) for name, value in module.state_dict().items())
    images = images_for(artifact)
    with torch.no_grad():
        found = module(torch.from_numpy(images)).numpy()
    # Float32 in another order of sums: see mpcompile.ir.parity.
    assert relative_difference(artifact.load("onnx")(images), found) < 1e-4


def test_weights_are_loaded_into_a_copy_of_the_given_module(own: Artifact) -> None:
    fresh = Net().train()
    before = {name: value.clone() for name, value in fresh.state_dict().items()}
    module = own.load("torch", model=fresh)
    assert type(module) is Net
    assert (fresh.training, module.training) == (True, False)
    assert all(torch.equal(value, before[name]) for name, value in fresh.state_dict().items())
    stored = load_file(own.folder / "model.safetensors")
    assert all(torch.equal(value, stored[name]) for name, value in module.state_dict().items())
    assert own.load("torch", model=Net().half()).state_dict()["head.weight"].dtype == torch.float16


def test_modules_of_another_class_are_refused(own: Artifact) -> None:
    with pytest.raises(
        UsageError, match=r"the model was a Net, which no report can build by name; pass an instance with model="
    ):
        own.load("torch")
    with pytest.raises(
        LoadError, match=r"does not fit the given Linear: 1 missing: weight.*built with the same arguments"
    ):
        own.load("torch", model=nn.Linear(3, 3, bias=False))
    with pytest.raises(
        ParityError, match=r"Doubled with the compressed weights computes something else than model.onnx"
    ):
        own.load("torch", model=Doubled())


def test_the_original_class_is_refused_if_tokens_are_merged(artifact: Artifact) -> None:
    merging = replace(artifact.exported(artifact.onnx), merges=True)
    with pytest.raises(UsageError, match=r"model.onnx merges tokens, which the original class .* does not do"):
        module_of(artifact.folder / "model.safetensors", artifact.report.model, merging, None, False)


def test_a_function_that_a_report_names_is_not_called(own: Artifact) -> None:
    for text in ("antigravity:geohash", "shutil:rmtree"):
        source = replace(own.report.model, arch=text, arch_args={"path": "."})
        named = Artifact(own.folder, own.report.model_copy(update={"model": source}))
        with pytest.raises(UsageError, match=f"the report names the function {text}, which loading would run"):
            named.load("torch")


class Bomb:
    """An object that runs code when it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (pytest.fail, ("pickled code was run",))


def test_files_that_a_report_names_are_not_opened(artifact: Artifact) -> None:
    arguments = {**(artifact.report.model.arch_args or {}), "checkpoint_path": "/etc/hostname"}
    report = artifact.report.model_copy(update={"model": replace(artifact.report.model, arch_args=arguments)})
    with pytest.raises(UsageError, match="checkpoint_path, which names other files to open"):
        Artifact(artifact.folder, report).load("torch")


def test_no_pickled_code_is_run(artifact: Artifact, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    shutil.copytree(artifact.folder, folder)
    (folder / "model.safetensors").write_bytes(pickle.dumps({"weight": Bomb()}))
    with pytest.raises(LoadError):
        Artifact.open(folder).load("torch")
    with pytest.raises(LoadError):
        Artifact.open(folder).load("torch", model=Net())


def test_arguments_that_json_cannot_hold_are_not_recorded() -> None:
    def recorded(arch_args: dict[str, object] | None) -> object:
        return source_of(nn.Identity(), name="x", arch="x", sha256="", arch_args=arch_args).arch_args

    assert recorded(None) is None
    assert recorded({}) == {}
    assert recorded({"depth": 2, "window": (7, 7)}) == {"depth": 2, "window": [7, 7]}
    assert recorded({"norm_layer": nn.LayerNorm}) is None
    assert Request("x").arch_args == {}


# ---- in ONNX Runtime


def test_the_native_file_is_loaded_if_it_and_the_kernel_are_available(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = images_for(artifact)
    found = artifact.load("onnx", threads=1)
    with_kernel = (artifact.folder / "model.native.onnx").is_file() and native.library() is not None
    assert found.file.name == ("model.native.onnx" if with_kernel else "model.onnx")
    monkeypatch.setattr(native, "library", lambda: None)
    plain = artifact.load("onnx")
    assert plain.file.name == "model.onnx"
    assert plain.is_reference
    # Other kernels sum in another order: see mpcompile.ir.parity.
    assert relative_difference(plain(images), found(images)) < 1e-4


def test_images_of_another_shape_are_refused(artifact: Artifact) -> None:
    engine = artifact.load("onnx")
    with pytest.raises(
        BuildError, match=r"takes images of float32, batch×1×28×28, and could not run float32 of shape \("
    ):
        engine(np.zeros((1, 3, 28, 28), np.float32))


# ---- as an engine


def test_engines_of_several_targets_agree(artifact: Artifact, own: Artifact) -> None:
    images = images_for(artifact)
    engine = artifact.load("engine", threads=1)
    assert isinstance(engine, OrtEngine)
    assert engine.file == artifact.load("onnx").file  # target ort loads the file that was written at compile time
    eager = artifact.load("engine", runtime=Eager())
    again = artifact.load("engine", runtime=OnnxRuntime(), batches=(1,))
    for other in (eager, again):
        assert relative_difference(engine(images), other(images)) < 1e-4  # see mpcompile.ir.parity
    assert own.load("engine", model=Net())(images_for(own)).shape == (3, 10)
    with pytest.raises(UsageError, match="the model was a Net, which no report can build by name"):
        own.load("engine")


def test_a_target_that_does_not_run_is_refused_with_what_is_missing(artifact: Artifact) -> None:
    for runtime in (TensorRT(), TensorRTForRTX()):
        if reason := runtime.missing() or runtime.idle():
            with pytest.raises(RuntimeMissing) as error:
                artifact.load("engine", runtime=runtime)
            assert str(error.value) == f"target {runtime.name} does not run here: {reason}"
            assert error.value.exit_code == 7


def test_arguments_of_other_forms_are_refused(artifact: Artifact) -> None:
    with pytest.raises(UsageError, match=r"load\('onnx'\) takes no model"):
        artifact.load("onnx", model=Net())  # type: ignore[call-overload]
    with pytest.raises(UsageError, match=r"load\('torch'\) takes no runtime, threads"):
        artifact.load("torch", runtime=Eager(), threads=2)  # type: ignore[call-overload]
    with pytest.raises(UsageError, match="target eager: it runs on the threads of the process; leave --threads out"):
        artifact.load("engine", runtime=Eager(), threads=2)
