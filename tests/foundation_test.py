"""Starting from a foundation model: parts to tune, LoRA merged, a zero-shot head, and what pre-training favours."""

import json
import runpy

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from helpers import REPOSITORY, arrays, changed, configured, quick_runs, slow, stopped_at, stored, tiny
from towers_test import weights

from mfm_jax import config as config_lib
from mfm_jax import data as data_lib
from mfm_jax import export, models
from mfm_jax.bilevel import averaging, losses
from mfm_jax.errors import UserError
from mfm_jax.evaluation import classifier
from mfm_jax.machine import interruption, parallel
from mfm_jax.models import zero_shot
from mfm_jax.models.vit import VisionTransformer
from mfm_jax.training import experiment as experiment_lib
from mfm_jax.training import train
from mfm_jax.types import START_PRIOR, Batch, BilevelState

IMAGES = np.random.default_rng(0).normal(size=(4, 16, 16, 3)).astype(np.float32)
LORA = VisionTransformer(3, 8, 2, 8, lora_rank=2)


def moved(tree, seed: int = 1):
    """Returns a tree of which nothing is zero or one."""
    leaves, structure = jax.tree.flatten(tree)
    rng = np.random.default_rng(seed)
    return structure.unflatten([leaf + rng.uniform(-0.3, 0.3, leaf.shape).astype(np.float32) for leaf in leaves])


# --- LoRA -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def drawn():
    return jax.jit(LORA.init)(jax.random.key(0), IMAGES)["params"]


@jax.jit
def logits(params):
    return LORA.apply({"params": params}, IMAGES)


def test_lora_starts_as_the_network_without_bit_for_bit(drawn):
    plain = jax.jit(LORA.clone(lora_rank=0).apply)({"params": models.merged(drawn)}, IMAGES)
    chex.assert_trees_all_equal(logits(drawn), plain)
    kernel = models.merged(drawn)["block1"]["qkv"]["kernel"]
    chex.assert_trees_all_equal(kernel, drawn["block1"]["qkv"]["kernel"])


def test_merged_lora_computes_what_it_did_beside_the_weights(drawn):
    params = moved(drawn)
    found = models.merged(params)
    assert not [name for name in found["block1"] if "lora" in name]
    query, key, value = np.split(found["block2"]["qkv"]["kernel"] - params["block2"]["qkv"]["kernel"], 3, axis=1)
    lora = params["block2"]["lora_value"]
    np.testing.assert_allclose(value, lora["down"]["kernel"] @ lora["up"]["kernel"], atol=1e-6)
    assert np.abs(query).max() > 0.01
    assert not key.any()
    chex.assert_trees_all_close(logits(found), logits(params), rtol=1e-4, atol=1e-5)
    assert np.abs(logits(params) - logits(drawn)).max() > 0.01
    chex.assert_trees_all_equal(models.merged(found), found)


def test_a_share_of_the_start_is_one_of_the_product_not_of_its_factors(drawn):
    """Both at the start, where LoRA adds nothing, and where it added something before, which a run begins with."""
    rule = averaging.start(0.25)
    for start in (drawn, moved(drawn, 2)):
        trained = moved(drawn)
        state = BilevelState(jnp.int32(1), jax.random.key(0), trained, {}, (), {}, ())
        found = averaging.tested(state.replace(average=averaging.begun(rule, start, {}))).params
        expected = jax.tree.map(lambda a, b: 0.25 * a + 0.75 * b, models.merged(start), models.merged(trained))
        chex.assert_trees_all_close(found, expected, atol=1e-6)


# --- ten steps from published weights ---------------------------------------------------------------


