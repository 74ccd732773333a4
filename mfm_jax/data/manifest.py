"""How a split is written down: the record ids of every part, the recipe that chose them, and a hash over all of it.

Which images were kept matters as much as how many. A manifest can be shared and re-used, and `check_leakage` proves
from it alone that no test image was trained on. NumPy only.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mfm_jax.errors import UserError
from mfm_jax.machine import disk

MANIFEST_FORMAT = 1


class Records(NamedTuple):
    """One split's records: which pool the ids count in, the ids, and the label of each."""

    pool: str  # "train" or "test" (the source's own splits), "all" where the source has only one
    ids: npt.NDArray[np.integer]  # [N], sorted
    labels: npt.NDArray[np.integer]  # [N]


def make_manifest(
    *,
    dataset: str,
    version: str,
    class_names: Sequence[str],
    settings: Mapping[str, Any],
    splits: Mapping[str, Records],
    overlaps: Mapping[tuple[str, str], str],
) -> dict[str, Any]:
    """Returns the JSON-able record of a split.

    Args:
      dataset: the source's name; with `version` it says what the record ids count in.
      version: the source's version.
      class_names: one name a class.
      settings: how the split was made (protocol, imbalance factor, seed, images per class).
      splits: by name (`train`, `meta`, `val`, `test`), the records of each. A record is named by (pool, id):
        ids in different pools never name the same record.
      overlaps: `(part, whole) -> why`: the splits that are meant to share records, all of `part` in `whole`.
    """
    manifest = {
        "format": MANIFEST_FORMAT,
        "dataset": dataset,
        "version": version,
        "class_names": list(class_names),
        **settings,
        "splits": {
            name: {
                "pool": records.pool,
                "class_counts": np.bincount(records.labels, minlength=len(class_names)).tolist(),
                "ids": np.asarray(records.ids).tolist(),
            }
            for name, records in splits.items()
        },
        "overlaps": [{"part": part, "whole": whole, "why": why} for (part, whole), why in overlaps.items()],
    }
    return {**manifest, "hash": manifest_hash(manifest)}


def manifest_hash(manifest: Mapping[str, Any]) -> str:
    """Returns `sha256:<hex>` over the canonical JSON (sorted keys, no spaces) of all but the hash itself."""
    rest = {key: value for key, value in manifest.items() if key != "hash"}
    canonical = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return "sha256:" + hashlib.sha256(canonical.encode()).hexdigest()


_PROTOCOLS = {
    "meta_held_out": (
        "validation images, then meta images, leave the training set, equally many of each class; of the rest, class c"
        " of K keeps n_max / factor^(c / (K - 1)) images"
    ),
    "full": (
        "validation images leave the training set, equally many of each class; of the rest, class c of K keeps"
        " n_max / factor^(c / (K - 1)) images, and the meta set is drawn from these"
    ),
    "natural": (
        "the classes keep their sizes, but for an imbalance factor above 1; a split that the data does not come with is"
        " a part of each class"
    ),
}


def protocol_in_words(manifest: Mapping[str, Any]) -> str | None:
    """Returns how a split was made, wrong labels included; None of a protocol that has no words."""
    words, noise = _PROTOCOLS.get(manifest.get("protocol", "")), noise_in_words(manifest)
    return f"{words}; {noise}" if words and noise else words


def noise_in_words(manifest: Mapping[str, Any]) -> str:
    """Returns how many training labels are wrong; "" where none was made so."""
    if "noise" not in manifest:
        return ""
    images = manifest["splits"]["train"]["ids"]
    wrong = len({*manifest["noise"]["ids"]} & {*images})  # a fold holds some of them out
    return f"{wrong:,} of {len(images):,} training labels are wrong ({manifest['noise_kind']} noise)"


