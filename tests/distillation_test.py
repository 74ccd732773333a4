"""A teacher's share in the loss: the divergence by hand, the teacher as it is tested, runs with one, and refusals."""

import json
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import Small, arrays, benchmark, configured, logged, stopped_at, stored, teacher
from own_parts import Bare

from mfm_jax import bilevel
from mfm_jax import config as config_lib
from mfm_jax import data as data_lib
from mfm_jax.bilevel import distillation, losses, modulation, optim, outer
from mfm_jax.bilevel.distillation import Distillation
from mfm_jax.bilevel.objective import Objective
from mfm_jax.bilevel.passes import Pass
from mfm_jax.errors import UserError
from mfm_jax.evaluation import classifier
from mfm_jax.machine import interruption, parallel
from mfm_jax.methods import learners
from mfm_jax.training import experiment as experiment_lib
from mfm_jax.training import inputs, train
from mfm_jax.training import loop as loop_lib
from mfm_jax.training import teacher as teacher_lib
from mfm_jax.types import Batch, Taught

CLASSES, BATCH = 4, 12
LABELS = jnp.arange(BATCH, dtype=jnp.int32) % CLASSES
FORWARD, TX = Pass.of(Small(CLASSES, 4)), optax.sgd(0.1)


# --- the loss of an example -----------------------------------------------------------------------


def test_the_divergence_by_hand():
    """At t = 2: (3/4, 1/4) against (1/2, 1/2)."""
    taught = jnp.array([[2 * np.log(3.0), 0.0], [1.0, 1.0]], jnp.float32)
    found = distillation.divergence(jnp.zeros((2, 2)), taught, 2.0)
    expected = 4 * (0.75 * np.log(1.5) + 0.25 * np.log(0.5))
    np.testing.assert_allclose(found, [expected, 0.0], rtol=1e-5, atol=1e-7)
    # The derivative by the student's logits is t times the gap of the two distributions; none goes into the teacher.
    by_student, by_teacher = jax.grad(lambda z, u: distillation.divergence(z, u, 2.0)[0], (0, 1))(
        jnp.zeros((2, 2)), taught
    )
    np.testing.assert_allclose(by_student, [[-0.5, 0.5], [0, 0]], atol=1e-6)
    assert not by_teacher.any()


def step_of(objective, governed=None, *, batch: Batch, phi=None, meta: bool = False):
    """Returns `(state, metrics)` after a step from the same state."""
    variables, learner = Small(CLASSES, 4).init(jax.random.key(1), batch.image), outer.of(governed)
    phi_tx = optax.sgd(1.0)
    state = bilevel.init_state(jax.random.key(2), variables, TX, learner.init, phi_tx)
    state = state if phi is None else state.replace(phi=phi)
    if meta:
        return jax.jit(bilevel.make_step(FORWARD, objective, TX, learner, phi_tx))(state, batch, batch)
    return jax.jit(bilevel.make_plain_step(FORWARD, objective, TX, learner))(state, batch)


def taught(seed: int = 5) -> Batch:
    image, said, typical = (
        jax.random.normal(key, shape)
        for key, shape in zip(
            jax.random.split(jax.random.key(seed), 3), ((BATCH, 8, 8, 3), *((BATCH, CLASSES),) * 2), strict=True
        )
    )
    return Batch(image, LABELS, teacher=Taught(said, jax.nn.softmax(typical)))


def objective(share: float) -> Objective:
    return Objective(losses.cross_entropy, distillation=Distillation(share, 4.0))


def test_without_a_share_the_step_is_the_plain_one_to_the_bit():
    batch = taught()
    plain, none = (step_of(one, batch=batch) for one in (losses.cross_entropy, objective(0.0)))
    chex.assert_trees_all_equal(arrays(none), arrays(plain))
    some = step_of(objective(0.5), batch=batch)
    assert float(some[1]["loss"]) != float(plain[1]["loss"])


def test_a_student_that_says_what_its_teacher_says_does_not_move():
    batch, variables = taught(), Small(CLASSES, 4).init(jax.random.key(1), taught().image)
    state = bilevel.init_state(jax.random.key(2), variables, TX)
    own, _ = FORWARD.logits(state, variables["params"], batch, train=True)
    _, metrics = step_of(objective(1.0), batch=batch._replace(teacher=Taught(own)))
    np.testing.assert_allclose(metrics["loss"], 0, atol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], 0, atol=1e-5)
    assert float(step_of(objective(1.0), batch=batch)[1]["grad_norm"]) > 1e-2