def published(name: str, side: int) -> dict[str, np.ndarray]:
    """Returns random tensors by the names of a tower's file, two blocks of width 8."""
    shapes = json.loads((REPOSITORY / "tests/golden/towers.json").read_text())[name]["shapes"]
    patch, widths = 14 if name.endswith("b14") else 16, {"visual_projection.weight": [512, 8]}
    found = {}
    for key, shape in shapes.items():
        shape = [patch if len(shape) == 4 and i > 1 else size for i, size in enumerate(widths.get(key, shape))]
        if "position_embedding" in key:
            shape = [*shape[:-2], 1 + (side // patch) ** 2, 8]
        found[key] = shape
    return weights(found)


def from_tower(folder, name: str, **overrides):
    """Returns the config of ten steps on the digits from a file of a tower, with a zero-shot head for CLIP."""
    side, classes = (28, 8) if name.endswith("b14") else (16, 512)
    safetensors.numpy.save_file(published(name, side), folder / "tower.safetensors")
    features = np.random.default_rng(3).normal(size=(10, classes)).astype(np.float32)
    np.save(folder / "text.npy", features)
    fields = {
        "model__name": name,
        "model__width": 8,
        "model__pretrained": str(folder / "tower.safetensors"),
        "model__text_features": str(folder / "text.npy"),
        "method__name": "logit_adjusted",
        "method__head": "cosine",
        "data__image_size": side,
        "data__val_images_per_class": 0,
        "train__max_steps": 10,
    }
    return config_lib.resolve(tiny(**(fields | overrides)))


CE = {"method__name": "ce"}
CLIP, DINOV2 = "clip_vit_b16", "dinov2_reg_vit_b14"


@pytest.fixture
def shallow(monkeypatch):
    """Has runs train towers of two blocks in the place of twelve, on one of the fake devices."""
    create = models.create
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    monkeypatch.setattr(models, "create", lambda *given, **options: create(*given, **options).clone(depth=2))


@pytest.mark.usefixtures("shallow")
@pytest.mark.parametrize(
    ("name", "tune"), [(CLIP, "lora"), slow(CLIP, "adapters"), slow(CLIP, "head"), slow(DINOV2, "lora")]
)
def test_ten_steps_move_what_is_tuned_and_the_export_has_it_merged(name, tune, tmp_path):
    config = from_tower(tmp_path, name, model__tune=tune, model__start_share=0.25, model__lora_rank=2)
    data = data_lib.build(config)
    begun = arrays(experiment_lib.build(config, data).init_pretrained().params)
    results = train.train_and_evaluate(config, tmp_path / "run", pages=False)
    assert results["last"]["step"] == 10
    found, start = classifier.load(tmp_path / "run"), models.merged(begun)
    assert not [name for name in found.variables["params"]["block1"] if "lora" in name]
    gap = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), found.variables["params"], start)
    tuned = {"head": (), "adapters": ("adapter_down", "adapter_up"), "lora": ("qkv",)}[tune]
    for block in ("block1", "block2"):
        assert {part for part, gaps in gap[block].items() if max(jax.tree.leaves(gaps))} == set(tuned)
    assert gap["head"]["kernel"] > 1e-3
    assert not max(jax.tree.leaves([gap["stem"], gap["norm"]]))
    images = data.test_images[:20]
    program = jax.export.deserialize(export.exported(found).serialize())
    np.testing.assert_allclose(jax.jit(program.call)(images), found.probabilities(images), atol=1e-6)


@pytest.mark.usefixtures("shallow")
def test_a_zero_shot_classifier_is_evaluated_without_training(tmp_path, capsys):
    config = from_tower(tmp_path, CLIP, method__name="ce", method__ldam_scale=100.0)
    data = data_lib.build(config)
    images = data.test_images[:30]
    found = classifier.load_pretrained(config, data)
    experiment = experiment_lib.build(config, data)
    state = experiment.init_pretrained()
    normalized = (images - np.asarray(data.mean)) / np.asarray(data.std)
    seen = np.asarray(experiment.features(state, jnp.asarray(normalized, jnp.float32)))
    text = np.load(tmp_path / "text.npy")
    text = text / np.linalg.norm(text, axis=1, keepdims=True)
    cosines = seen @ text.T / np.linalg.norm(seen, axis=1, keepdims=True)
    np.testing.assert_allclose(found.probabilities(images), jax.nn.softmax(100 * cosines), rtol=1e-3, atol=1e-6)
    assert np.abs(cosines).max() > 0.01
    with pytest.raises(UserError, match="the head would start fresh: the file has none"):
        classifier.load_pretrained(from_tower(tmp_path, CLIP, model__text_features=""), data)


