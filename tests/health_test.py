"""A run that has come to nothing says so, once; rows on both sides of each bound, and collapses that are planted."""

import itertools
import math
import shutil
from collections import Counter

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import logged, overridden, shipped, slow

from mfm_jax import config as config_lib
from mfm_jax.bilevel import losses
from mfm_jax.evaluation import health
from mfm_jax.training import recipe, train
from mfm_jax.workdir import finished

GUESS = health.Guess(equal=2.3, by_count=3.2, accuracy=0.4)
CONFIG = config_lib.Config()
pytestmark = pytest.mark.usefixtures("one_device")


def rows(*epochs, steps=200, **same):
    """Returns the rows of epochs of `steps` steps; each a dict of what is not as in a healthy run, `same` for all."""
    found = []
    for epoch, given in enumerate(epochs):
        # phi moves by 0.01 an epoch.
        healthy = {"accuracy": 0.9, "meta_loss": 1.5, "hypergrad_norm": 0.1, "learning_rate": 0.1}
        healthy |= {"gamma": [0.01 * epoch, -0.1], "beta": [1.0, -2.0]}
        values, place = healthy | same | given, {"step": steps * (epoch + 1), "epoch": epoch}
        site = {name: values.pop(name) for name in ("gamma", "beta")}
        scalars = {name: value for name, value in values.items() if value is not None}
        found += [{"kind": "train"} | place | scalars, {"kind": "modulation"} | place | {"sites": {"logits": site}}]
    return found


def codes(rows, config=CONFIG):
    return [notice.code for notice in health.notices(rows, config, GUESS)]


def test_a_healthy_run_is_told_nothing():
    healthy = rows(*[{}] * 10)
    assert not any(codes(healthy[:end]) for end in range(0, 21, 2))


@pytest.mark.parametrize(
    ("accuracy", "meta_loss", "told"),
    [(0.71, 2.29, False), (0.71, 2.31, True), (0.69, 2.31, False), (0.69, 3.19, False), (0.69, 3.21, True)],
)
def test_meta_loss_above_a_guess(accuracy, meta_loss, told):
    """A classifier that does not fit its training images yet may have learned no more than how often classes come."""
    found = rows({}, {"accuracy": accuracy, "meta_loss": meta_loss})
    assert codes(found) == ["meta_loss"] * told
    if told:
        (notice,) = health.notices(found, CONFIG, GUESS)
        assert notice.sentence.startswith(
            f"meta_loss = {meta_loss} in epoch 1, above the {2.3 if accuracy > 0.7 else 3.2}"
        )
        assert "meta.bn" in notice.sentence


@pytest.mark.parametrize(("steps", "meta_loss", "told"), [(99, 22, False), (99, 24, True), (100, 22, True)])
def test_the_first_steps_have_room(steps, meta_loss, told):
    assert codes(rows({}, {"meta_loss": meta_loss}, steps=steps)) == ["meta_loss"] * told


@pytest.mark.parametrize(
    ("norms", "told"),
    [
        ((0.01, 0.99), False),
        ((0.01, 1.01), True),
        ((0.01, 0.1, 0.5, 1.01), True),  # within three epochs
        ((0.01, 0.1, 0.5, 0.9, 1.01), False),
        ((0.0, 1.01), False),  # of what was learned from nothing
        ((None, 1.01), False),
        ((1.0, 0.001), False),
    ],
)
def test_a_norm_that_jumps(norms, told):
    found = rows(*({"hypergrad_norm": norm, "meta_loss": 1.5 if norm is not None else None} for norm in norms))
    assert codes(found) == ["meta_gradient"] * told
    if told:
        assert "101 times that of epoch 0" in health.notices(found, CONFIG, GUESS)[0].sentence


@pytest.mark.parametrize(("rate", "told"), [(0.1, False), (0.0005, True), (0.00001, True)])
def test_a_norm_that_rises_with_the_learning_rate_is_no_jump(rate, told):
    """A restart of the schedule: the virtual step is as long as the rate."""
    before = {"hypergrad_norm": 0.01, "learning_rate": 0.0001}
    assert codes(rows(before, {"hypergrad_norm": 6.0, "learning_rate": rate})) == ["meta_gradient"] * told


@pytest.mark.parametrize(
    ("epochs", "moves", "same", "told"),
    [
        (4, 0.0009, {}, True),
        (4, 0.0011, {}, False),
        (3, 0.0, {}, False),
        (4, 0.0, {"meta_loss": 1.1}, False),  # converged
        (4, 0.0, {"meta_loss": None}, False),  # before meta.start_epoch, or frozen
    ],
)
def test_phi_that_stands_still(epochs, moves, same, told):
    found = rows(*({"gamma": [moves * epoch, 0.0]} for epoch in range(epochs)), **same)
    assert codes(found) == ["phi_still"] * told
    if told:
        assert "look at meta.learning_rate" in health.notices(found, CONFIG, GUESS)[0].sentence


@pytest.mark.parametrize(("rate", "told"), [(0.026, True), (0.024, False)])
def test_phi_may_rest_when_the_learning_rate_is_low(rate, told):
    still = {"gamma": [0.1, 0.0]}
    assert codes(rows(*[still] * 2, *[still | {"learning_rate": rate}] * 3)) == ["phi_still"] * told


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [("gamma", -0.981, True), ("gamma", 0.979, False), ("beta", 20.1, True), ("beta", -19.9, False)],
)
def test_phi_at_its_bound_for_three_epochs(name, value, told):
    at_bound = [{name: [0.01 * epoch, value]} for epoch in range(3)]
    assert codes(rows(*at_bound)) == ["phi_bound"] * told
    assert not codes(rows({}, *at_bound[:2]))
    if told:
        (notice,) = health.notices(rows(*at_bound), CONFIG, GUESS)
        assert notice.sentence.startswith(f"{name} at site 'logits' is {value}")


