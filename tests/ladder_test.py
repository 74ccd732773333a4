"""The default recipe from step 0 at every depth: the meta pass means something, and phi goes the right way.

Small networks hide what a deep one does in its first steps, so these are real networks on real images, as a user runs
them. The images are CIFAR-10's, where `TFDS_DATA_DIR` has them.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HALVES = ("train.batch_size=50", "meta.batch_size=50", "train.max_steps=494")
LARGE = ("model.name=resnet18", "data.image_size=64", *HALVES)
FEATURES = ("modulation.sites=pooled:direct,logits:frequency",)  # cifar10_lt_features
VIT = ("model.name=vit_b16", "model.width=64", "data.image_size=64", "optim.name=adamw", "optim.learning_rate=1e-3")
LADDER = {
    **{f"resnet8, seed {seed}": ("model.name=resnet8", f"train.seed={seed}") for seed in range(3)},
    **{name: (f"model.name={name}",) for name in ("resnet20", "resnet32", "resnet56")},
    "resnet18 at 64 pixels": LARGE,
    "resnet50 at 64 pixels": ("model.name=resnet50", *LARGE[1:]),
    "a small ViT": VIT,
    **{f"{name}, features": (f"model.name={name}", *FEATURES) for name in ("resnet8", "resnet20", "resnet32")},
    "resnet8 in bfloat16": ("model.name=resnet8", "train.dtype=bfloat16"),
    "resnet20 in bfloat16": ("model.name=resnet20", "train.dtype=bfloat16"),
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not Path(os.environ.get("TFDS_DATA_DIR", ""), "cifar10").is_dir(), reason="TFDS_DATA_DIR has no cifar10"
    ),
]


@pytest.mark.parametrize("fields", LADDER.values(), ids=LADDER)
def test_the_first_two_epochs_are_sound(fields, tmp_path):
    flags = [f"--config.{field}" for field in ("train.max_steps=246", "data.val_images_per_class=10", *fields)]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}  # as a user has it
    command = ["-m", "mfm_jax.main", f"--config={ROOT / 'configs' / 'cifar10_lt.py'}", f"--workdir={tmp_path}"]
    subprocess.run([sys.executable, *command, "--config.eval.test=False", *flags], env=environment, check=True)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    kinds = {kind: [row for row in rows if row["kind"] == kind] for kind in ("train", "modulation", "warning")}
    assert not kinds["warning"]
    assert kinds["train"][-1]["meta_loss"] < math.log(10)
    assert kinds["modulation"][-1]["sites"]["logits"]["beta"][-1] < 0
    assert max(row["hypergrad_norm"] for row in kinds["train"]) < 10
