"""The estimator: what it takes, what it learns, what it keeps, and that it is one of scikit-learn's."""

import pickle
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import environment, shipped
from PIL import Image
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import MinMaxScaler
from sklearn.utils import estimator_checks

import mfm_jax as mfm
from mfm_jax import config as config_lib
from mfm_jax.config import parameters
from mfm_jax.data import given, numbers
from mfm_jax.errors import UserError
from mfm_jax.inference import evaluate
from mfm_jax.workdir.files import Workdir

TINY = {"model": "own_parts:Tiny", "epochs": 1, "train__max_steps": 2, "augment__flip": False}
SHORT = TINY | {"method": "ce", "train__max_steps": 1}
EXPECTED_FAILED_CHECKS = {
    "check_do_not_raise_errors_in_init_or_set_params": "a parameter that does not exist is refused when it is given, as"
    " Python does; the check passes `fields`, the name of the others in the constructor"
}
COUNTS = {"eight": 20, "one": 12, "zero": 2}


def digits() -> tuple[np.ndarray, np.ndarray]:
    """Returns a long-tailed set of three digits, 8x8 in 0..16, with words as labels."""
    found, numbers_of = load_digits(), {"eight": 8, "one": 1, "zero": 0}
    rows = np.concatenate([np.flatnonzero(found.target == numbers_of[k])[:n] for k, n in COUNTS.items()])
    order = np.random.default_rng(0).permutation(len(rows))
    return found.images[rows][order], np.repeat(list(COUNTS), list(COUNTS.values()))[order]


IMAGES, LABELS = digits()
PIXELS = np.rint(IMAGES / 16 * 255).astype(np.uint8)


@pytest.fixture(scope="module", autouse=True)
def alone():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "device_count", lambda: 1)
        yield


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """An estimator that was trained by MFM, in a folder that was named."""
    made = mfm.MFMClassifier(value_range=(0, 16), workdir=tmp_path_factory.mktemp("estimator") / "run", **TINY)
    return made.fit(IMAGES, LABELS)


class TestParameters:
    def test_fields_are_parameters_that_were_given(self):
        made = mfm.MFMClassifier(epochs=3, optim__learning_rate=0.05)
        assert made.get_params()["epochs"] == 3
        assert made.get_params()["optim__learning_rate"] == 0.05
        assert "optim__momentum" not in made.get_params()
        copy = clone(made).set_params(optim__learning_rate=0.1, meta__every=1, method="ce")
        assert copy.get_params() == made.get_params() | {"optim__learning_rate": 0.1, "meta__every": 1, "method": "ce"}
        assert repr(copy) == "MFMClassifier(epochs=3, meta__every=1, method='ce', optim__learning_rate=0.1)"
        assert made.get_params()["optim__learning_rate"] == 0.05

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("optim__learning_rat", r"optim__learning_rat: no such parameter; did you mean optim__learning_rate\?"),
            ("train__epochs", "train__epochs: give it as epochs"),
            ("data__root", "data__root: fit sets it, by what it is given"),
            ("epoch", "epoch: no such parameter"),
        ],
    )
    def test_others_are_refused_at_once(self, name, message):
        with pytest.raises(UserError, match=message):
            mfm.MFMClassifier(**{name: 1})
        if "__" in name:
            with pytest.raises(UserError, match=message):
                mfm.MFMClassifier().set_params(**{name: 1})

    @pytest.mark.parametrize(
        ("params", "message"),
        [
            ({"method": "mfn"}, "method.name = 'mfn': allowed: cdt, ce, "),
            ({"epochs": 0}, "train.epochs = 0: allowed: 1 or more"),
            ({"random_state": 2**31}, "train.seed = 2147483648: allowed"),
            ({"validation_fraction": 1.0}, "data.val_fraction = 1.0: allowed: 0 to 0.9"),
            ({"optim__learning_rate": "fast"}, "optim.learning_rate = 'fast': expected float"),
            ({"value_range": (1, 0)}, r"value_range = \(1, 0\): allowed: \(least, largest\)"),
            ({"value_range": (0, 1)}, r"value_range = \(0, 1\): values reach from 0 to 16; uint8 is taken as it is"),
            ({"data__image_size": "8"}, "data.image_size = '8': expected int, got str"),
            ({"image_shape": "square"}, r"image_shape = 'square': allowed: \(H, W, C\), \(H, W\), 'row' or None"),
            ({"image_shape": (4, 16)}, r"image_shape = \(4, 16\): images are \(8, 8\), which do not have that shape"),
        ],
    )
    def test_values_are_checked_by_fit(self, params, message):
        with pytest.raises(UserError, match=message):
            mfm.MFMClassifier(**({"value_range": (0, 16)} | params)).fit(IMAGES, LABELS)

    def test_the_recipe_is_that_of_the_folder_config(self):
        """But for where images come from, how many are set aside, and what is kept."""
        path = {"method.name": "mfm", "model.name": "resnet20", "train.epochs": 60}
        ours = config_lib.resolve(parameters.of_images(path, {}, kept=True))
        differing = {one.path for one in config_lib.differences(shipped("folder_lt").to_dict(), ours.to_dict())}
        assert differing == {"data.source", "data.image_size", "eval.test", "checkpoint.keep"}


