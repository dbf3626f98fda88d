"""ActivationStore: what comes back from a file is what was kept, byte for byte."""

from pathlib import Path

import pytest
import torch

from mpcompile.passes.reconstruct.activation_store import ActivationStore


@pytest.mark.parametrize("limit", [None, 10**9, 0], ids=["no limit", "within the limit", "beyond it"])
def test_values_come_back_as_they_were(limit: int | None, tmp_path: Path) -> None:
    weight = torch.rand(3, 4)
    image = torch.rand(2, 3, 4, 5)
    kept = {
        "permuted": image.permute(0, 2, 3, 1),
        "channels last": torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "several": (torch.arange(4), [torch.tensor(True), 7], None),
        "empty": torch.empty(0, 3),
        "half": torch.rand(3).half(),
        "weight": weight.T,
        "size": 5,
    }
    with ActivationStore(limit, tmp_path, frozenset({weight.untyped_storage().data_ptr()})) as store:
        with store.opened("a") as values:
            values.update(kept)
        assert bool(list(tmp_path.glob("activations-*/*"))) == (limit == 0)
        with store.opened("a") as values:
            assert values.keys() == kept.keys()
            for name in ("permuted", "channels last", "half", "weight", "empty"):
                assert torch.equal(values[name], kept[name])  # type: ignore[arg-type]
                assert values[name].stride() == kept[name].stride()  # type: ignore[attr-defined]
            numbers, [flag, seven], none = values["several"]
            assert torch.equal(numbers, torch.arange(4))
            assert (bool(flag), seven, none, values["size"]) == (True, 7, None, 5)
            assert values["weight"].data_ptr() == weight.data_ptr()  # a view of the weight stays one
        assert store.most_file_bytes == (0 if limit != 0 else store.file_bytes)
    assert not list(tmp_path.iterdir())


def test_views_of_one_tensor_stay_views_of_one_tensor(tmp_path: Path) -> None:
    with ActivationStore(0, tmp_path) as store:
        with store.opened(1) as values:
            whole = torch.arange(6.0)
            values.update(whole=whole, half=whole[3:])
        with store.opened(1) as values:
            values["whole"] += 1
            assert values["half"].tolist() == [4, 5, 6]


def test_batches_stay_in_memory_up_to_the_limit(tmp_path: Path) -> None:
    size = torch.rand(100).nbytes
    with ActivationStore(2 * size, tmp_path) as store:
        for batch in range(4):
            with store.opened(batch) as values:
                values["x"] = torch.full((100,), float(batch))
        assert store.file_bytes == 2 * size
        for batch in range(4):
            with store.opened(batch) as values:
                assert values["x"].unique().tolist() == [batch]
                values.clear()
        assert store.file_bytes == 0
        assert store.most_file_bytes == 2 * size
