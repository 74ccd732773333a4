"""Weights that the user has downloaded from the Hugging Face Hub, found by their name in its cache.

The layout is `models--timm--NAME/snapshots/COMMIT/model.safetensors` in the cache folder; `refs/main` has the commit
(https://huggingface.co/docs/huggingface_hub/guides/manage-cache). Nothing is downloaded.
"""

import json
import os
import re
from pathlib import Path

import numpy as np

from mfm_jax.errors import UserError

# timm's names of the architectures here. Others may have the same tensors and compute something else with them
# (`resnetblur50`, say), so a name counts as much as shapes do.
_TIMM = {
    "resnet18": ("resnet18",),
    "resnet34": ("resnet34",),
    "resnet50": ("resnet50",),
    "resnet101": ("resnet101",),
    "resnet152": ("resnet152",),
    "resnext50": ("resnext50_32x4d",),
    "vit_b16": ("vit_base_patch16_224", "vit_base_patch16_384"),
}
_NORMALIZE = {"imagenet": (0.485, 0.456, 0.406, 0.229, 0.224, 0.225), "half": (0.5,) * 6}


def path_of(pretrained: str, model_name: str) -> Path:
    """Returns the file that `model.pretrained` names: a path, or the cached one of `timm/NAME`. A path comes first.

    Raises:
      UserError: the name is of another architecture than `model_name`, or nothing of that name is in the cache.
    """
    found = re.fullmatch(r"timm/([\w.-]+)", pretrained)
    if not found or Path(pretrained).exists():
        return Path(pretrained)
    field, architecture = f"model.pretrained = {pretrained!r}", found[1].partition(".")[0]
    if architecture not in (known := _TIMM.get(model_name, ())):
        theirs = [ours for ours, names in _TIMM.items() if architecture in names]
        way_out = f"set model.name = {theirs[0]!r}" if theirs else f"timm's are {', '.join(known) or 'none'}"
        raise UserError(f"{field}: not of model.name = {model_name!r}; {way_out}")
    folder = cache() / f"models--timm--{found[1]}"
    named = [folder / "snapshots" / ref.read_text().strip() for ref in folder.glob("refs/main")]
    files = [one / "model.safetensors" for one in named or folder.glob("snapshots/*")]
    there = [file for file in files if file.is_file()]
    if len(there) != 1:
        why = "not in the cache" if not there else f"{len(there)} versions in the cache, none of them main"
        raise UserError(
            f"{field}: {why}, {cache()}; to download it: hf download {pretrained} model.safetensors config.json"
        )
    return there[0]


def cache() -> Path:
    """Returns the folder of the hub's cache, as its own client finds it."""
    given, home = os.environ, Path(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "huggingface")
    named = given.get("HF_HUB_CACHE") or given.get("HUGGINGFACE_HUB_CACHE")
    return Path(named or Path(given.get("HF_HOME") or home, "hub")).expanduser()


def normalization(weights: Path) -> str:
    """Returns what the `config.json` beside cached weights says of their images' mean and deviation; "" where nothing.

    Both are timm's, in units of 0..1, and are named as the value of `data.normalize` that has them.
    """
    try:
        found = json.loads((weights.parent / "config.json").read_text(encoding="utf-8"))["pretrained_cfg"]
        values = [*map(float, found["mean"]), *map(float, found["std"])]
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    names = [name for name, known in _NORMALIZE.items() if len(values) == 6 and np.allclose(values, known, atol=1e-6)]
    if not names:
        return f"they want images of mean {values[:3]} and deviation {values[3:]}, which data.normalize has not"
    return f"they want data.normalize = {names[0]!r}"