class TestNumbers:
    def test_the_range_becomes_256_levels(self):
        images = np.array([0.0, 0.5, 1.0, 1 / 255]).reshape(1, 2, 2, 1)
        assert numbers.to_pixels(images, 0, 1).ravel().tolist() == [0, 128, 255, 1]
        assert numbers.to_pixels(images - 1, -1, 1).ravel().tolist() == [0, 64, 128, 0]  # 63.75, 127.5 to even, 0.5
        assert numbers.to_pixels(images, 0.5, 0.75, clip=True).ravel().tolist() == [0, 0, 255, 0]
        assert numbers.to_pixels(images, 1, 1, clip=True).ravel().tolist() == [0, 0, 0, 0]

    def test_a_learned_range_is_of_all_values_or_of_each_column(self):
        images = np.array([[1.0, 5.0], [3.0, 4.0]]).reshape(2, 1, 2, 1)
        assert numbers.ends(None, images, columns=False).tolist() == [1, 5]
        assert numbers.ends(None, images, columns=True).reshape(2, 2).tolist() == [[1, 4], [3, 5]]
        assert numbers.ends((0, 16), images, columns=False).tolist() == [0, 16]

    def test_images_are_laid_out(self):
        flat = np.arange(2 * 24).reshape(2, 24)
        assert numbers.laid_out(flat, (2, 4, 3))[0, 0, 1].tolist() == [3, 4, 5]
        assert numbers.laid_out(flat, (4, 6)).shape == (2, 4, 6, 1)
        assert numbers.laid_out(flat, "row").shape == (2, 1, 24, 1)
        assert numbers.laid_out(flat.reshape(2, 4, 6), None).shape == (2, 4, 6, 1)
        with pytest.raises(UserError, match=r"image_shape = None: rows of 24 numbers are pictures of which height"):
            numbers.laid_out(flat, None)
        with pytest.raises(UserError, match=r"X: images are \(2, 3, 4\); needs"):
            numbers.laid_out(flat.reshape(2, 2, 3, 4), None)


class Loader:
    """Batches as a PyTorch loader gives them, of plain arrays."""

    def __iter__(self):
        yield PIXELS[:20], np.arange(20)
        yield PIXELS[20:], np.arange(20, 34)