def test_the_teacher_is_compared_with_the_logits_before_their_modulation():
    modulator, batch = modulation.direct({"logits": CLASSES}), taught()
    identity = modulator.init(jax.random.key(0))
    noise = jax.tree.map(lambda leaf: leaf + jnp.linspace(-1.0, 1.0, CLASSES), identity)
    at_identity, moved = (step_of(objective(1.0), modulator, batch=batch, phi=phi)[1] for phi in (identity, noise))
    chex.assert_trees_all_equal(moved["loss"], at_identity["loss"])
    half = [step_of(objective(0.5), modulator, batch=batch, phi=phi)[1]["loss"] for phi in (identity, noise)]
    assert abs(half[0] - half[1]) > 1e-3  # the modulation reaches the labels' part


@pytest.mark.parametrize("parts", [1, 2])
def test_a_module_without_the_site_is_compared_by_its_logits(parts):
    module, batch = Bare(CLASSES), taught()
    variables = module.init(jax.random.key(1), batch.image)
    forward = Pass(
        lambda variables, image, modulate, **_: (module.apply(variables, image), {}), parts=parts, switch=None
    )
    state = bilevel.init_state(jax.random.key(2), variables, TX)
    _, metrics = jax.jit(bilevel.make_plain_step(forward, objective(1.0), TX))(state, batch)
    far = distillation.divergence(module.apply(variables, batch.image), batch.teacher.logits, 4.0)
    np.testing.assert_allclose(metrics["loss"], far.mean(), rtol=1e-5)


def test_a_batch_without_a_teacher_is_refused():
    with pytest.raises(UserError, match=r"Batch.teacher: missing"):
        step_of(objective(0.5), batch=taught()._replace(teacher=None))


# --- the learned share ----------------------------------------------------------------------------


def test_the_learned_share_starts_as_the_fixed_one_and_moves():
    batch, learner = taught(), learners.tgeo_kd(CLASSES, 6, start=0.3)
    learned, fixed = (step_of(objective(0.3), one, batch=batch) for one in (learner, None))
    chex.assert_trees_all_close(learned[0].params, fixed[0].params, rtol=1e-5, atol=1e-7)
    after, metrics = step_of(objective(0.3), learner, batch=batch, meta=True)
    assert float(metrics["hypergrad_norm"]) > 1e-5
    share = learner.share(after.phi, jnp.zeros((BATCH, CLASSES)), batch)
    assert float(jnp.abs(share - 0.3).max()) > 1e-6


def test_the_share_reads_the_edges_of_both_triangles():
    """Two classes; a hidden unit reads one entry of one edge, and the share is the sigmoid of the unit."""
    learner = learners.tgeo_kd(2, 1)
    log3 = float(np.log(3.0))
    batch = Batch(jnp.zeros((1, 1)), jnp.zeros(1, jnp.int32), teacher=Taught(jnp.array([[0.0, log3]]), None))
    batch = batch._replace(teacher=batch.teacher._replace(typical=jnp.array([[0.6, 0.4]])))
    # Of class 0: label 1, student 1/2, teacher 1/4, typical 0.6.
    for edge, expected in enumerate([0.5, 0.75, -0.25, 0.4, 0.1]):
        sign = np.sign(expected)
        phi = {"w1": jnp.zeros((10, 1)).at[2 * edge, 0].set(sign), "b1": jnp.zeros(1)}
        phi |= {"w2": jnp.full((1, 1), sign), "b2": jnp.zeros(1)}
        found = learner.share(phi, jnp.zeros((1, 2)), batch)
        np.testing.assert_allclose(found, [1 / (1 + np.exp(-expected))], rtol=1e-5)
    mixed = batch._replace(partner=jnp.ones(1, jnp.int32), share=jnp.array([0.75]))
    phi = {"w1": jnp.zeros((10, 1)).at[0, 0].set(1.0), "b1": jnp.zeros(1), "w2": jnp.ones((1, 1)), "b2": jnp.zeros(1)}
    found = learner.share(phi, jnp.zeros((1, 2)), mixed)  # the label is (3/4, 1/4)
    np.testing.assert_allclose(found, [1 / (1 + np.exp(-0.25))], rtol=1e-5)