def leaks_in_words(manifest: Mapping[str, Any], of_other: Mapping[str, Any]) -> str:
    """Returns how many images that a run holds out another run was trained on, by their manifests; "" for none.

    Of other data, or of another version, nothing is known.
    """
    if any(manifest[key] != of_other[key] for key in ("dataset", "version")):
        return ""
    parts = {name: {(part["pool"], i) for i in part["ids"]} for name, part in of_other["splits"].items()}
    trained, found = parts["train"] | parts["meta"], []
    for name in ("val", "test"):
        part = manifest["splits"][name]
        if leaked := len(trained & {(part["pool"], i) for i in part["ids"]}):
            found.append(f"{leaked:,} of the {name} images of this run")
    return f"was trained on {' and '.join(found)}; take that run's data.seed and splits" if found else ""


def factor_in_words(manifest: Mapping[str, Any]) -> str:
    """Returns the imbalance factor of a split: as set, or that of the training counts of natural data."""
    if manifest.get("protocol") != "natural" or manifest["imbalance_factor"] > 1:
        return f"{manifest['imbalance_factor']:g}"
    counts = manifest["splits"]["train"]["class_counts"]
    return f"{round(max(counts) / min(counts), 1):g} (natural)"


def redrawn(manifest: Mapping[str, Any]) -> bool:
    """Whether the meta set is redrawn from the training set every epoch."""
    return bool(manifest.get("meta_redrawn", manifest["protocol"] == "full"))


def write_manifest(manifest: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Writes `manifest` as JSON; a reader finds the old file or the whole new one, never a part."""
    disk.write_object(Path(path), manifest, indent=None)


def read_manifest(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads what `write_manifest` wrote.

    Raises:
      UserError: the file is missing, is not a manifest, or was changed after it was written.
    """
    try:
        text = disk.expanded(path).read_text()
    except OSError as error:
        raise UserError(f"manifest {path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise UserError(f"manifest {path}: damaged, not text ({error}); get or make it again") from error
    return parse_manifest(text, path)


def parse_manifest(text: str, path: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns the manifest that `text` is; `path` names its file in messages.

    Raises:
      UserError: it is not a manifest, or was changed after it was written.
    """
    try:
        manifest = json.loads(text)
    except ValueError as error:
        raise UserError(f"manifest {path}: damaged, not JSON ({error}); get or make it again") from error
    if not isinstance(manifest, dict) or "hash" not in manifest:
        raise UserError(f"manifest {path}: not a split manifest (it has no hash)")
    if manifest["hash"] != manifest_hash(manifest):
        raise UserError(f"manifest {path}: edited or damaged, its hash does not fit; get or make it again")
    if manifest.get("format") != MANIFEST_FORMAT:
        raise UserError(f"manifest {path}: format {manifest.get('format')}; allowed: {MANIFEST_FORMAT}")
    return manifest


def check_leakage(manifest: Mapping[str, Any]) -> None:
    """Proves that no record is in two splits, except where the manifest declares that one lies in the other.

    A declared overlap must be exact: every record of the part is in the whole.

    Raises:
      UserError: names the splits and how many records they share, or how many a declared part lacks.
    """
    members: dict[str, set[tuple[str, int]]] = {}
    for name, split in manifest["splits"].items():
        members[name] = {(split["pool"], record) for record in split["ids"]}
        if repeats := len(split["ids"]) - len(members[name]):
            raise UserError(f"split manifest: {name} lists {repeats} record ids more than once")
    declared = {(overlap["part"], overlap["whole"]) for overlap in manifest["overlaps"]}
    for part, whole in declared:
        if missing := len(members[part] - members[whole]):
            raise UserError(f"split manifest: {part} is declared to lie in {whole}, which lacks {missing} of it")
    names = sorted(members)
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            if (shared := members[a] & members[b]) and not declared & {(a, b), (b, a)}:
                raise UserError(
                    f"split manifest: {a} and {b} share {len(shared)} record ids, e.g. {min(shared)[1]}"
                    f" of pool '{min(shared)[0]}'; they must be disjoint"
                )
