"""Reads Fashion-MNIST's idx files; as a script, writes images.npz, the labelled images of this example.

    python examples/fashion_vit/fashion_mnist.py --data /usr/share/datasets/fashion-mnist

images.npz has 1,000 calibration images from the training set and 2,000 held-out images from the test set, drawn at
random with a fixed seed. Its arrays are uint8: calibration_images (1000, 28, 28), calibration_labels (1000,),
heldout_images (2000, 28, 28), heldout_labels (2000,).
"""

import argparse
import gzip
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

HERE = Path(__file__).parent
COUNTS = {"calibration": ("train", 1000), "heldout": ("t10k", 2000)}


def read_split(folder: Path, split: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Returns images (n, 28, 28) and labels (n,) of the split `train` or `t10k`."""
    return (
        read_idx(folder / f"{split}-images-idx3-ubyte.gz"),
        read_idx(folder / f"{split}-labels-idx1-ubyte.gz"),
    )


def read_idx(path: Path) -> NDArray[np.uint8]:
    """Returns the array in a gzipped idx file.

    The file has 4 bytes, of which the last is the number of axes; the size of each axis as a 32-bit big-endian integer;
    then the values as bytes.
    """
    raw = gzip.decompress(path.read_bytes())
    axes = raw[3]
    shape = np.frombuffer(raw, ">u4", axes, offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * axes).reshape(shape)


def main() -> None:
    """Writes images.npz into the folder of this file."""
    parser = argparse.ArgumentParser(description="Write images.npz into the folder of this script")
    parser.add_argument("--data", type=Path, required=True, help="folder with the four Fashion-MNIST .gz files")
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    arrays: dict[str, NDArray[np.uint8]] = {}
    for name, (split, count) in COUNTS.items():
        images, labels = read_split(args.data, split)
        chosen = np.sort(rng.choice(len(images), count, replace=False))
        arrays |= {f"{name}_images": images[chosen], f"{name}_labels": labels[chosen]}
    np.savez_compressed(HERE / "images.npz", allow_pickle=False, **arrays)


if __name__ == "__main__":
    main()
