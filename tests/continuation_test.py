"""What may change in a run that has begun, and what a run does that goes on so, or for more epochs than it had."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import changed, configured, quick_runs, stopped_at
from PIL import Image

from mfm_jax import config as config_lib
from mfm_jax import data as data_lib
from mfm_jax.config import FIELDS, Config
from mfm_jax.errors import UserError
from mfm_jax.fields import Field
from mfm_jax.inference import evaluate as evaluation
from mfm_jax.machine.interruption import Interrupted
from mfm_jax.study import runs
from mfm_jax.training import train
from mfm_jax.workdir.files import Workdir, read_object

MAY_CHANGE = {
    *("data.source", "data.root", "data.train_list", "data.val_list", "data.meta_list", "data.test_list"),
    *("data.on_bad_image", "data.workers", "data.manifest", "train.loggers", "eval.batch_size", "checkpoint.keep"),
    "model.scan_blocks",
}
SETTLED = changed(Config(), train={"dtype": "float32"})  # as a run leaves its config: `auto` is decided
BEGUN = SETTLED.to_dict()


def tiny(**overrides) -> Config:
    """Returns a config of two epochs of three steps."""
    # The end of a part validates and saves all the same.
    seldom = {"eval__every_epochs": 3, "checkpoint__every_epochs": 3}
    fields = {"data__val_images_per_class": 3, "data__imbalance_factor": 20.0, "train__dtype": "float32"}
    return configured("mfm", **seldom | fields | overrides)


@pytest.fixture(autouse=True, scope="module")
def _small():
    with quick_runs():
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of two epochs."""
    folder = tmp_path_factory.mktemp("runs") / "two"
    train.train_and_evaluate(tiny(), folder)
    return folder


@pytest.fixture(scope="module")
def restarted(tmp_path_factory):
    """A run of four epochs, that was planned as two and two from its start."""
    folder = tmp_path_factory.mktemp("runs") / "four"
    train.train_and_evaluate(tiny(train__epochs=4, optim__restarts="2"), folder)
    return folder


@pytest.fixture
def copy(finished, tmp_path):
    """A copy of the finished run, which a test may go on with."""
    return Workdir(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def cut(copy):
    """The same, stopped before its results were written."""
    copy.results.unlink()
    copy.report.unlink()
    return copy


def other(field: Field) -> object:
    """Returns a value of a field that is not its default."""
    if field.choices:
        return next(choice for choice in reversed(field.choices) if choice != field.default)
    return {bool: not field.default, str: f"{field.default}x"}.get(field.kind, field.kind(field.default or 1) * 2)


# --- which fields ---------------------------------------------------------------------------------


@pytest.mark.parametrize("path", FIELDS)
def test_every_field_may_change_or_not(path):
    group, name = path.split(".")
    found = config_lib.changes({**BEGUN, group: {**BEGUN[group], name: other(FIELDS[path])}}, SETTLED)
    assert [change.path for change in found] == [path]
    assert (config_lib.problem(found, SETTLED) == "") == (path in MAY_CHANGE)
    assert FIELDS[path].may_change == (path in MAY_CHANGE)


@pytest.mark.parametrize("path", FIELDS)
def test_a_field_that_is_new_had_its_default(path):
    group, name = path.split(".")
    began = {**BEGUN, group: {key: value for key, value in BEGUN[group].items() if key != name}}
    assert config_lib.changes(began, Config()) == []
    asked = config_lib.Config(**{group: type(getattr(Config(), group))(**{name: other(FIELDS[path])})})
    assert config_lib.changes(began, asked) == [(path, FIELDS[path].default, other(FIELDS[path]))]


def test_a_group_that_is_new_has_defaults_and_a_field_that_is_gone_makes_another_config():
    assert config_lib.changes({name: group for name, group in BEGUN.items() if name != "parallel"}, Config()) == []
    assert config_lib.changes({}, Config()) == []
    gone = config_lib.changes(BEGUN | {"parallel": {"depth": 3}}, Config())
    assert config_lib.problem(gone, Config()) == (
        "belongs to another config (parallel.depth: 3 -> null); choose a new one"
    )


# --- going on -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ({"data__root": "/elsewhere"}, "data.root = '/elsewhere' (was '')"),
        ({"data__workers": 0, "eval__batch_size": 7}, "data.workers = 0 (was 2), eval.batch_size = 7 (was 500)"),
        ({"checkpoint__keep": 1}, "checkpoint.keep = 1 (was 2)"),
        ({"data__manifest": "manifest.json"}, "data.manifest = 'manifest.json' (was '')"),
    ],
)
def test_a_run_goes_on_with_what_may_change_and_says_so(cut, finished, capsys, monkeypatch, overrides, told):
    monkeypatch.chdir(cut.path)
    results = train.train_and_evaluate(tiny(**overrides), cut.path)
    assert f"going on with {told}\n" in capsys.readouterr().out
    before = read_object(Workdir(finished).results)
    np.testing.assert_allclose(results["last"]["test"]["nll"], before["last"]["test"]["nll"], rtol=1e-6)
    assert cut.read_config() == tiny(**overrides)
    train.train_and_evaluate(tiny(**overrides), cut.path)
    assert "going on" not in capsys.readouterr().out