class TestDataSets:
    def test_what_is_one(self):
        assert not any(map(given.is_data_set, ([1], (1,), "folder", Path("folder"), PIXELS, None)))
        assert all(map(given.is_data_set, (Loader(), iter([]), {})))

    def test_batches_pairs_and_dicts(self):
        pairs, dicts = zip(PIXELS, range(34), strict=True), ({"image": x, "label": i} for i, x in enumerate(PIXELS))
        for found in map(given.examples, (Loader(), pairs, dicts)):
            np.testing.assert_array_equal(found.images, PIXELS[..., None])
            np.testing.assert_array_equal(found.labels, np.arange(34))
            assert found.class_names == ()
        assert given.examples(iter(PIXELS)).labels is None

    def test_pillow_s_pictures_come_in_grey_or_in_colour(self):
        grey, red = Image.fromarray(PIXELS[0]), Image.new("P", (8, 8))
        red.putpalette([255, 0, 0])
        found = given.examples([(grey, 0), (red, 1)].__iter__()).images
        assert found.shape == (2, 8, 8, 3)
        np.testing.assert_array_equal(found[0, ..., 1], PIXELS[0])
        assert found[1, 0, 0].tolist() == [255, 0, 0]
        with pytest.raises(UserError, match="a picture has the mode 'F'; allowed: 1, L, LA, RGB"):
            given.examples(iter([(Image.new("F", (8, 8)), 0)]))

    def test_several_shapes_need_a_size(self):
        items = [(PIXELS[0], 0), (np.repeat(PIXELS[1], 2, axis=0), 1)]
        with pytest.raises(UserError, match=r"images differ in shape: \(8, 8, 1\), \(16, 8, 1\); make them equal, or"):
            given.examples(iter(items))
        np.testing.assert_array_equal(given.examples(iter(items), 8).images, PIXELS[:2, ..., None])

    @pytest.mark.parametrize(
        ("items", "message"),
        [
            ([], "has no example"),
            ([{"img": 1, "label": 2}], "an example has the fields img, label; needs image, and label to train"),
            ([(1, 2, 3)], r"an example has 3 parts; needs a pair"),
            ([("a.png", 2)], "an image is str; needs an array"),
            ([(np.zeros(3), 2)], r"an image is float64 \(3,\); needs \[H, W, C\] or \[H, W\]"),
        ],
    )
    def test_others_are_refused(self, items, message):
        with pytest.raises(UserError, match=message):
            given.examples(iter(items))
        with pytest.raises(UserError, match="X: its examples have no label"):
            mfm.MFMClassifier().fit(iter(PIXELS))

    def test_pytorch_s_have_their_channels_first(self):
        torch = pytest.importorskip("torch", reason="torch is not installed")
        colour = np.repeat(PIXELS[:4, None], 3, axis=1) * np.array([1, 0, 1], np.uint8)[:, None, None]
        pairs = torch.utils.data.TensorDataset(torch.tensor(colour), torch.arange(4))
        for source in (pairs, torch.utils.data.DataLoader(pairs, batch_size=3)):
            found = given.examples(source)
            np.testing.assert_array_equal(found.images, np.moveaxis(colour, 1, -1))
            np.testing.assert_array_equal(found.labels, np.arange(4))
        np.testing.assert_array_equal(given.array(torch.tensor(colour)), np.moveaxis(colour, 1, -1))

    def test_hugging_face_s_name_their_classes(self):
        datasets = pytest.importorskip("datasets", reason="datasets is not installed")
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
        rows = {"image": [Image.fromarray(x) for x in PIXELS[:4]], "label": [0, 1, 1, 0]}
        source = datasets.Dataset.from_dict(rows, features=features)
        assert given.is_data_set(source)
        found = given.examples(source)
        np.testing.assert_array_equal(found.images, PIXELS[:4, ..., None])
        assert (found.labels.tolist(), found.class_names) == ([0, 1, 1, 0], ("a", "b"))

    def test_tensorflow_s_are_read_as_arrays(self):
        tf = pytest.importorskip("tensorflow", reason="tensorflow is not installed")
        source = tf.data.Dataset.from_tensor_slices((PIXELS, np.arange(34)))
        for one in (source, source.batch(5)):
            found = given.examples(one)
            np.testing.assert_array_equal(found.images, PIXELS[..., None])
            np.testing.assert_array_equal(found.labels, np.arange(34))


