r"""Packs what a config trains, validates and tests on into one compressed file, for machines without the data set.

    TFDS_DATA_DIR=... python benchmarks/subset.py --config=configs/cifar10_lt.py --workdir=packed

CIFAR-10-LT at factor 100 takes 62 MB. The file is used with

    --config.data.source=npz --config.data.root=packed/cifar10.npz

and the config's own protocol, imbalance factor and seed: the manifest is in the file, so that the split is the one that
was packed, record by record, and a run's `manifest.json` has the same hash as from the data set itself. With
`--config.data.protocol=natural --config.data.val_fraction=0` a larger imbalance factor makes the training set longer.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mfm_jax import command, data
from mfm_jax import config as config_lib


def main(argv: Sequence[str]) -> int:
    del argv
    found = data.build(config_lib.resolve(command.config()))
    command.workdir().mkdir(parents=True, exist_ok=True)
    pack(found, command.workdir() / f"{found.name}.npz")
    return 0


def pack(found: data.LongTailData, path: Path) -> None:
    """Writes the splits of `found` under the names that `data.source = "npz"` reads; not a redrawn meta set."""
    splits = {"train": (found.train_images, found.train_labels), "test": (found.test_images, found.test_labels)}
    if len(found.val_labels):
        splits["val"] = found.val_images, found.val_labels
    if found.meta_images is not found.train_images:
        splits["meta"] = found.meta_images, found.meta_labels
    arrays = {f"{split}_images": images for split, (images, _) in splits.items()}
    arrays |= {f"{split}_labels": labels for split, (_, labels) in splits.items()}
    arrays |= {"class_names": np.array(found.class_names), "manifest": np.array(json.dumps(found.manifest))}
    np.savez_compressed(path, **arrays)
    print(
        f"{path}: {path.stat().st_size / 1e6:.0f} MB;",
        *(f"{len(labels)} {name}" for name, (_, labels) in splits.items()),
    )


if __name__ == "__main__":
    command.run(main)