def test_a_run_without_a_field_that_is_new_goes_on(cut, capsys):
    fields = read_object(cut.config)
    del fields["optim"]["restarts"], fields["model"]["init_from"]
    cut.config.write_text(json.dumps(fields))
    train.train_and_evaluate(tiny(), cut.path)
    assert "going on" not in capsys.readouterr().out


def test_what_may_change_does_not_cover_what_may_not(cut):
    with pytest.raises(UserError, match=r"belongs to another config \(train.seed: 0 -> 1\); choose a new one"):
        train.train_and_evaluate(tiny(data__root="/elsewhere", train__seed=1), cut.path)
    assert cut.read_config() == tiny()


def save(folder: Path, shift: int = 0) -> Path:
    for number, name in enumerate(("cat", "dog")):
        (folder / name).mkdir(parents=True)
        for i in range(12):
            pixels = np.random.default_rng([number, i + shift]).integers(0, 256, (6, 6), np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


def of_folder(root: Path) -> Config:
    natural = {"data__protocol": "natural", "data__imbalance_factor": 1.0, "data__val_images_per_class": 0}
    return tiny(data__source="folder", data__root=str(root), data__workers=0, **natural)


def test_the_manifest_decides_whether_a_folder_elsewhere_is_the_same(tmp_path, capsys):
    run, config = Workdir(tmp_path / "run"), of_folder(save(tmp_path / "one"))
    run.claim(config)
    run.begin(config, data_lib.build(config).manifest, {})
    other = of_folder(save(tmp_path / "two", shift=1))
    run.claim(other)
    with pytest.raises(UserError, match=r"manifest.json: the data or its split is not what this run began with"):
        run.check_split(data_lib.build(other).manifest)
    shutil.move(tmp_path / "one", tmp_path / "renamed")
    moved = of_folder(tmp_path / "renamed")
    run.claim(moved)
    manifest = data_lib.build(moved).manifest
    run.check_split(manifest)
    run.begin(moved, manifest, {})
    assert capsys.readouterr().out == (f"going on with data.root = '{tmp_path}/renamed' (was '{tmp_path}/one')\n")
    assert run.read_config() == moved


def test_a_finished_run_is_not_the_answer_for_data_elsewhere(copy):
    assert copy.is_finished(tiny())
    assert copy.is_finished(tiny(data__workers=0, eval__batch_size=7))
    assert not copy.is_finished(tiny(data__root="/elsewhere"))


def test_images_of_another_size_are_refused(cut):
    facts = read_object(cut.facts)
    cut.facts.write_text(json.dumps(facts | {"image_shape": [4, 4, 1]}))
    with pytest.raises(UserError, match=r"began with images of \[4, 4, 1\], now they are of \[8, 8, 1\]"):
        train.train_and_evaluate(tiny(), cut.path)


def test_images_normalised_otherwise_are_refused(cut):
    facts = read_object(cut.facts)
    cut.facts.write_text(json.dumps(facts | {"std": [facts["std"][0] * 1.01]}))
    with pytest.raises(UserError, match=r"classifier.json: this run began with std = \[.*\] of its images, now"):
        train.train_and_evaluate(tiny(), cut.path)


# --- more epochs ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (
            {},
            "has a run of train.epochs = 2, for which its learning rates were planned; to go on to 4, with a plan that"
            " begins anew after epoch 2, set optim.restarts = '2'; for one plan over all, choose a new one",
        ),
        ({"optim__restarts": "3"}, "begins anew after epoch 2, set optim.restarts = '2'"),
        ({"optim__restarts": "1,2"}, "begins anew after epoch 2, set optim.restarts = '2'"),
        ({"train__max_steps": 9}, r"belongs to another config \(train.epochs: 2 -> 4; train.max_steps: 0 -> 9\)"),
        ({"optim__restarts": "2", "optim__momentum": 0.5}, r"another config \(optim.momentum: 0.9 -> 0.5; optim.rest"),
        ({"train__epochs": 1}, r"belongs to another config \(train.epochs: 2 -> 1\); choose a new one"),
        ({"train__epochs": 2, "optim__restarts": "1"}, r"another config \(optim.restarts: \"\" -> \"1\"\)"),
    ],
)
def test_more_epochs_are_asked_for_in_words(copy, overrides, told):
    with pytest.raises(UserError, match=f"^--workdir={copy.path} .*{told}") as error:
        train.train_and_evaluate(tiny(**{"train__epochs": 4} | overrides), copy.path)
    assert "\n" not in str(error.value)
    assert copy.results.exists()
    assert copy.read_config() == tiny()


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"name": "crt"}, "crt divides into parts"),
        ({"sampling": "progressive"}, "mfm divides into parts"),
        ({"base": "ldam_drw"}, "mfm divides into parts"),
        ({"max_steps": 3}, "train.max_steps = 3 ends"),
    ],
)
def test_a_plan_that_cannot_begin_anew_is_refused(config, why):
    begun = {f"{'train' if name == 'max_steps' else 'method'}__{name}": value for name, value in config.items()}
    began, asked = (tiny(train__epochs=epochs, **begun) for epochs in (2, 4))
    told = config_lib.problem(config_lib.changes(began.to_dict(), asked), asked)
    assert told.startswith(f"has a run of train.epochs = 2, which {why}")
    assert told.endswith("for 4, choose a new one")


