"""Manifests: what is written is read back, and a changed or leaking split is refused."""

import copy
import json

import numpy as np
import pytest

from mfm_jax.data.manifest import Records, check_leakage, make_manifest, manifest_hash, read_manifest, write_manifest
from mfm_jax.errors import UserError


def records(pool: str, ids: list[int]) -> Records:
    return Records(pool, np.array(ids, np.int64), np.array(ids, np.int64) % 2)


def manifest_of(**changes) -> dict:
    fields = {
        "dataset": "toy",
        "version": "1.0.0",
        "class_names": ("even", "odd"),
        "settings": {"protocol": "meta_held_out", "imbalance_factor": 10.0, "seed": 0},
        "splits": {
            "train": records("train", [0, 1, 2]),
            "meta": records("train", [3, 4]),
            "val": records("train", []),
            "test": records("test", [0, 1, 2, 3]),
        },
        "overlaps": {},
    }
    fields["splits"] = fields["splits"] | changes.pop("splits", {})
    return make_manifest(**{**fields, **changes})


def test_manifest_round_trip(tmp_path):
    manifest = manifest_of()
    write_manifest(manifest, tmp_path / "manifest.json")
    assert read_manifest(tmp_path / "manifest.json") == manifest
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]
    assert manifest["splits"]["train"]["class_counts"] == [2, 1]
    check_leakage(manifest)


def test_manifest_hash_is_over_everything_else():
    manifest = manifest_of()
    for key in manifest.keys() - {"hash"}:
        changed = copy.deepcopy(manifest)
        changed[key] = "other"
        assert manifest_hash(changed) != manifest["hash"], key


def test_tampering_and_damage_are_found(tmp_path):
    path = tmp_path / "manifest.json"
    with pytest.raises(UserError, match=r"manifest .*manifest\.json: cannot be read"):
        read_manifest(path)
    manifest = manifest_of()
    manifest["splits"]["test"]["ids"].pop()
    write_manifest(manifest, path)
    with pytest.raises(UserError, match=r"manifest\.json: edited or damaged"):
        read_manifest(path)
    path.write_text(json.dumps(manifest_of())[:-20])
    with pytest.raises(UserError, match=r"manifest\.json: damaged, not JSON"):
        read_manifest(path)
    path.write_text("[]")
    with pytest.raises(UserError, match=r"not a split manifest"):
        read_manifest(path)


@pytest.mark.parametrize(
    ("splits", "overlaps", "line"),
    [
        ({"test": records("train", [2, 9])}, {}, "test and train share 1 record ids, e.g. 2 of pool 'train'"),
        ({"val": records("train", [3, 4])}, {}, "meta and val share 2 record ids, e.g. 3"),
        ({"meta": records("train", [1, 1, 9])}, {}, "meta lists 1 record ids more than once"),
        ({"meta": records("train", [1, 2])}, {}, "meta and train share 2 record ids"),
        (
            {"meta": records("train", [1, 2, 9])},
            {("meta", "train"): "redrawn"},
            "meta is declared to lie in train, which lacks 1 of it",
        ),
    ],
)
def test_leaks_are_found(splits, overlaps, line):
    with pytest.raises(UserError, match=line):
        check_leakage(manifest_of(splits=splits, overlaps=overlaps))


def test_a_declared_overlap_is_no_leak():
    splits = {"meta": records("train", [1, 2])}
    check_leakage(manifest_of(splits=splits, overlaps={("meta", "train"): "redrawn"}))