def test_the_config_with_the_settings_of_lift():
    """Those of its code's `utils/config.py` and `configs/model/clip_vit_b16_peft.yaml`."""
    config = config_lib.resolve(runpy.run_path(str(REPOSITORY / "configs/cifar100_lt_lift.py"))["get_config"]())
    assert config.model.adapter_size == 2 ** int(np.log2(100 / (2 * 12)))
    optim, method = config.optim, config.method
    assert (optim.name, optim.learning_rate, optim.momentum, optim.weight_decay) == ("sgd", 0.01, 0.9, 5e-4)
    assert (optim.schedule, config.train.batch_size, config.train.epochs) == ("cosine", 128, 10)
    assert (method.name, method.tau, method.head, method.ldam_scale) == ("logit_adjusted", 1.0, "cosine", 25.0)
    given = {"pretrained": "model.safetensors", "text_features": "text.npy"}
    assert config_lib.resolve(changed(config, model=given)).model.tune == "adapters"


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".safetensors"])
def test_text_features_are_read_from_three_kinds_of_files(suffix, tmp_path):
    path, features = tmp_path / f"text{suffix}", np.float32([[1, 2], [3, 4], [5, 6]])
    head = {"kernel": np.zeros((2, 3), np.float32), "bias": np.ones(3, np.float32)}
    write = {
        ".npy": lambda: np.save(path, features),
        ".npz": lambda: np.savez(path, text=features),
        ".safetensors": lambda: safetensors.numpy.save_file({"text": features}, path),
    }
    write[suffix]()
    found = zero_shot.with_text_head({"head": head, "stem": 1}, str(path))
    assert found["stem"] == 1
    chex.assert_trees_all_equal(found["head"], {"kernel": features.T, "bias": np.zeros(3, np.float32)})


def test_text_features_that_do_not_fit_are_refused(tmp_path):
    params = {"head": {"kernel": np.zeros((2, 3), np.float32), "bias": np.ones(3, np.float32)}}

    def refusal(content=None, name: str = "text.npy") -> str:
        if isinstance(content, bytes):
            (tmp_path / name).write_bytes(content)
        elif content is not None:
            np.savez(tmp_path / name, **content) if isinstance(content, dict) else np.save(tmp_path / name, content)
        with pytest.raises(UserError) as caught:
            zero_shot.with_text_head(params, str(tmp_path / name))
        assert "\n" not in str(caught.value)
        return str(caught.value).partition(": ")[2]

    assert refusal() == "no such file"
    assert refusal(np.zeros((2, 3))).startswith("has the shape [2, 3], not [3, 2]; give a row of each class")
    assert refusal(np.full((3, 2), np.nan)) == "has values that are not finite; make it again"
    assert refusal(b"none").startswith("cannot be read (ValueError: ")
    assert refusal({"a": np.zeros((3, 2)), "b": np.zeros(2)}, "two.npz").endswith("or .safetensors with one array")


# --- what pre-training favours ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def started(tmp_path_factory) -> str:
    """The folder of a run that favours the classes of its long tail's head."""
    folder = tmp_path_factory.mktemp("runs") / "ce"
    with quick_runs():
        train.train_and_evaluate(configured("ce", train__epochs=10), folder, pages=False)
    return str(folder)


def corrected(started: str, name: str = "logit_adjusted", tau: float = 1.0, **overrides):
    return configured(name, model__init_from=started, method__pretraining_tau=tau, train__seed=1, **overrides)


@pytest.mark.usefixtures("quick_runs")
def test_the_prior_is_the_mean_prediction_of_the_meta_images(started):
    config = corrected(started, eval__batch_size=7)
    data = data_lib.build(config)
    state = experiment_lib.build(config, data).init_pretrained()
    chosen = data.meta_images[data.meta_table(0).ravel()]
    expected = np.log(classifier.load(started).probabilities(chosen).mean(axis=0))
    np.testing.assert_allclose(state.memory[START_PRIOR], expected, rtol=1e-4)
    assert expected[0] - expected[-1] > 0.3  # digit 0 has most images
    assert np.exp(expected).sum() == pytest.approx(1)


def test_the_loss_with_one_more_prior():
    values, labels = jnp.float32([[0.0, 1.0, 3.0]]), jnp.array([1])
    adjusted = losses.with_prior(losses.logit_adjusted(jnp.array([4, 2, 2])), jnp.log(jnp.float32([0.1, 0.4, 0.5])), 2)
    # The weights of the classes are e^z, times 1/2, 1/4, 1/4, times the squares of 0.1, 0.4, 0.5.
    w = np.exp([0.0, 1.0, 3.0]) * [0.5, 0.25, 0.25] * np.square([0.1, 0.4, 0.5])
    assert float(adjusted(values, labels)[0]) == pytest.approx(-np.log(w[1] / w.sum()), rel=1e-5)


def one_step(config, mesh=None, prior=None):
    """Returns the state after one step from the start, without augmentation, and the metrics."""
    data = data_lib.build(config)
    experiment = experiment_lib.build(config, data, mesh)
    state = experiment.init_pretrained()
    state = jax.device_put(state, parallel.replicated(mesh)) if mesh else state
    if prior is not None:
        state = state.replace(memory={START_PRIOR: prior})
    images = jnp.asarray(data.train_images[:40], jnp.float32) / 255
    batch = Batch(images, jnp.asarray(data.train_labels[:40]))
    return jax.jit(experiment.plain_step)(state, batch)