def same_run(one: Path, two: Path) -> None:
    assert (one / "metrics.jsonl").read_text() == (two / "metrics.jsonl").read_text()
    for which in ("last", "best"):
        assert read_object(Workdir(one).results)[which] == read_object(Workdir(two).results)[which]


def test_a_finished_run_that_is_extended_is_the_run_that_was_planned_so(copy, restarted, capsys):
    before = copy.results.read_bytes()
    asked = tiny(train__epochs=4, optim__restarts="2")
    results = train.train_and_evaluate(asked, copy.path)
    same_run(copy.path, restarted)
    assert results["last"]["epoch"] == 4
    assert results["restarts"] == [results["last"]["step"] // 2]
    assert (copy.path / "results-of-2-epochs.json").read_bytes() == before
    assert "restarts" in copy.report.read_text()
    assert copy.read_config() == asked
    out = capsys.readouterr().out
    assert "going on with optim.restarts = '2' (was ''), train.epochs = 4 (was 2)\n" in out
    assert "results-of-2-epochs.json; at the new end, test is read again\n" in out
    with pytest.raises(UserError, match=r"belongs to another config \(optim.restarts: \"2\" -> \"\"; train.epochs"):
        train.train_and_evaluate(tiny(), copy.path)
    written = copy.results.stat().st_mtime_ns
    assert train.train_and_evaluate(asked, copy.path)["restarts"] == results["restarts"]
    assert copy.results.stat().st_mtime_ns == written


def test_an_interrupted_run_that_is_extended_is_the_same(restarted, tmp_path):
    with stopped_at(2), pytest.raises(Interrupted, match="saved at step 2"):
        train.train_and_evaluate(tiny(), tmp_path)
    train.train_and_evaluate(tiny(train__epochs=4, optim__restarts="2"), tmp_path)
    same_run(tmp_path, restarted)
    assert not list(tmp_path.glob("results-of*"))


def test_a_run_is_extended_twice_and_among_others(copy):
    three, four = (tiny(train__epochs=n, optim__restarts=r) for n, r in ((3, "2"), (4, "2, 3")))
    for epochs, config in ((2, three), (3, four)):
        copy.results.write_text(f"[{epochs}]")
        copy.claim(config)
        assert not copy.is_finished(config)
        assert runs._planned([runs.Task("again", config, copy.path)]).outcomes is None  # it is to be trained
        copy.begin(config, {}, {})
        assert not copy.results.exists()
    earlier = {path.name: path.read_text() for path in copy.path.glob("results-of*")}
    assert earlier == {"results-of-2-epochs.json": "[2]", "results-of-3-epochs.json": "[3]"}
    with pytest.raises(UserError, match=r"begins anew after epoch 4, set optim.restarts = '2, 3,4'"):
        copy.claim(tiny(train__epochs=5, optim__restarts="2, 3"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"optim__restarts": "two"}, "optim.restarts = 'two': expected epochs, comma-separated, e.g. '60,90'"),
        ({"optim__restarts": "1,"}, "optim.restarts = '1,': expected epochs, comma-separated, e.g. '60,90'"),
        ({"optim__restarts": "2"}, "optim.restarts = '2': expected rising numbers above optim.warmup"),
        ({"optim__restarts": "1,1", "train__epochs": 3}, "optim.restarts = '1,1': expected rising numbers"),
        ({"optim__restarts": "1", "optim__warmup_epochs": 1}, "optim.restarts = '1': expected rising numbers above"),
        ({"optim__restarts": "1", "method__name": "lws"}, "optim.restarts = '1': lws has one plan for all of"),
    ],
)
def test_restarts_that_make_no_plan_are_refused(overrides, message):
    with pytest.raises(UserError) as error:
        tiny(**overrides)
    assert str(error.value).startswith(message)


def test_an_evaluation_takes_what_may_change_and_no_other_length(copy):
    with pytest.raises(UserError, match=r"train.epochs: 2 -> 4\); leave --config and these out"):
        evaluation.evaluate_run(tiny(train__epochs=4), copy.path)
