"""Models of transformers: folders of save_pretrained, their classes and weights, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hugging_face_models import CONFIGS, LABELS, hugging_face, needs_transformers, saved
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mpcompile.errors import LoadError, RuntimeMissing, UsageError
from mpcompile.frontend import hugging_face as hf
from mpcompile.frontend.load_model import Request, load
from mpcompile.frontend.preprocessing import source_of

pytestmark = needs_transformers
VIT = "ViTForImageClassification"


def answers(module: nn.Module, seed: int = 3) -> Tensor:
    """The first output of a model on two images."""
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        found: Tensor = module(images)[0]
    return found


def edited(folder: Path, **changes: Any) -> Path:
    """The folder with keys of its config.json changed; None removes a key."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return folder


@pytest.mark.parametrize("name", list(CONFIGS))
def test_a_folder_gives_the_same_model(tmp_path: Path, name: str) -> None:
    module = hugging_face(name)
    loaded = load(Request(str(saved(tmp_path, module))))
    assert type(loaded.module) is type(module)
    assert torch.allclose(answers(loaded.module), answers(module), rtol=1e-4, atol=1e-5)
    assert (loaded.source.arch, loaded.source.size, loaded.source.std) == (f"hf:{name}", (3, 32, 32), (0.25,) * 3)
    assert (loaded.source.preprocessing, loaded.source.resize, loaded.source.assumed) == ("recorded", (32, 32), ())
    assert loaded.source.labels == (tuple(LABELS.values()) if "For" in name else ())


@pytest.mark.parametrize("name", [VIT, "SwinForImageClassification", "CLIPVisionModel", "ViTModel"])
def test_the_report_rebuilds_the_model(tmp_path: Path, name: str) -> None:
    """The weights of the modules and the recorded class and config are enough, without the folder."""
    loaded = load(Request(str(saved(tmp_path / "given", hugging_face(name)))))
    (tmp_path / "out").mkdir()
    save_file(loaded.module.state_dict(), tmp_path / "out" / "model.safetensors")
    args = json.loads(json.dumps(loaded.source.arch_args))
    again = load(Request(str(tmp_path / "out" / "model.safetensors"), arch=loaded.source.arch, arch_args=args))
    assert torch.equal(answers(again.module), answers(loaded.module))