def test_a_learner_of_the_share_needs_a_teacher():
    with pytest.raises(UserError, match=r"tgeo_kd: says what a teacher counts, and there is none; set method.teacher"):
        step_of(losses.cross_entropy, learners.tgeo_kd(CLASSES, 6), batch=taught())


# --- the teacher ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def other_teacher(tmp_path_factory):
    """A run of another network, other images and a head that is set after training."""
    config = configured("posthoc_la", model__name="resnet8", model__width=4, data__imbalance_factor=5.0)
    folder = tmp_path_factory.mktemp("teachers") / "posthoc"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "device_count", lambda: 1)
        train.train_and_evaluate(config, folder, pages=False)
    return folder


def test_the_teacher_is_the_classifier_that_its_run_tested(other_teacher):
    """Whatever the mean of this run's own images."""
    for folder in (teacher(), other_teacher):
        config = configured("ce", method__teacher=str(folder))
        data = data_lib.build(config)
        found = teacher_lib.of(config, data, typical=True)
        mean, std = jnp.array([77.0]), jnp.array([31.0])
        images = data.train_images[:30]
        normalized = (jnp.asarray(images, jnp.float32) - 77.0) / 31.0
        batch = found.of_batch(Batch(normalized, jnp.asarray(data.train_labels[:30])), found.arrays, mean, std)
        tested = classifier.load(folder)
        np.testing.assert_allclose(jax.nn.softmax(batch.teacher.logits), tested.probabilities(images), atol=1e-4)
        whole = tested.probabilities(data.train_images)
        for row, label in zip(batch.teacher.typical, data.train_labels[:30], strict=True):
            np.testing.assert_allclose(row, whole[data.train_labels == label].mean(0), atol=1e-4)


def test_mixed_images_and_second_views_have_the_teachers_word_of_their_own():
    config = configured("glmc", method__teacher=str(teacher()))
    data = data_lib.build(config)
    found = teacher_lib.of(config, data, typical=True)
    image = jax.random.normal(jax.random.key(0), (2, 6, *data.train_images.shape[1:]))
    label, partner = jnp.arange(6, dtype=jnp.int32), jnp.arange(6, dtype=jnp.int32)[::-1]
    second = Batch(image[1], label)
    batch = Batch(image[0], label, partner, jnp.full(6, 0.75), second=second)
    both = found.of_batch(batch, found.arrays, data.mean, data.std)
    chex.assert_trees_all_close(
        both.second, found.of_batch(second, found.arrays, data.mean, data.std), rtol=1e-5, atol=1e-5
    )
    mixture = 0.75 * found.arrays["typical"][:6] + 0.25 * found.arrays["typical"][5::-1]
    np.testing.assert_allclose(both.teacher.typical, mixture, rtol=1e-5)


def test_four_devices_equal_one_with_a_batch_that_does_not_divide(quick_runs, monkeypatch):
    """Also the logits themselves, which are computed outside of what is divided by hand."""
    monkeypatch.setattr(optim, "outer", lambda *_: optax.sgd(0.1))
    found = []
    for mesh in (None, parallel.data_mesh(jax.devices()[:4])):
        config = configured("mfm", method__teacher=str(teacher()), augment__mixup=1.0, train__batch_size=90)
        data = data_lib.build(config)
        experiment = experiment_lib.build(config, data, mesh)
        order = jnp.arange(90, dtype=jnp.int32)[None]
        given = inputs.to_device(data).replace(order=order, meta_table=jnp.asarray(data.meta_table(0), jnp.int32))
        given = given.replace(teacher=experiment.teacher.arrays)
        where = parallel.replicated(mesh) if mesh else inputs.everywhere(None)
        loop, given = jax.device_put((loop_lib.initial(experiment, config.train), given), where)
        call = loop_lib.make_call(experiment, config)
        for kind in ("meta", "plain"):
            loop = call(loop, given, jnp.int32(1), kind)
        found.append(arrays(loop))
    chex.assert_trees_all_close(found[1], found[0], rtol=1e-4, atol=2e-5)


# --- runs -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def combined(tmp_path_factory):
    """A run of MFM with a fixed share of a teacher, and its config."""
    from helpers import quick_runs

    with quick_runs():
        config, folder = configured("mfm", method__teacher=str(teacher())), tmp_path_factory.mktemp("runs") / "run"
        train.train_and_evaluate(config, folder, pages=False)
    return config, folder