class TestFit:
    def test_it_says_what_it_did(self, fitted):
        assert fitted.classes_.tolist() == ["eight", "one", "zero"]
        assert (fitted.image_shape_, fitted.n_features_in_) == ((8, 8, 1), 64)
        counts = {"train": [20, 12, 2], "meta": [2, 2, 2], "val": [0, 0, 0]}
        assert fitted.split_ == counts | {"meta_redrawn": True}
        config = Workdir(fitted.run_.folder).read_config()
        assert (config.train.batch_size, config.meta.batch_size) == (34, 6)  # of 50, what there is
        assert (config.augment.pad, config.data.imbalance_factor, config.train.seed) == (1, 1.0, 0)

    def test_its_results_are_of_the_training_images(self, fitted):
        assert fitted.results_["split"] == "train"
        assert fitted.results_["last"]["test"] is fitted.results_["last"]["val"] is None
        assert fitted.results_["last"]["train"]["accuracy"] == pytest.approx(fitted.score(IMAGES, LABELS))
        page = Workdir(fitted.run_.folder).report.read_text()
        assert "Training split" in page
        assert "These images were trained on" in page

    def test_probabilities_are_of_the_classes(self, fitted):
        rows = fitted.predict_proba(IMAGES)
        assert (rows.shape, rows.dtype) == ((34, 3), np.float64)
        np.testing.assert_allclose(rows.sum(axis=1), 1, rtol=1e-12)
        np.testing.assert_array_equal(fitted.predict(IMAGES), fitted.classes_[rows.argmax(axis=1)])
        run = mfm.load(fitted.run_.folder)
        np.testing.assert_allclose(rows, run.probabilities(PIXELS[..., None]), atol=1e-6)

    def test_every_form_of_the_same_images_is_predicted_alike(self, fitted):
        rows = fitted.predict_proba(IMAGES)
        for same in (PIXELS, IMAGES[..., None], IMAGES.astype(np.float32), iter(PIXELS), Loader()):
            np.testing.assert_array_equal(fitted.predict_proba(same), rows)
        with pytest.raises(UserError, match=r"X: images are \(8, 7, 1\), in training they were \(8, 8, 1\)"):
            fitted.predict(PIXELS[:, :, :7])
        with pytest.raises(UserError, match="y: missing"):
            fitted.score(IMAGES)

    def test_the_same_again_is_not_trained_again(self, fitted, capfd):
        before = Workdir(fitted.run_.folder).results.stat().st_mtime_ns
        again = clone(fitted).fit(IMAGES, LABELS)
        assert Workdir(fitted.run_.folder).results.stat().st_mtime_ns == before
        np.testing.assert_array_equal(again.predict_proba(IMAGES), fitted.predict_proba(IMAGES))
        with pytest.raises(UserError, match="a run began there with other images; choose a new one"):
            clone(fitted).fit(IMAGES[::-1], LABELS)
        with pytest.raises(UserError, match="belongs to another config"):
            clone(fitted).set_params(epochs=2, optim__learning_rate=0.2).fit(IMAGES, LABELS)
        assert capfd.readouterr() == ("", "")

    def test_only_the_verbose_one_prints(self, capfd):
        made = mfm.MFMClassifier(random_state=None, validation_fraction=0.2, **SHORT).fit(PIXELS, np.arange(34) % 2)
        assert capfd.readouterr() == ("", "")
        assert (made.split_["val"], made.results_["split"]) == ([3, 3], "val")
        assert not Workdir(made.run_.folder).report.exists()  # made where it is saved
        mfm.MFMClassifier(verbose=1, **SHORT).fit(PIXELS, np.arange(34) % 2)
        assert "2 training images" not in (out := capfd.readouterr().out)
        assert "34 training images (17..17 a class), 10 meta a class, 0 validation, 0 test; 8x8x1" in out

    def test_a_folder_of_class_folders(self, tmp_path):
        for i, (pixels, label) in enumerate(zip(PIXELS, LABELS, strict=True)):
            (tmp_path / "set" / label).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(tmp_path / "set" / label / f"{i:02}.png")
        made = mfm.MFMClassifier(data__image_size=8, **SHORT).fit(tmp_path / "set")
        assert (made.classes_.tolist(), made.n_features_in_) == (["eight", "one", "zero"], 64)
        assert made.split_["train"] == [20, 12, 2]
        rows = made.predict_proba(tmp_path / "set" / "zero")
        np.testing.assert_allclose(rows, made.predict_proba(PIXELS[LABELS == "zero"]), atol=1e-6)
        with pytest.raises(UserError, match=r"X = '.*none': no such folder"):
            clone(made).fit(tmp_path / "none")


