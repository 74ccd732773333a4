"""`MFMClassifier`: the trainer as a scikit-learn classifier.

`fit` writes the images to the folder of a run and calls the commands' own trainer there, so that evaluation, export,
prediction and going on work from that folder.
"""

import contextlib
import math
import os
from collections import Counter
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.preprocessing import LabelEncoder
from sklearn.utils import Tags, check_array, check_consistent_length, check_random_state, column_or_1d
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from mfm_jax import config as config_lib
from mfm_jax import export as export_lib
from mfm_jax import predict as predict_lib
from mfm_jax.config import parameters
from mfm_jax.config.parameters import Fields
from mfm_jax.data import given, numbers, walk
from mfm_jax.data.batches import eval_batches
from mfm_jax.data.manifest import read_manifest, redrawn
from mfm_jax.data.sources import Pixels, resize
from mfm_jax.errors import UserError
from mfm_jax.evaluation import facts as facts_lib
from mfm_jax.inference import trained
from mfm_jax.inference.trained import TrainedRun
from mfm_jax.machine import disk
from mfm_jax.machine.interruption import Interrupted
from mfm_jax.training import progress
from mfm_jax.training.train import train_and_evaluate
from mfm_jax.workdir.files import Workdir, read_object

_BATCH = 64  # images that are predicted at a time; always as many, so that it compiles once
_FOLDER_SIDE = 64  # pixels, as in configs/folder_lt.py
_FITTED = {"classes_", "n_features_in_", "feature_names_in_", "image_shape_", "value_range_"}