@pytest.mark.parametrize("safetensors", [True, False])
def test_shards(tmp_path: Path, safetensors: bool) -> None:
    module = hugging_face(VIT)
    saved(tmp_path, module, max_shard_size="40kB")
    if not safetensors:
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        for path in list(tmp_path.glob("*.safetensors")):
            torch.save(load_file(path), path.with_suffix(".bin"))
            path.unlink()
        index["weight_map"] = {k: v.replace(".safetensors", ".bin") for k, v in index["weight_map"].items()}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        (tmp_path / "model.safetensors.index.json").unlink()
    first = load(Request(str(tmp_path)))
    assert torch.allclose(answers(first.module), answers(module), rtol=1e-4, atol=1e-5)
    shard = next(path for path in sorted(tmp_path.iterdir()) if path.suffix in (".safetensors", ".bin"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x01")
    if safetensors:
        assert load(Request(str(tmp_path))).source.sha256 != first.source.sha256
    shard.unlink()
    with pytest.raises(LoadError, match=r"lists model-00001-of-\d+.*, which is not beside it; copy all \d+ files"):
        load(Request(str(tmp_path)))


def test_a_pickled_file_of_weights(tmp_path: Path) -> None:
    module = hugging_face(VIT)
    saved(tmp_path, module)
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    assert torch.allclose(answers(load(Request(str(tmp_path))).module), answers(module), rtol=1e-4, atol=1e-5)
    torch.save({"classifier": module}, tmp_path / "pytorch_model.bin")
    with pytest.raises(LoadError, match="holds pickled code"):
        load(Request(str(tmp_path)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_are_loaded_in_float32(tmp_path: Path, dtype: torch.dtype, caplog: pytest.LogCaptureFixture) -> None:
    loaded = load(Request(str(saved(tmp_path, hugging_face(VIT).to(dtype)))))
    assert {value.dtype for value in loaded.module.parameters()} == {torch.float32}
    assert ("are float64" in caplog.text) == (dtype == torch.float64)


def test_missing_weights_are_named_and_never_random(tmp_path: Path) -> None:
    """Transformers only warns, and fills them with random numbers."""
    state = load_file(saved(tmp_path, hugging_face(VIT)) / "model.safetensors")
    kept = {name: value for name, value in state.items() if name != "classifier.weight"}
    save_file(kept | {"vit.embeddings.cls_token": torch.zeros(1, 1, 8)}, tmp_path / "model.safetensors")
    with pytest.raises(
        LoadError,
        match=r"does not fit hf:ViTForImageClassification: 1 missing: classifier.weight; 1 of another shape: "
        r"vit.embeddings.cls_token \(1, 1, 8\) against \(1, 1, 32\). transformers would fill these with random",
    ):
        load(Request(str(tmp_path)))


def test_weights_that_are_not_used_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = load_file(saved(tmp_path, hugging_face(VIT)) / "model.safetensors")
    save_file(state | {"decoder.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    load(Request(str(tmp_path)))
    assert "does not use 1 weights: decoder.weight" in caplog.text


def test_a_backbone_without_its_pooler(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """DINO's checkpoints are ViTModels without a pooler, which transformers fills with random numbers."""
    folder = saved(tmp_path, hugging_face(VIT))
    loaded = load(Request(str(folder), arch="hf:ViTModel"))
    assert "has no weights of the pooler, so ViTModel was built without it" in caplog.text
    assert loaded.module.pooler is None
    assert loaded.source.arch_args is not None
    assert loaded.source.arch_args["add_pooling_layer"] is False


def test_the_vision_part_of_clip(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from transformers import CLIPConfig, CLIPModel

    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = CLIPConfig(
        text_config=small | {"vocab_size": 50, "max_position_embeddings": 8, "projection_dim": 16},
        vision_config=small | {"image_size": 32, "patch_size": 8, "projection_dim": 16},
        projection_dim=16,
    )
    clip = CLIPModel(config).eval()
    saved(tmp_path, clip)
    with pytest.raises(LoadError, match="takes text and images.*vision part: --arch hf:CLIPVisionModel or"):
        load(Request(str(tmp_path)))
    loaded = load(Request(str(tmp_path), arch="hf:CLIPVisionModel"))
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        wanted = clip.vision_model(images).pooler_output
        assert torch.allclose(loaded.module(images).pooler_output, wanted, rtol=1e-4, atol=1e-5)
    assert "23 tensors outside 'vision_model' are not used: logit_scale, text_model" in caplog.text
    assert loaded.source.size == (3, 32, 32)


@pytest.mark.parametrize("own_names", [True, False])
def test_a_checkpoint_of_lightning_for_a_class(tmp_path: Path, own_names: bool) -> None:
    """Weights under the names of today's modules, or under those of older versions, which files still have."""
    module = hugging_face(VIT)
    saved(tmp_path / "folder", module)
    state = module.state_dict() if own_names else load_file(tmp_path / "folder" / "model.safetensors")
    content = {"state_dict": {f"model.{name}": value for name, value in state.items()} | {"loss.weight": torch.ones(4)}}
    torch.save(content, tmp_path / "last.ckpt")
    args = json.loads((tmp_path / "folder" / "config.json").read_text())
    loaded = load(Request(str(tmp_path / "last.ckpt"), arch=f"hf:{VIT}", arch_args=args))
    assert torch.allclose(answers(loaded.module), answers(module), rtol=1e-4, atol=1e-5)


def test_code_in_a_folder_is_not_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    saved(tmp_path, hugging_face(VIT))
    mark = tmp_path / "ran"
    (tmp_path / "modeling_own.py").write_text(f"open({str(mark)!r}, 'w').close()\nclass OwnViT: pass\n")
    code = {"AutoModel": "modeling_own.OwnViT", "AutoConfig": "modeling_own.OwnViT"}
    edited(tmp_path, auto_map=code)
    loaded = load(Request(str(tmp_path)))
    assert (
        "brings code of its own (auto_map), which was not run; hf:ViTForImageClassification is that of" in caplog.text
    )
    assert loaded.source.arch_args is not None
    assert "auto_map" not in loaded.source.arch_args
    edited(tmp_path, architectures=["OwnViT"], model_type="own")
    with pytest.raises(LoadError, match=r"hf:OwnViT is not in transformers .*own code \(auto_map\) was not run"):
        load(Request(str(tmp_path)))
    assert not mark.exists()


@pytest.mark.parametrize(
    ("changes", "kind", "text"),
    [
        ({"architectures": ["BertForMaskedLM"]}, LoadError, "takes text, and mpcompile compresses models of images"),
        ({"architectures": ["ViTForImageClasification"]}, UsageError, "did you mean 'ViTForImageClassification'"),
        ({"architectures": ["AutoModel"]}, UsageError, "has no model class 'AutoModel'"),
        ({"architectures": None}, UsageError, "names no class in its architectures; name it, such as --arch hf:ViT"),
        (
            {"quantization_config": {"quant_method": "gptq"}},
            LoadError,
            r"quantised weights \(quantization_config: gptq",
        ),
        ({"hidden_size": "wide"}, LoadError, "transformers cannot build hf:ViTForImageClassification from this config"),
        ({"num_hidden_layers": 3}, LoadError, "does not fit hf:ViTForImageClassification: 16 missing: vit.layers.2"),
        ({"checkpoint_path": "/etc/passwd"}, LoadError, "gives checkpoint_path '/etc/passwd', which names other files"),
        ({"backbone": "hf-hub:org/name"}, LoadError, "gives backbone 'hf-hub:org/name', which names other files"),
    ],
)
def test_configs_that_are_refused(tmp_path: Path, changes: dict[str, Any], kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=text):
        load(Request(str(edited(saved(tmp_path, hugging_face(VIT)), **changes))))


def test_a_kernel_of_the_hub_is_not_fetched(tmp_path: Path) -> None:
    """`attn_implementation` may name code on the hub; attention is torch's own instead."""
    names = {"_attn_implementation": "org/kernel", "attn_implementation": "org/kernel"}
    loaded = load(Request(str(edited(saved(tmp_path, hugging_face(VIT)), **names))))
    config: Any = loaded.module.config
    assert config._attn_implementation == "sdpa"


def test_folders_without_weights_of_a_model(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"is a folder without model.safetensors; give one that save_pretrained wrote"):
        load(Request(str(tmp_path)))
    (tmp_path / "a.pt").touch()
    with pytest.raises(LoadError, match=r"is a folder without model.safetensors; name one of the files in it: a.pt"):
        load(Request(str(tmp_path)))
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(LoadError, match=r"holds an adapter \(PEFT\).*merge_and_unload"):
        load(Request(str(tmp_path)))


def test_preprocessing_beside_the_weights(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = saved(tmp_path, hugging_face(VIT), size=None)
    source = load(Request(str(folder))).source
    assert (source.size, source.assumed) == ((3, 32, 32), ("mean", "std", "interpolation", "crop_pct"))
    processor = {"do_normalize": True, "image_mean": [0.1] * 3, "image_std": [0.2] * 3, "do_pad": True, "size": 32}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    with pytest.raises(LoadError, match=r"preprocessor_config.json: do_pad is not supported.*--preprocess"):
        load(Request(str(folder)))
    assert load(Request(str(folder), preprocess="imagenet")).source.mean == (0.485, 0.456, 0.406)


def test_grey_images(tmp_path: Path) -> None:
    folder = saved(tmp_path, hugging_face(VIT, num_channels=1))
    source = load(Request(str(folder))).source
    assert (source.size, source.mean) == ((1, 32, 32), (0.5,))


def test_transformers_is_named_where_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved(tmp_path, hugging_face(VIT))
    monkeypatch.setattr(hf, "missing", lambda: hf.INSTALL)
    with pytest.raises(RuntimeMissing, match=r"transformers is not installed: pip install 'mpcompile\[hf\]'"):
        load(Request(str(folder)))


def test_a_folder_of_timm(example: Path) -> None:
    assert load(Request(str(example))).source.labels[0] == "t-shirt"


def test_a_module_given_in_python_has_its_own_size() -> None:
    source = source_of(hugging_face(VIT, num_channels=1, image_size=[16, 32]), name="x", arch="x", sha256="")
    assert (source.size, source.labels) == ((1, 16, 32), tuple(LABELS.values()))
    assert source_of(nn.Linear(2, 2), name="x", arch="x", sha256="").size == (3, 224, 224)