def test_mfm_and_a_teacher_go_together_and_go_on(combined, tmp_path, quick_runs):
    config, folder = combined
    with stopped_at(3), pytest.raises(interruption.Interrupted, match="saved at step 3"):
        train.train_and_evaluate(config, tmp_path, pages=False)
    train.train_and_evaluate(config, tmp_path, pages=False)
    chex.assert_trees_all_equal(stored(tmp_path), stored(folder))
    alone = configured("mfm")
    train.train_and_evaluate(alone, tmp_path / "alone", pages=False)
    assert logged(tmp_path / "alone")[0]["loss"] != logged(folder)[0]["loss"]


@pytest.mark.parametrize("options", [{"method__distill": 0.5}, {"method__distill": 0.0, "method__base": "glmc"}])
def test_a_learner_of_the_users_own_is_tried_on_what_a_step_gets(options, quick_runs):
    """The teacher's word, and a second view."""
    config = configured("own_learner", method__teacher=str(teacher()), **options)
    assert experiment_lib.build(config, data_lib.build(config)).meta_step


def test_a_share_of_zero_is_the_run_without_a_teacher(tmp_path, quick_runs):
    for name, options in (("none", {}), ("zero", {"method__teacher": str(teacher()), "method__distill": 0.0})):
        train.train_and_evaluate(configured("mfm", **options), tmp_path / name, pages=False)
    chex.assert_trees_all_equal(stored(tmp_path / "zero"), stored(tmp_path / "none"))


def test_a_run_goes_on_with_the_teacher_it_began_with_alone(tmp_path, quick_runs):
    one, folder = tmp_path / "teacher", tmp_path / "run"
    shutil.copytree(teacher(), one)
    config = configured("ce", method__teacher=str(one))
    with stopped_at(3), pytest.raises(interruption.Interrupted):
        train.train_and_evaluate(config, folder, pages=False)
    shutil.rmtree(one)
    with pytest.raises(UserError, match=r"method.teacher = .*: no run there"):
        train.train_and_evaluate(config, folder, pages=False)
    other = configured("mfm", model__name="own_parts:Tiny", model__width=0, train__seed=1)
    train.train_and_evaluate(other, one, pages=False)
    with pytest.raises(
        UserError, match=r"its classifier is not the one that the run in .* began with; bring that back"
    ):
        train.train_and_evaluate(config, folder, pages=False)
    shutil.rmtree(one)
    shutil.copytree(teacher(), one)
    results = train.train_and_evaluate(config, folder, pages=False)
    shutil.rmtree(one)  # a finished run needs it no longer
    assert train.train_and_evaluate(config, folder, pages=False) == results
    assert classifier.load(folder).step == 4


@pytest.mark.slow
def test_seeds_together_share_their_teacher(combined, tmp_path, quick_runs):
    config, folder = combined
    configs = [config, configured("mfm", method__teacher=str(teacher()), train__seed=1)]
    train.train_together(configs, [tmp_path / "a", tmp_path / "b"], pages=False)
    alone, together = logged(folder)[0], logged(tmp_path / "a")[0]
    for name in ("loss", "meta_loss", "grad_norm"):
        np.testing.assert_allclose(together[name], alone[name], rtol=1e-4)


@pytest.mark.slow
def test_streamed_images_have_the_same_teacher(combined, tmp_path, quick_runs):
    _, folder = combined
    streamed = configured("mfm", method__teacher=str(teacher()), data__resident_mb=0, data__workers=0)
    train.train_and_evaluate(streamed, tmp_path, pages=False)
    for name in ("loss", "meta_loss", "grad_norm"):
        np.testing.assert_allclose(logged(tmp_path)[0][name], logged(folder)[0][name], rtol=1e-4)


def test_images_held_out_here_that_the_teacher_was_trained_on_are_warned_of(capsys, quick_runs):
    for seed, warned in ((0, False), (1, True)):
        config = configured("ce", method__teacher=str(teacher()), data__seed=seed, data__val_images_per_class=5 * seed)
        data = data_lib.build(config)
        assert teacher_lib.of(config, data, typical=False)
        trained = {i for split in ("train", "meta") for i in stored_splits()[split]["ids"]}
        leaked = len(trained & {*data.manifest["splits"]["val"]["ids"]})
        assert (f": was trained on {leaked} of the val images of this run; take" in capsys.readouterr().err) == warned


def stored_splits():
    return json.loads((teacher() / "manifest.json").read_text())["splits"]


# --- refusals -------------------------------------------------------------------------------------