class MFMClassifier(ClassifierMixin, BaseEstimator):
    """A classifier of images, trained by MFM or another method of this package (docs/library.md).

    Defaults are those of `configs/folder_lt.py`: the data as given, batches of 50 training and 50 meta images, or fewer
    where there are fewer. The meta set is `meta.images_per_class` images of each class (10), or as many as the
    smallest class has, redrawn from the training images every epoch; `data__meta_fraction=0.1` holds it out instead. No
    test images are set aside. `augment.pad` is an eighth of the shorter side, 4 at most.

    Parameters:
      method: how it is trained, a name of docs/methods.md.
      model: the network, a name of docs/models.md.
      epochs: passes over the training images.
      image_shape: (H, W, C) of rows that are flat images; "row": each row is a picture one pixel high, as wide as it
        has numbers, which is meant for numbers that are no images. None where images are not flat.
      value_range: (least, largest) of numbers that are not uint8; they become 0 to 255, rounded, and others are
        refused. None learns it in `fit`, with `image_shape="row"` of each column, and clips what lies outside later.
        With a range, uint8 is not rescaled.
      validation_fraction: part of each class that is not trained on, but scored after each epoch; 0 for none.
      random_state: seed of parameters, order and augmentation. 0 unlike scikit-learn's None, so that two fits agree and
        a run in `workdir` goes on; None draws one.
      workdir: folder of the run, with its report; one that was interrupted goes on there. None for a temporary one,
        which goes with the estimator.
      verbose: 0 prints nothing on the standard output, 1 what the commands print.
      **fields: any other field, `group__field=value`: `optim__learning_rate=0.05` (`mfm-jax fields`).

    Attributes:
      classes_: the labels, sorted, `[K]`.
      n_features_in_: numbers of an image, H * W * C.
      image_shape_: (H, W, C) as given to `fit`; None after a folder.
      value_range_: the least and the largest value that were used, `[2]`, or `[2, 1, F, 1]` where learned by column.
      results_: the content of `results.json`; it describes validation, or else the training images.
      split_: images of each class in `train`, `meta` and `val`, and whether the meta set is redrawn from `train`.
      run_: the run (`inference.trained.TrainedRun`); a pickle holds its files.

    Raises:
      UserError: by `fit`, one line that names the parameter or field, its value and the way out.

    References:
      R. Wang et al., Meta feature modulator for long-tailed recognition, arXiv:2008.03428.
    """

    def __init__(  # noqa: PLR0913 (scikit-learn reads the parameters off this line)
        self,
        method: str = config_lib.Method.name,
        model: str = "resnet20",
        epochs: int = 60,
        *,
        image_shape: tuple[int, ...] | str | None = None,
        value_range: tuple[float, float] | None = (0.0, 1.0),
        validation_fraction: float = 0.0,
        random_state: int | np.random.RandomState | None = 0,
        workdir: str | os.PathLike[str] | None = None,
        verbose: int = 0,
        **fields: Any,
    ):
        self.method = method
        self.model = model
        self.epochs = epochs
        self.image_shape = image_shape
        self.value_range = value_range
        self.validation_fraction = validation_fraction
        self.random_state = random_state
        self.workdir = workdir
        self.verbose = verbose
        for name in fields:
            parameters.check(name)
        self._fields = fields

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Returns the parameters, the given fields among them as `group__field`."""
        return super().get_params(deep) | self._fields

    def set_params(self, **params: Any) -> Self:
        """Sets parameters, and fields as `group__field`."""
        fields = {name: value for name, value in params.items() if "__" in name}
        for name in fields:
            parameters.check(name)
        super().set_params(**{name: value for name, value in params.items() if name not in fields})
        self._fields = self._fields | fields
        return self

    def fit(self, X: Any, y: Any = None) -> Self:
        """Trains on images and returns itself.

        Args:
          X: `[n, H, W, C]` or `[n, H, W]`, C 1 or 3; `[n, F]` with `image_shape`; uint8, or numbers in `value_range`.
            Without `y`: a folder with a folder of pictures for each class, or a data set of Hugging Face, TensorFlow or
            PyTorch or another iterable of examples (`data.given`), which is read into memory.
          y: `[n]`, labels of any kind.
        """
        config = self._config()
        config_lib.resolve(config)  # a wrong value is reported before images are read
        if y is None and isinstance(X, str | os.PathLike):
            arrays = None
            self._prepare_folder(disk.expanded(X), config)
        else:
            arrays = self._prepare_arrays(X, y, config)
        place = trained.temporary() if self.workdir is None else disk.expanded(self.workdir)
        run = TrainedRun(place, owns=self.workdir is None)
        if arrays:
            config["data"] |= {"source": "npz", "root": str(Workdir(run.folder).images)}
            _keep(Workdir(run.folder), config, arrays)
        self._train(config, run.folder)
        self._adopt(run)
        if not arrays:
            facts = facts_lib.read(Workdir(run.folder))
            self.classes_, self.image_shape_ = np.array(facts.class_names), facts.image_shape
            self.n_features_in_ = math.prod(facts.image_shape)
        disk.write_object(Workdir(run.folder).estimator, self._content())
        return self

    def predict(self, X: Any) -> npt.NDArray[Any]:
        """Returns the likeliest class of each image, `[n]`, or with `eval__costs` or `eval__recall` what these name.

        `X` is as in `fit`, or a folder, in the order of its paths.
        """
        probs = self.predict_proba(X)
        decided = self.run_.classifier.decisions
        return self.classes_[decided.named(probs) if decided else probs.argmax(axis=1)]

    def predict_proba(self, X: Any) -> npt.NDArray[np.float64]:
        """Returns the probabilities of `classes_`, `[n, K]`, computed in float32; rows sum to one."""
        check_is_fitted(self)
        if isinstance(X, str | os.PathLike):
            rows = self._of_folder(disk.expanded(X))
        else:
            parts = eval_batches(self._pixels(self._examples(X)[0]), _BATCH)
            rows = np.concatenate([self.run_.classifier.probabilities(batch)[mask] for batch, mask in parts])
        return rows.astype(np.float64) / rows.sum(axis=1, keepdims=True, dtype=np.float64)

    def score(self, X: Any, y: Any = None, sample_weight: Any = None) -> float:
        """Returns the accuracy, as scikit-learn's classifiers do; a data set brings its own `y`.

        Under imbalance it says little: `scoring="balanced_accuracy"` is the scorer of the mean over classes.
        """
        if y is None and given.is_data_set(X):
            X, y, _ = given.examples(X, self._fields.get("data__image_size", 0))
        if y is None:
            raise UserError("y: missing; to score a folder of class folders: mfm-jax evaluate RUN --eval_folder=FOLDER")
        return float(super().score(X, y, sample_weight))

    def export(self, folder: str | os.PathLike[str], *, onnx: bool = False) -> dict[str, int]:
        """Writes the classifier as files that need JAX alone, or ONNX (`export.export`); returns their bytes."""
        check_is_fitted(self)
        return export_lib.export(self.run_.folder, Path(folder), onnx=onnx)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes the run, its images included, to a folder: `load` and the commands read it.

        Raises:
          UserError: the folder is not empty.
        """
        check_is_fitted(self)
        place = disk.expanded(folder)
        if place.exists() and (not place.is_dir() or any(place.iterdir())):
            raise UserError(f"folder = {os.fspath(folder)!r}: is there already; choose an empty or a new one")
        self.run_.copy_to(place)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Self:
        """Returns the estimator of a folder that `save` wrote, or of a `workdir`.

        Raises:
          UserError: there is none, or it is damaged.
        """
        run = TrainedRun(disk.expanded(folder), owns=False)
        content = read_object(Workdir(run.folder).estimator, "params", "fitted")
        pairs = {name: _tuple(content["params"][name]) for name in ("image_shape", "value_range")}
        loaded = cls(**(content["params"] | pairs))
        for name, (dtype, value) in content["fitted"].items():
            setattr(loaded, name, np.array(value, dtype) if dtype else _tuple(value))
        loaded._adopt(run)
        return loaded

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.input_tags.three_d_array = True
        return tags

    def _config(self) -> Fields:
        """Returns the fields of the run, its data left open."""
        values = {path: getattr(self, name) for path, name in parameters.NAMED.items()}
        if not isinstance(self.random_state, int | np.integer):
            values["train.seed"] = check_random_state(self.random_state).randint(2**31 - 1)
        return parameters.of_images(values, self._fields, kept=self.workdir is not None)

    def _prepare_folder(self, folder: Path, config: Fields) -> None:
        if not folder.is_dir():
            raise UserError(f"X = {str(folder)!r}: no such folder")
        of_pictures = {"image_size": _FOLDER_SIDE, "test_fraction": 0.0}
        given_here = {name.removeprefix("data__") for name in self._fields}
        config["data"] |= {name: value for name, value in of_pictures.items() if name not in given_here}
        config["data"] |= {"source": "folder", "root": str(folder.absolute())}
        self._set_pad(config, config["data"]["image_size"] or _FOLDER_SIDE)
        self.value_range_ = np.array(self.value_range or (0.0, 255.0))

    def _prepare_arrays(self, X: Any, y: Any, config: Fields) -> dict[str, npt.NDArray[Any]]:
        """Returns the arrays of the run's `images.npz`; learns the classes, the shape and the range."""
        images, labels, names = self._examples(X, y, fitting=True)
        images = numbers.laid_out(images, self.image_shape)
        encoder = LabelEncoder().fit(labels)
        self.classes_, self.image_shape_ = encoder.classes_, images.shape[1:]
        self.n_features_in_ = math.prod(images.shape[1:])
        self.value_range_ = numbers.ends(self.value_range, images, columns=self.image_shape == numbers.ROW)
        pixels = self._pixels(images)
        self._set_pad(config, min(pixels.shape[1:3]))
        config["data"]["image_size"] = 0  # they have it already
        return {
            "train_images": pixels,
            "train_labels": encoder.transform(labels).astype(np.int32),
            "class_names": np.array([names[c] if names else str(c) for c in encoder.classes_]),
        }

    def _set_pad(self, config: Fields, side: int) -> None:
        if "augment__pad" not in self._fields:
            config["augment"]["pad"] = min(config["augment"]["pad"], side // 8)

    def _examples(self, X: Any, y: Any = None, *, fitting: bool = False) -> given.Examples:
        """Returns images as they came, `[n, F]` if flat, with labels in training, checked as scikit-learn does."""
        names: tuple[str, ...] = ()
        if y is None and given.is_data_set(X):
            X, y, names = given.examples(X, self._fields.get("data__image_size", 0))
            if fitting and y is None:
                raise UserError("X: its examples have no label; a class is needed to train")
        X, least = given.array(X), 2 if fitting else 1
        if (X.ndim if hasattr(X, "ndim") else np.asarray(X).ndim) > 2:
            images = check_array(X, allow_nd=True, ensure_min_samples=least, input_name="X", estimator=self)
            if fitting:
                self.__dict__.pop("feature_names_in_", None)  # of another fit
                if y is None:
                    raise UserError("y: missing; images need their labels")
                y = column_or_1d(y, warn=True)
                check_consistent_length(images, y)
        elif fitting:
            images, y = validate_data(self, X, y, ensure_min_samples=least)
        else:
            images = validate_data(self, X, reset=False)
        if fitting:
            check_classification_targets(y)
        return given.Examples(images, y, names)

    def _pixels(self, images: npt.NDArray[Any]) -> Pixels:
        """Returns images as the classifier takes them."""
        images = numbers.laid_out(images, self.image_shape)
        if images.shape[1:] != tuple(self.image_shape_):
            raise UserError(f"X: images are {images.shape[1:]}, in training they were {tuple(self.image_shape_)}")
        if images.dtype != np.uint8 or self.value_range is None:
            images = numbers.to_pixels(images, *self.value_range_, clip=self.value_range is None)
        return resize(images, self._fields.get("data__image_size", 0))

    def _train(self, config: Fields, folder: Path) -> None:
        with contextlib.ExitStack() as stack:
            if not self.verbose:
                stack.enter_context(progress.quiet())
            try:
                train_and_evaluate(config, folder, pages=self.workdir is not None)
            except Interrupted as error:  # no error of this fit alone: a search over several is to end
                raise KeyboardInterrupt(str(error)) from error

    def _adopt(self, run: TrainedRun) -> None:
        files = Workdir(run.folder)
        manifest = read_manifest(files.manifest)
        parts = {name: manifest["splits"][name]["class_counts"] for name in ("train", "meta", "val")}
        self.split_ = parts | {"meta_redrawn": redrawn(manifest)}
        self.results_ = read_object(files.results)
        self.run_ = run

    def _of_folder(self, folder: Path) -> npt.NDArray[np.float32]:
        rows, unread = [], []
        for batch, found in predict_lib.predicted(self.run_.classifier, walk.given([folder], Counter()), _BATCH, 0):
            rows.append(found)
            unread += [f"{item.path}: {item.problem}" for item in batch if item.image is None]
        if unread or not rows:
            raise UserError(f"X = {str(folder)!r}: {'; '.join(unread) or 'no pictures there'}")
        return np.concatenate(rows)

    def _content(self) -> dict[str, Any]:
        """Returns what `load` needs beside the run, ready for JSON."""
        seed = read_object(Workdir(self.run_.folder).config)["train"]["seed"]
        params = self.get_params() | {"random_state": seed, "workdir": self.workdir and os.fspath(self.workdir)}
        fitted = {}
        for name in _FITTED & self.__dict__.keys():
            value = getattr(self, name)
            fitted[name] = (str(value.dtype), value.tolist()) if isinstance(value, np.ndarray) else ("", value)
        return {"params": {name: parameters.plain(value) for name, value in params.items()}, "fitted": fitted}


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _keep(run: Workdir, config: Fields, arrays: dict[str, npt.NDArray[Any]]) -> None:
    """Writes the arrays to the folder of a run, unless they are there."""
    run.claim(config_lib.resolve(config))
    if not (run.images.exists() and run.config.exists()):  # without a config, they are of a start that failed
        part = run.images.with_name(f".{run.images.name}")
        np.savez(part, **arrays)  # type: ignore[arg-type]  # mypy takes one for `allow_pickle`
        part.replace(run.images)
        return
    with np.load(run.images) as there:
        if not all(np.array_equal(there[name], value) for name, value in arrays.items()):
            raise UserError(f"workdir = {str(run.path)!r}: a run began there with other images; choose a new one")
