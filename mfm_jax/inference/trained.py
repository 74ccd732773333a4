"""A finished run that an object carries with it: a folder while it lives, the bytes of the run's files in a pickle."""

import functools
import io
import shutil
import tarfile
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mfm_jax.evaluation import classifier as classifiers
from mfm_jax.evaluation.classifier import Classifier
from mfm_jax.machine import disk
from mfm_jax.pages import report
from mfm_jax.workdir.files import Workdir, read_object


def temporary() -> Path:
    """Makes a folder for a run; a `TrainedRun` that owns it removes it."""
    return Path(tempfile.mkdtemp(prefix="mfm_jax-"))


class TrainedRun:
    """The finished run in `folder`, which is removed with this object if that `owns` it.

    A pickle holds the files that evaluation, export and pages need, not the images that were trained on; unpickled, in
    whatever process, they lie in a temporary folder of their own.
    """

    def __init__(self, folder: Path, *, owns: bool):
        self.folder = folder.absolute()
        if owns:
            weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)

    @functools.cached_property
    def classifier(self) -> Classifier:
        """The classifier of the last checkpoint, loaded when it is first used."""
        return classifiers.load(self.folder)

    def copy_to(self, folder: Path) -> None:
        """Copies all of the run, with the images that it was given, and its report; commands find all in the copy."""
        unlocked = shutil.ignore_patterns(Workdir(folder).owner.name)
        shutil.copytree(self.folder, folder, ignore=unlocked, dirs_exist_ok=True)
        copy = Workdir(folder.absolute())
        if copy.images.exists():
            config = read_object(copy.config)
            config["data"]["root"] = str(copy.images)
            disk.write_object(copy.config, config, indent=2)
        if not copy.report.exists():
            report.write_report(copy.path)

    def __reduce__(self) -> tuple[Callable[[bytes], "TrainedRun"], tuple[Any, ...]]:
        return _unpacked, (self._packed(),)

    def _packed(self) -> bytes:
        run, content = Workdir(self.folder), io.BytesIO()
        needed = (run.config, run.manifest, run.facts, run.metrics, run.results, run.gallery, run.report)
        with tarfile.open(fileobj=content, mode="w") as archive:
            for path in (*needed, run.checkpoints):
                if path.exists():
                    archive.add(path, path.name)
        return content.getvalue()


def _unpacked(content: bytes) -> TrainedRun:
    folder = temporary()
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        disk.unpack(archive, folder)
    return TrainedRun(folder, owns=True)