def refused(message: str, name: str = "ce", **options):
    config = configured(name, **options)
    with pytest.raises(UserError, match=message):
        experiment_lib.build(config, data_lib.build(config))


def test_what_is_no_teacher_of_this_run_is_refused_before_anything_is_compiled(tmp_path, quick_runs):
    refused(r"method.teacher = .*: no run there", method__teacher=str(tmp_path))
    (tmp_path / "file").touch()
    refused(r"method.teacher = .*: no run there", method__teacher=str(tmp_path / "file"))
    refused(
        r"method.teacher = .*: its images are \[8, 8, 1\], here they are \[6, 6, 1\]; match data.image_size",
        method__teacher=str(teacher()),
        data__image_size=6,
    )
    shutil.copytree(teacher(), tmp_path / "other")
    facts = tmp_path / "other" / "classifier.json"
    found = json.loads(facts.read_text())
    facts.write_text(json.dumps({**found, "class_names": ["zero", *found["class_names"][1:]]}))
    refused(
        r"its classes and those of this run differ in 0, zero; choose another", method__teacher=str(tmp_path / "other")
    )
    facts.write_text(json.dumps({**found, "class_names": found["class_names"][::-1]}))
    refused(r"its classes and those of this run differ in their order", method__teacher=str(tmp_path / "other"))
    facts.write_text(json.dumps({**found, "class_names": found["class_names"][1:]}))
    refused(r"its classes and those of this run differ in 0; choose another", method__teacher=str(tmp_path / "other"))


def test_the_learned_share_asks_for_a_teacher_and_all_images(quick_runs):
    refused(r"method.teacher: missing; tgeo_kd needs a run folder", "tgeo_kd", method__teacher="")
    refused(
        r"method.name = 'tgeo_kd': needs all images at once; raise data.resident_mb", "tgeo_kd", data__resident_mb=0
    )


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_share_that_cannot_be_left_is_refused(share):
    with pytest.raises(
        UserError, match=rf"method.distill = {share}: tgeo_kd learns the share, and could not leave that"
    ):
        configured("tgeo_kd", method__distill=share)


# --- the study ------------------------------------------------------------------------------------


def results(balanced: float) -> dict:
    found = {"balanced_accuracy": balanced, "head_third": 0.8, "middle_third": 0.5, "rarest_third": 0.25}
    found |= dict.fromkeys(("accuracy", "many", "medium", "few", "macro_f1", "roc_auc", "ece"), 0.5)
    return {"last": {"test": found}, "best": None, "split": "test", "train_seconds": 61.4}


def test_the_study_of_students_by_hand(tmp_path):
    with benchmark("distillation") as study:
        config = config_lib.default()
        teacher_run, students = study.teacher_of(config, tmp_path, 1), study.students_of(config, tmp_path, 1)
        assert (teacher_run.config.method.name, teacher_run.config.train.seed) == ("mfm", 1)
        learns = {one.workdir.parent.name: one.config.method.teacher for one in students}
        assert learns == {"ce": "", "mfm": ""} | dict.fromkeys(("ce_kd", "tgeo_kd", "mfm_kd"), str(teacher_run.workdir))
        assert {one.config.model.width for one in students} == {8}
        assert len({one.workdir for one in students}) == 5
        done = {("teacher", 0): results(0.7), ("mfm_kd", 1): results(0.66), ("mfm_kd", 0): results(0.64)}
        done |= {("mfm", 0): results(0.60), ("mfm", 1): results(0.60)}
        study.write_csv(done, tmp_path / "table.csv")
        assert (tmp_path / "table.csv").read_text().splitlines()[1:] == [
            "teacher,0,70.00,80.00,50.00,25.00,61",
            "mfm,0,60.00,80.00,50.00,25.00,61",
            "mfm,1,60.00,80.00,50.00,25.00,61",
            "mfm_kd,0,64.00,80.00,50.00,25.00,61",
            "mfm_kd,1,66.00,80.00,50.00,25.00,61",
        ]
        # Pairs 4 and 6: mean 5, standard error 1, Student's 97.5 % quantile at one degree of freedom 12.7.
        assert study.markdown(done).splitlines()[2:] == [
            "| `teacher` | 70.0 | – | – | 1 |",
            "| `mfm` | 60.0 ± 0.0 | – | – | 2 |",
            "| `mfm_kd` | 65.0 ± 1.4 | – | 5.0 [-7.7, 17.7] | 2 |",
        ]