def test_only_a_bounded_gamma_has_a_bound():
    direct = config_lib.resolve({"modulation": {"form": "direct"}})
    found = rows(*({"gamma": [1.5 + epoch, 0.0]} for epoch in range(3)))
    assert (codes(found), codes(found, direct)) == (["phi_bound"], [])


def test_each_sign_is_told_once_and_a_method_without_gamma_is_heard_too():
    found = [row for row in rows({}, {"meta_loss": 9.0, "hypergrad_norm": 50.0}) if row["kind"] == "train"]
    first = health.notices(found, CONFIG, GUESS)
    assert [notice.code for notice in first] == ["meta_loss", "meta_gradient"]
    told = [{"kind": health.KIND, "step": 400, "epoch": 1} | notice._asdict() for notice in first]
    assert not codes(found + told)
    assert codes(found + told[:1]) == ["meta_gradient"]


@pytest.mark.parametrize("meta", [{}, {"temperature": 2.0}, {"loss": "gce"}, {"loss": "gce", "temperature": 0.5}])
def test_the_loss_of_guesses(meta):
    counts = np.array([500, 60, 7])
    loss = recipe.meta_loss(config_lib.resolve({"meta": meta}))
    shares = (counts / counts.sum()) ** (1 / meta.get("temperature", 1.0))

    def mean(share):
        nats = -np.log(share / share.sum())
        return np.mean((1 - np.exp(-0.7 * nats)) / 0.7 if "loss" in meta else nats)

    equal, by_count = losses.of_guesses(loss, jnp.asarray(counts))
    assert (equal, by_count) == pytest.approx((mean(np.ones(3)), mean(shares)), rel=1e-5)
    assert by_count > equal
    if not meta:
        assert equal == pytest.approx(math.log(3))


def planted(**overrides):
    """Returns the config of the digits, nine steps an epoch; overrides as `group__field=value`."""
    config = shipped("digits_lt")
    config.eval.every_epochs, config.checkpoint.every_epochs, config.meta.bn = 100, 1, "running"
    return overridden(config, **overrides)


@pytest.mark.parametrize(
    ("code", "overrides"),
    [
        ("phi_still", {"meta__learning_rate": 1e-6, "optim__learning_rate": 0.005, "train__max_steps": 36}),
        ("phi_bound", {"meta__learning_rate": 1.0, "train__max_steps": 27}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.usefixtures("quick_runs")
def test_a_planted_collapse_is_told_once_and_shown(tmp_path, capfd, code, overrides):
    train.train_and_evaluate(planted(**overrides), tmp_path)
    warnings = [row for row in logged(tmp_path) if row["kind"] == "warning"]
    assert Counter(row["code"] for row in warnings)[code] == 1
    sentences = [row["sentence"] for row in warnings]
    told = " ".join(capfd.readouterr().err.split())
    page = " ".join((tmp_path / "report.html").read_text().split())
    for sentence in sentences:
        assert told.count(f"warning: {sentence}") == 1
        assert page.count(f"<li>{sentence.replace(chr(39), '&#39;')}</li>") == 1
    assert finished.warnings(tmp_path) == sentences


def test_pictures_that_spoil_from_the_second_epoch_on_are_told(tmp_path, stepping):
    """A million times as bright: the running averages are still those of the pictures before."""
    stepping(lambda step, data: data.replace(std=(1e-6 if step >= 9 else 1.0) * data.std))
    train.train_and_evaluate(planted(train__max_steps=18), tmp_path)
    warnings = {row["code"]: row["sentence"] for row in logged(tmp_path) if row["kind"] == "warning"}
    assert warnings.keys() == {"meta_loss", "meta_gradient"}
    assert "times that of epoch 0" in warnings["meta_gradient"]


def test_a_run_that_goes_on_is_told_nothing_again(tmp_path, capfd):
    config = planted(optim__learning_rate=5.0, train__epochs=2)
    train.train_and_evaluate(config, tmp_path)
    before = logged(tmp_path)
    assert capfd.readouterr().err.count("warning: meta_loss = ") == 1
    assert [row["code"] for row in before if row["kind"] == "warning"] == ["meta_loss"]
    assert finished.warnings(tmp_path)[0] in (tmp_path / "report.html").read_text()
    shutil.rmtree(tmp_path / "checkpoints/18")  # as a kill in the second epoch leaves it
    (tmp_path / "results.json").unlink()
    train.train_and_evaluate(config, tmp_path)
    assert logged(tmp_path) == before
    assert "warning: meta_loss" not in capfd.readouterr().err


@pytest.mark.parametrize(
    "overrides",
    [
        {"train__max_steps": 36},
        slow({}),
        *(slow({"method__name": name}) for name in ("meta_weight_net", "l2ac", "metasaug")),
    ],
    ids=lambda overrides: "+".join(map(str, itertools.chain(*overrides.items()))) or "whole",
)
def test_the_quickstart_is_told_nothing(tmp_path, overrides):
    train.train_and_evaluate(planted(**overrides), tmp_path)
    assert {row["kind"] for row in logged(tmp_path)} <= {"train", "modulation", "val"}
    assert 'id="warnings"' not in (tmp_path / "report.html").read_text()