@pytest.mark.usefixtures("quick_runs")
@pytest.mark.parametrize("name", ["logit_adjusted", "mfm"])
def test_a_prior_that_favours_no_class_changes_nothing_and_one_of_the_counts_is_logit_adjustment(name, started):
    even = jnp.full(10, np.log(0.1), jnp.float32)
    (state, metrics), (expected, without) = (
        one_step(corrected(started, name), prior=even),
        one_step(corrected(started, name, 0.0)),
    )
    assert expected.memory == {}
    chex.assert_trees_all_close(state.params, expected.params, atol=1e-6)
    chex.assert_trees_all_equal(state.memory[START_PRIOR], even)
    assert float(metrics["loss"]) == pytest.approx(float(without["loss"]), rel=1e-5)
    counts = losses.log_prior(jnp.asarray(data_lib.build(corrected(started)).counts))
    by_prior, _ = one_step(corrected(started, "ce", 1.5), prior=counts)
    adjusted, _ = one_step(corrected(started, "logit_adjusted", 0.0, method__tau=1.5))
    chex.assert_trees_all_close(by_prior.params, adjusted.params, atol=1e-6)


@pytest.mark.usefixtures("quick_runs")
def test_four_devices_take_the_step_of_one(started):
    one, four = one_step(corrected(started)), one_step(corrected(started), parallel.data_mesh(jax.devices()[:4]))
    chex.assert_trees_all_close(arrays(four), arrays(one), rtol=1e-4, atol=2e-5)


@pytest.mark.usefixtures("quick_runs")
def test_a_run_that_was_stopped_goes_on_with_its_prior(started, tmp_path):
    """The prior is in the checkpoint: a classifier that has been trained since would show another one."""
    config = corrected(started, "mfm")
    train.train_and_evaluate(config, tmp_path / "whole", pages=False)
    with pytest.raises(interruption.Interrupted), stopped_at(3):
        train.train_and_evaluate(config, tmp_path / "parts", pages=False)
    train.train_and_evaluate(config, tmp_path / "parts", pages=False)
    chex.assert_trees_all_equal(stored(tmp_path / "parts").params, stored(tmp_path / "whole").params)
    plain = configured("mfm", model__init_from=started, train__seed=1)
    train.train_and_evaluate(plain, tmp_path / "plain", pages=False)
    gap = jax.tree.map(
        lambda a, b: np.abs(a - b).max(), stored(tmp_path / "plain").params, stored(tmp_path / "whole").params
    )
    assert max(jax.tree.leaves(gap)) > 1e-3


@pytest.mark.usefixtures("quick_runs")
def test_a_fresh_head_has_no_prior(started):
    config = corrected(started, "ldam")
    with pytest.raises(UserError, match=r"method.pretraining_tau = 1.0: the head starts fresh, and one at random has"):
        experiment_lib.build(config, data_lib.build(config)).init_pretrained()


@pytest.mark.usefixtures("quick_runs")
def test_the_head_beside_which_simsiam_trained_has_no_prior_either(tmp_path):
    train.train_and_evaluate(configured("simsiam"), tmp_path, pages=False)
    config = corrected(str(tmp_path))
    with pytest.raises(UserError, match=r"method.pretraining_tau = 1.0: the head starts fresh, and one at random has"):
        experiment_lib.build(config, data_lib.build(config)).init_pretrained()


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ({"method__pretraining_tau": 1.0}, "method.pretraining_tau = 1.0: a head at random has learned no prior; star"),
        (
            {"method__pretraining_tau": 1.0, "model__init_from": "runs/a", "method__name": "crt"},
            "method.pretraining_tau = 1.0: the second stage of crt trains another head; choose another method.name",
        ),
        (
            {
                "method__pretraining_tau": 1.0,
                "model__init_from": "a",
                "method__name": "ce",
                "data__pretext": "rotation",
            },
            "method.pretraining_tau = 1.0: data.pretext = 'rotation' has labels that are no classes; leave one of",
        ),
        (
            {"model__text_features": "a.npy", "method__head": "cosine"} | CE,
            "model.text_features = 'a.npy': features of images at random have no meaning; set model.pretrained or",
        ),
        (
            {"model__text_features": "a.npy", "model__init_from": "runs/a"},
            "model.text_features = 'a.npy': are compared by their cosines; set method.head = 'cosine', and method",
        ),
    ],
)
def test_refusals(overrides, told):
    with pytest.raises(UserError) as caught:
        config_lib.resolve(tiny(**overrides))
    assert str(caught.value).startswith(told)