class TestKeeping:
    def test_a_pickle_works_in_another_process(self, fitted, tmp_path):
        (tmp_path / "estimator.pkl").write_bytes(pickle.dumps(fitted))
        np.save(tmp_path / "images.npy", IMAGES)
        code = (
            "import pickle, numpy as np; made = pickle.load(open('estimator.pkl', 'rb'));"
            "np.save('rows.npy', made.predict_proba(np.load('images.npy'))); print(made.run_.folder)"
        )
        run = [sys.executable, "-c", code]
        done = subprocess.run(run, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=True)
        assert done.stderr == ""
        assert not Path(done.stdout.strip()).exists()  # it went with the process
        np.testing.assert_allclose(np.load(tmp_path / "rows.npy"), fitted.predict_proba(IMAGES), atol=1e-6)

    def test_what_is_saved_is_loaded(self, fitted, tmp_path):
        fitted.save(tmp_path / "saved")
        loaded = mfm.MFMClassifier.load(tmp_path / "saved")
        params = fitted.get_params()
        assert loaded.get_params() == params | {"workdir": str(params["workdir"])}
        np.testing.assert_array_equal(loaded.predict_proba(IMAGES), fitted.predict_proba(IMAGES))
        assert (loaded.split_, loaded.results_) == (fitted.split_, fitted.results_)
        with pytest.raises(UserError, match="is there already; choose an empty or a new one"):
            fitted.save(tmp_path / "saved")
        with pytest.raises(UserError, match="no such file"):
            mfm.MFMClassifier.load(tmp_path)

    def test_the_commands_work_from_what_is_saved(self, fitted, tmp_path):
        fitted.save(tmp_path / "saved")
        config = Workdir(tmp_path / "saved").read_config()
        assert config.data.root == str(tmp_path / "saved" / "images.npz")
        results, _ = evaluate.evaluate_run(config, tmp_path / "saved")
        assert results["split"] == "train"
        assert results["last"]["train"]["accuracy"] == fitted.results_["last"]["train"]["accuracy"]

    def test_a_temporary_run_goes_with_its_estimator(self):
        made = mfm.MFMClassifier(**SHORT).fit(PIXELS, np.arange(34) % 2)
        copy = pickle.loads(pickle.dumps(made))
        folders = [one.run_.folder for one in (made, copy)]
        assert folders[0] != folders[1]
        np.testing.assert_array_equal(copy.predict_proba(PIXELS), made.predict_proba(PIXELS))
        del made, copy
        assert not any(folder.exists() for folder in folders)


class TestScikitLearn:
    """Labels are balanced, and split so that every fit has the shapes of the one before."""

    X, Y = IMAGES.reshape(34, 64)[:32], np.tile([0, 1], 16)

    def test_cross_val_score(self):
        made = mfm.MFMClassifier(image_shape=(8, 8, 1), value_range=(0, 16), **SHORT)
        scores = cross_val_score(made, self.X, self.Y, cv=2, scoring="balanced_accuracy", error_score="raise")
        assert scores.shape == (2,)

    def test_grid_search_cv(self):
        made = mfm.MFMClassifier(image_shape=(8, 8, 1), value_range=(0, 16), **SHORT)
        grid, half = {"optim__learning_rate": [0.0, 0.1]}, np.arange(16)
        search = GridSearchCV(made, grid, cv=[(half, half + 16)], refit=False, error_score="raise")
        found = search.fit(self.X, self.Y).cv_results_
        assert [params["optim__learning_rate"] for params in found["params"]] == [0.0, 0.1]

    def test_pipeline(self):
        last = mfm.MFMClassifier(image_shape=(8, 8, 1), **SHORT)
        made = Pipeline([("scale", MinMaxScaler(clip=True)), ("mfm", last)]).set_params(mfm__optim__learning_rate=0.2)
        made.fit(self.X[:16], self.Y[:16])
        assert made.predict(self.X).shape == (32,)
        assert Workdir(made[-1].run_.folder).read_config().optim.learning_rate == 0.2

    @pytest.mark.parametrize(
        "check",
        [
            estimator_checks.check_no_attributes_set_in_init,
            estimator_checks.check_parameters_default_constructible,
            estimator_checks.check_get_params_invariance,
            estimator_checks.check_set_params,
            estimator_checks.check_estimators_unfitted,
            estimator_checks.check_estimators_nan_inf,
            estimator_checks.check_requires_y_none,
            estimator_checks.check_fit1d,
            estimator_checks.check_fit2d_1sample,
            estimator_checks.check_classifiers_one_label,
            estimator_checks.check_estimator_sparse_tag,
            estimator_checks.check_n_features_in_after_fitting,
        ],
        ids=lambda check: check.__name__,
    )
    def test_essential_checks(self, check):
        check("MFMClassifier", mfm.MFMClassifier(image_shape="row", value_range=None, **SHORT))

    @pytest.mark.slow
    @pytest.mark.filterwarnings("default")  # scikit-learn's checks bring warnings about
    def test_every_check(self):
        """About fifty trainings, of a network that compiles quickly."""
        fields = {"model": "own_parts:Tiny", "epochs": 10, "image_shape": "row", "value_range": None}
        made = mfm.MFMClassifier(method="ce", augment__flip=False, **fields)
        found = estimator_checks.check_estimator(
            made, expected_failed_checks=EXPECTED_FAILED_CHECKS, on_fail=None, on_skip=None
        )
        assert not [(one["check_name"], one["exception"]) for one in found if one["status"] == "failed"]
        assert {one["check_name"] for one in found if one["status"] == "xfail"} == EXPECTED_FAILED_CHECKS.keys()
