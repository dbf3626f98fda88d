"""WebDataset shards: what is drawn, what is read, the splits of a folder of shards, and what is refused."""

import gzip
import tarfile
from pathlib import Path

import numpy as np
import pytest
from dataset_files import encoded, picture, sample, write_info, write_shard, write_shards

from mpcompile.data import shards as shards_module
from mpcompile.data.dataset_images import load_dataset_images
from mpcompile.data.dataset_name import dataset_named
from mpcompile.data.dataset_pool import HELD_OUT
from mpcompile.data.divide import Numbers
from mpcompile.data.encoded_images import DatasetImages
from mpcompile.data.images import Data, Split
from mpcompile.data.shard_files import expanded
from mpcompile.errors import LoadError, UsageError
from mpcompile.testing import tiny_source


def read(text: str, *, outputs: int = 10, numbers: tuple[int, int, int | None, int] = (8, 4, None, 0)) -> Data:
    dataset = dataset_named(text)
    assert dataset is not None
    return load_dataset_images(dataset, tiny_source(), outputs, Numbers(*numbers))


def names(split: Split) -> list[str]:
    assert isinstance(split.images, DatasetImages)
    return [str(split.images.paths[index]) for index in split.order]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 training shards of 6 samples, and 2 of validation."""
    folder = tmp_path_factory.mktemp("shards")
    write_shards(folder, [f"x-train-{index:03}.tar" for index in range(40)], 6)
    write_shards(folder, [f"x-val-{index:03}.tar" for index in range(2)], 6)
    return folder


def test_the_seed_draws_samples_of_several_shards(root: Path) -> None:
    data = read(f"wds/{root}", numbers=(20, 12, None, 0))
    assert [len(split) for split in (data.calibration, data.validation, data.held_out)] == [20, 12, 12]
    fitted = names(data.calibration) + names(data.validation)
    assert len(set(fitted)) == 32
    assert len({name.split("/")[0] for name in fitted}) == 16
    assert all(name.startswith("x-val-") for name in names(data.held_out))
    assert names(read(f"wds/{root}", numbers=(20, 12, None, 0)).calibration) == names(data.calibration)
    assert names(read(f"wds/{root}", numbers=(20, 12, None, 1)).calibration) != names(data.calibration)
    assert data.training.order == tuple(sorted(data.calibration.order))
    where = f"wds/{root}"
    assert data.notes[0] == (
        f"20 calibration and 12 validation images were drawn by seed 0 from split train of {where} (32 samples of 16 "
        f"of 40 shards), and 12 held-out images from split val of {where} (12 samples of 2 of 2 shards)"
    )


def test_images_are_preprocessed_and_labelled_as_those_of_a_folder(root: Path) -> None:
    data = read(f"wds/{root}")
    assert data.held_out.labelled
    images = data.held_out.images
    for name, index in zip(names(data.held_out), data.held_out.order, strict=True):
        number = int(name.split("/")[1].split(".")[0])
        pixels, label = images[index]
        assert label == number % 10
        assert isinstance(images, DatasetImages)
        assert pixels.equal(images.transform(picture(number).convert("L")))


def test_only_the_shards_that_are_needed_are_opened_and_no_image_is_read(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    samples_of = shards_module.samples_of
    read_member = shards_module.Member.read

    def counted(member: shards_module.Member) -> bytes:
        opened.append(member.name)
        return read_member(member)

    def shard(path: Path) -> list[shards_module.Sample]:
        opened.append(path.name)
        return samples_of(path)

    monkeypatch.setattr("mpcompile.data.shard_pools.samples_of", shard)
    monkeypatch.setattr(shards_module.Member, "read", counted)
    monkeypatch.setattr("mpcompile.data.dataset_images.surveyed_files", lambda data: data)
    read(f"wds/{root}", numbers=(2, 1, 2, 0))
    assert sum(name.startswith("x-train") for name in opened) == 3
    assert sum(name.startswith("x-val") for name in opened) == 2
    assert {name.split(".")[-1] for name in opened} == {"tar", "cls"}
    assert sum(name.endswith("cls") for name in opened) == 5


def test_a_stream_is_not_read_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert HELD_OUT == 5000
    monkeypatch.setattr("mpcompile.data.dataset_pool.HELD_OUT", 20)
    monkeypatch.setattr("mpcompile.data.dataset_images.HELD_OUT", 20)
    write_shards(tmp_path, [f"{index:03}.tar" for index in range(50)], 4)
    data = read(f"wds/{tmp_path}")
    assert [len(split) for split in (data.calibration, data.validation, data.held_out)] == [8, 4, 20]
    assert len({*names(data.calibration), *names(data.validation), *names(data.held_out)}) == 32
    assert any("a stream is not read to its end: at most 20 images" in note for note in data.notes)
    assert len(read(f"wds/{tmp_path}", numbers=(8, 4, 90, 0)).held_out) == 90


def test_shards_of_unequal_length_give_what_they_have(tmp_path: Path) -> None:
    for index, count in enumerate([30, 1, 1]):
        write_shard(tmp_path / f"{index}.tar", [file for n in range(count) for file in sample(100 * index + n, n % 10)])
    data = read(f"wds/{tmp_path}", numbers=(8, 4, None, 3))
    assert sum(map(len, (data.calibration, data.validation, data.held_out))) == 32


@pytest.mark.parametrize(
    ("files", "options", "train", "held_out"),
    [
        (["train/0.tar", "validation/0.tar"], "", "train", "validation"),
        (["in1k-validation-00.tar", "in1k-train-00.tar", "in1k-test-00.tar"], "", "train", "validation"),
        (["val-0.tar", "test-0.tar"], "", "val", "test"),
        (["train-0.tar", "train-1.tar", "val-0.tar"], ",train=train-{0..1}.tar", "train", "train"),
        (["a-0.tar", "b-0.tar", "b-1.tar"], ",train=a-*.tar,held_out=b-*.tar", "a", "b"),
        (["train-0.tar", "b-0.tar", "val-0.tar"], ",train=b-0.tar,held_out=val-0.tar", "b", "val"),
    ],
)
def test_the_splits_of_a_folder(tmp_path: Path, files: list[str], options: str, train: str, held_out: str) -> None:
    write_shards(tmp_path, files, 20)
    data = read(f"wds/{tmp_path}{options}")
    number = {int(name.split("/")[-1].split(".")[0]) // 20 for name in names(data.calibration)}
    assert {files[index] for index in number} <= {file for file in files if train in file}
    number = {int(name.split("/")[-1].split(".")[0]) // 20 for name in names(data.held_out)}
    assert {files[index] for index in number} <= {file for file in files if held_out in file}


def test_a_pattern_and_the_description_of_timm(tmp_path: Path) -> None:
    write_shards(tmp_path, [f"s{index:02}.tar" for index in range(12)], 3)
    data = read(f"wds/{tmp_path}/s{{08..11}}.tar")
    assert sum(map(len, (data.calibration, data.validation, data.held_out))) == 12
    write_info(tmp_path, {"train": ["s00.tar", "s01.tar", "s02.tar"], "validation": ["s09.tar"]})
    data = read(f"wds/{tmp_path}")
    assert {name.split("/")[0] for name in names(data.held_out)} == {"s09.tar"}
    (tmp_path / "_info.json").write_text("{}")
    with pytest.raises(LoadError, match=r"_info.json cannot be read: KeyError: .*; needed is"):
        read(f"wds/{tmp_path}")


def test_braces_are_expanded_as_by_a_shell() -> None:
    assert expanded("x-{08..10}-{a,b}.tar") == [f"x-{n}-{c}.tar" for n in ("08", "09", "10") for c in "ab"]
    with pytest.raises(UsageError, match=r"\{7\.\.3\} gives 0 shards"):
        expanded("{7..3}.tar")


def test_labels_by_name_and_from_json(tmp_path: Path) -> None:
    files = []
    for number in range(12):
        label, field = str(number % 2), f'{{"kind": {number % 3}}}'
        files += [(f"d/{number}.jpg", encoded(number, "jpg")), (f"d/{number}.png", encoded(number))]
        files += [(f"d/{number}.json", field.encode()), (f"d/{number}.cls", label.encode()), ("d/__m.json", b"{}")]
    write_shard(tmp_path / "a.tar", files)
    numbers = (4, 2, None, 0)
    assert all(name.endswith("jpg") for name in names(read(f"wds/{tmp_path}", numbers=numbers).calibration))
    data = read(f"wds/{tmp_path},image=png,label=kind", numbers=numbers)
    assert all(name.endswith("png") for name in names(data.held_out))
    for name, index in zip(names(data.held_out), data.held_out.order, strict=True):
        assert data.held_out.images[index][1] == int(name.split("/")[2].split(".")[0]) % 3
    with pytest.raises(LoadError, match=r"a.tar/d/.*json has no field 'x'; it has kind"):
        read(f"wds/{tmp_path},label=x", numbers=numbers)
    with pytest.raises(LoadError, match=r"a.tar has no images; its files end with cls, jpg, json, png; give ,image="):
        read(f"wds/{tmp_path},image=webp", numbers=numbers)


def test_a_broken_image_is_refused_or_skipped(tmp_path: Path) -> None:
    files = [file for number in range(20) for file in sample(number, number % 10)]
    write_shard(tmp_path / "a.tar", [*files, ("99.png", b"no image"), ("99.cls", b"1")])
    with pytest.raises(LoadError, match=r"a.tar/99.png is not an image that can be read"):
        read(f"wds/{tmp_path}")
    dataset = dataset_named(f"wds/{tmp_path}")
    assert dataset is not None
    data = load_dataset_images(dataset, tiny_source(), 10, Numbers(8, 4, None, 0), skip_broken=True)
    assert sum(map(len, (data.calibration, data.validation, data.held_out))) == 20
    assert any("1 image that cannot be read was skipped" in note for note in data.notes)


@pytest.mark.parametrize(
    ("text", "error", "match"),
    [
        ("wds/https://x.org/a.tar", LoadError, "is not a path; wds/ reads shards on disk"),
        ("wds/pipe:echo", LoadError, "is not a path; wds/ reads shards on disk"),
        ("wds/{}/none", LoadError, "is no folder; wds/ takes a folder of shards"),
        ("wds/{}/none/x-{{0..1}}.tar", LoadError, "names 2 shards, and 2 do not exist"),
        ("wds/{}/none/*.tar", LoadError, "no file matches"),
        ("wds/{}/x.tar,train=x", UsageError, "names shards; give their folder"),
        ("wds/{}", LoadError, r"has no shards \(\*.tar\); it has empty"),
        ("wds/", UsageError, "names no dataset"),
        ("wds/{},trian=x", UsageError, "has the option 'trian'; give train, .*did you mean 'train'"),
        ("wds/{},train=x,train=y", UsageError, "gives train twice; give train=VALUE once"),
    ],
)
def test_what_is_refused(tmp_path: Path, text: str, error: type[Exception], match: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(error, match=match):
        read(text.format(tmp_path))


def test_shards_that_cannot_be_read(tmp_path: Path) -> None:
    whole = write_shard(tmp_path / "a.tar", [file for number in range(9) for file in sample(number, number)])
    content = whole.read_bytes()
    for length in (7, 512 + 7, 1024, 1024 + 7, len(content) // 2 + 7):
        whole.write_bytes(content[:length])
        with pytest.raises(LoadError, match=r"a.tar cannot be read as a tar file \(.*\); repair or remove it"):
            read(f"wds/{tmp_path}")
    whole.write_bytes(gzip.compress(content))
    with pytest.raises(LoadError, match="unpack it with gunzip: images are read by their place"):
        read(f"wds/{tmp_path}")
    write_shard(whole, [])
    with pytest.raises(LoadError, match="has no samples; give shards that have some"):
        read(f"wds/{tmp_path}")
    whole.write_bytes(content)
    write_shards(tmp_path, ["train-0.tar"], 4)
    with pytest.raises(LoadError, match=r"has shards of train, and others whose names tell no split \(a.tar\)"):
        read(f"wds/{tmp_path}")


def test_a_shard_that_became_shorter(tmp_path: Path) -> None:
    write_shards(tmp_path, ["a.tar"], 20)
    data = read(f"wds/{tmp_path}")
    (tmp_path / "a.tar").write_bytes(b"")
    with pytest.raises(LoadError, match=r"a.tar ends inside .*; repair or remove it"):
        data.held_out.first(1)


@pytest.mark.filterwarnings("ignore")  # it leaves the file to the garbage collector
def test_webdataset_gives_the_same_samples(root: Path) -> None:
    webdataset = pytest.importorskip("webdataset", reason="webdataset is not installed: pip install webdataset")
    path = root / "x-train-003.tar"
    theirs = [
        (one["__key__"], int(one["cls"]), one["png"]) for one in webdataset.WebDataset(str(path), shardshuffle=False)
    ]
    ours = [
        (one["png"].name.split(".")[0], shards_module.label_of(one, None), one["png"].read())
        for one in shards_module.samples_of(path)
    ]
    assert ours == theirs
    assert len(theirs) == 6


def test_headers_are_not_kept(root: Path) -> None:
    """The memory of a scan does not grow with tarfile's own list."""
    with tarfile.open(root / "x-train-000.tar") as archive:
        expected = [info.offset_data for info in archive]
    found = [member.start for one in shards_module.samples_of(root / "x-train-000.tar") for member in one.values()]
    assert found == expected
    assert np.all(np.diff(found) > 0)
