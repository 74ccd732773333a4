"""Weights of CIFAR ResNets under the names of CIFAR-LT code: same logits, told differences, and an evaluation as read.

The twin below is the usual forward pass of such code, on its tensors and in its layout, in NumPy.
"""

import json
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mfm_jax import config as config_lib
from mfm_jax import data as data_lib
from mfm_jax import models
from mfm_jax.errors import UserError
from mfm_jax.inference import evaluate as evaluation
from mfm_jax.methods import heads
from mfm_jax.models import pretrained
from mfm_jax.training import experiment

K, W = 3, 4  # classes and width
HEADS = {
    "linear": lambda draw, size, classes: {"linear.weight": draw(classes, size), "linear.bias": draw(classes)},
    "fc": lambda draw, size, classes: {"fc.weight": draw(classes, size), "fc.bias": draw(classes)},
    "normalised": lambda draw, size, classes: {"linear.weight": draw(size, classes)},
}


def drawing(seed: int):
    """Returns a function that draws normal numbers of a shape, the same in every order of the tests."""
    rng = np.random.default_rng(seed)
    return lambda *shape: rng.normal(size=shape).astype(np.float32)


def file(blocks: int = 1, width: int = W, head: str = "linear", classes: int = K, inputs: int = 3) -> dict:
    """Returns random tensors of a network of 6 * blocks + 2 layers, by the names of CIFAR-LT code."""
    draw = drawing(0)

    def conv(outputs, inputs):
        return draw(outputs, inputs, 3, 3) * np.float32(np.sqrt(2 / (9 * inputs)))

    def norm(name, size):
        values = {"weight": 1 + draw(size) / 5, "bias": draw(size) / 5, "running_mean": draw(size) / 5}
        values |= {"running_var": 0.5 + draw(size) ** 2, "num_batches_tracked": np.array(7)}
        return {f"{name}.{leaf}": value for leaf, value in values.items()}

    tensors = {"conv1.weight": conv(width, inputs), **norm("bn1", width)}
    before = width
    for layer in (1, 2, 3):
        size = width * 2 ** (layer - 1)
        for block in range(blocks):
            name = f"layer{layer}.{block}"
            tensors |= {f"{name}.conv1.weight": conv(size, before), **norm(f"{name}.bn1", size)}
            tensors |= {f"{name}.conv2.weight": conv(size, size), **norm(f"{name}.bn2", size)}
            before = size
    return tensors | HEADS[head](draw, before, classes)


def twin(tensors: dict, images: np.ndarray) -> np.ndarray:
    """Returns logits, or cosines where the head is normalised, of `[B, H, W, C]` images."""

    def conv(x, name, stride):
        padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))[:, :, ::stride, ::stride]
        return np.einsum("bchwij,ocij->bohw", windows, tensors[f"{name}.weight"], optimize=True)

    def norm(x, name):
        leaves = ("running_mean", "running_var", "weight", "bias")
        mean, var, weight, bias = (tensors[f"{name}.{leaf}"][:, None, None] for leaf in leaves)
        return (x - mean) / np.sqrt(var + 1e-5) * weight + bias

    x = np.maximum(norm(conv(images.transpose(0, 3, 1, 2), "conv1", 1), "bn1"), 0)
    names = [name.removesuffix(".conv1.weight") for name in tensors if re.fullmatch(r"layer.*conv1\.weight", name)]
    for name in names:
        stride = 2 if re.fullmatch(r"layer[23]\.0", name) else 1
        y = np.maximum(norm(conv(x, f"{name}.conv1", stride), f"{name}.bn1"), 0)
        y = norm(conv(y, f"{name}.conv2", 1), f"{name}.bn2")
        if stride == 2:
            quarter = y.shape[1] // 4
            x = np.pad(x[:, :, ::2, ::2], ((0, 0), (quarter, quarter), (0, 0), (0, 0)))
        x = np.maximum(x + y, 0)
    pooled = x.mean(axis=(2, 3))
    if "linear.bias" not in tensors and "fc.bias" not in tensors:
        weight = tensors["linear.weight"]
        return (pooled / np.linalg.norm(pooled, axis=1)[:, None]) @ (weight / np.linalg.norm(weight, axis=0))
    head = "fc" if "fc.bias" in tensors else "linear"
    return pooled @ tensors[f"{head}.weight"].T + tensors[f"{head}.bias"]


def load(tensors, folder, name="resnet8", width=W, classes=K, **options):
    path = folder / "weights.npz"
    np.savez(path, **tensors)
    module = models.create(name, classes, width)
    new = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    return module, pretrained.of_file(path, new["params"], new["batch_stats"], name, **options)


@pytest.mark.parametrize(
    ("name", "width", "head"),
    [
        ("resnet8", 4, "linear"),
        ("resnet20", 2, "fc"),
        ("resnet32", 4, "normalised"),
        ("resnet44", 2, "linear"),
        ("resnet56", 8, "normalised"),
    ],
)
def test_logits_are_those_of_the_twin(name, width, head, tmp_path, capsys):
    tensors = file((int(name.removeprefix("resnet")) - 2) // 6, width, head)
    prefixed = {f"module.{name}": tensor for name, tensor in tensors.items()}
    module, loaded = load(prefixed, tmp_path, name, width, normalized_head=head == "normalised")
    apply = heads.cosine(module.apply, 30.0) if head == "normalised" else module.apply
    images = drawing(1)(4, 8, 8, 3)
    found = apply(dict(zip(("params", "batch_stats"), loaded, strict=True)), images)
    expected = twin(tensors, images) * (30 if head == "normalised" else 1)
    assert expected.std(axis=0).min() > 0.02  # images differ
    chex.assert_trees_all_close(found, expected, rtol=1e-3, atol=1e-3)
    assert capsys.readouterr().err == f"pretrained weights: {tmp_path / 'weights.npz'}\n"


@pytest.mark.slow
def test_a_checkpoint_as_training_code_saves_it(tmp_path):
    torch = pytest.importorskip("torch")
    tensors = file()
    state = {f"module.{name}": torch.from_numpy(np.array(tensor)) for name, tensor in tensors.items()}
    path = tmp_path / "ckpt.best.pth.tar"
    torch.save({"epoch": 200, "arch": "resnet8", "best_acc1": torch.tensor(80.0), "state_dict": state}, path)
    module, loaded = load(tensors, tmp_path)
    new = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    chex.assert_trees_all_equal(pretrained.of_file(path, new["params"], new["batch_stats"], "resnet8"), loaded)


# --- heads ------------------------------------------------------------------------------------------


def without_bias() -> dict:
    return {name: tensor for name, tensor in file().items() if name != "linear.bias"}


def headless() -> dict:
    return {name: tensor for name, tensor in file().items() if not name.startswith("linear.")}


@pytest.mark.parametrize(
    ("tensors", "normalized", "reason"),
    [
        (file(), True, "the file's is linear, that of the method normalised"),
        (file(head="normalised"), False, "the file's is normalised, that of the method linear"),
        (file(head="normalised", classes=7), True, "the file's has 7 classes, not 3"),
        (file(head="fc", classes=7), False, "the file's has 7 classes, not 3"),
        (without_bias(), False, "the file's has no bias and weights [3, 16], which may mean several things"),
        (without_bias(), True, "the file's has no bias and weights [3, 16], which may mean several things"),
        (headless(), False, "the file has none"),
    ],
)
def test_a_head_of_another_kind_starts_fresh_and_is_told(tensors, normalized, reason, tmp_path, capsys):
    _, (params, _) = load(tensors, tmp_path, normalized_head=normalized)
    assert isinstance(params["head"]["kernel"], jax.ShapeDtypeStruct)  # what was given
    chex.assert_trees_all_equal(params["stem"]["kernel"], tensors["conv1.weight"].transpose(2, 3, 1, 0))
    assert capsys.readouterr().err.endswith(f"; the head starts fresh: {reason}\n")
    with pytest.raises(UserError, match=re.escape(f"as the head would start fresh: {reason}; train, or choose")):
        load(tensors, tmp_path, normalized_head=normalized, whole=True)


def test_a_square_normalised_head_is_not_guessed(tmp_path, capsys):
    load(file(head="normalised", classes=4 * W), tmp_path, classes=4 * W, normalized_head=True)
    assert "the head starts fresh: the file's has no bias and weights [16, 16]" in capsys.readouterr().err


# --- what is refused --------------------------------------------------------------------------------


def refusal(tensors, folder, **options) -> str:
    with pytest.raises(UserError) as caught:
        load(tensors, folder, **options)
    return str(caught.value).replace(str(folder), "F")


def test_another_depth_or_width_is_told_by_its_field(tmp_path):
    assert refusal(file(blocks=3), tmp_path) == (
        "model.name = 'resnet8': has [1, 1, 1] blocks in its stages, the file F/weights.npz has [3, 3, 3]; set"
        " model.name = 'resnet20'"
    )
    assert refusal(file(blocks=2), tmp_path).endswith("has [2, 2, 2]; choose the model.name that the file is of")
    assert refusal(file(width=8), tmp_path) == (
        "model.width: the stem of resnet8 has 4 channels, that of the file F/weights.npz 8; set model.width = 8"
    )


def test_shortcuts_with_parameters_are_another_network(tmp_path):
    tensors = {**file(), "layer2.0.shortcut.0.weight": drawing(1)(8, 4, 1, 1)}
    assert refusal(tensors, tmp_path).endswith("of model.name = 'resnet8': unknown: layer2.0.shortcut.0.weight")


# --- in a run ---------------------------------------------------------------------------------------


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    config = config_lib.default()
    config.data.update(source="digits", name="digits", imbalance_factor=10.0, workers=0)
    config.augment.update(pad=0, flip=False)
    config.model.update(name="resnet8", width=W, pretrained=str(tmp_path / "weights.npz"))
    config.meta.batch_size = 20
    return config


@pytest.mark.parametrize(("method", "head"), [("crt", "linear"), ("ldam", "normalised")])
def test_weights_are_evaluated_as_they_are_where_there_is_no_run(method, head, config, tmp_path, capsys):
    tensors = file(head=head, classes=10, inputs=1)
    np.savez(tmp_path / "weights.npz", **tensors)
    config.method.name = method
    workdir = tmp_path / "none"
    results, page = evaluation.evaluate_run(config, workdir)
    assert f"no run in {workdir}: evaluates {config.model.pretrained} without" in capsys.readouterr().err
    data = data_lib.build(config_lib.resolve(config))
    predicted = twin(tensors, ((data.test_images - data.mean) / data.std).astype(np.float32)).argmax(axis=1)
    expected = np.zeros((10, 10), int)
    np.add.at(expected, (data.test_labels, predicted), 1)
    assert np.count_nonzero(expected.sum(axis=0)) >= 2  # the network does not say the same of all
    assert results["last"]["test"]["confusion"] == expected.tolist()
    assert (results["last"]["step"], results["best"], results["pretrained"]) == (0, None, config.model.pretrained)
    assert page == workdir / "eval" / "test" / "report.html"
    assert json.loads((page.parent / "results.json").read_text()) == json.loads(json.dumps(results))
    assert "Test split, as read from the file." in page.read_text()
    # Free for a run of any config, and for another evaluation.
    assert sorted(path.name for path in workdir.rglob("*") if path.is_file()) == ["report.html", "results.json"]


def test_a_head_that_would_start_fresh_is_not_evaluated(config, tmp_path):
    np.savez(tmp_path / "weights.npz", **file(classes=10, inputs=1))
    config.method.name = "ldam"
    with pytest.raises(UserError, match=r"cannot be evaluated without training.*the file's is linear"):
        evaluation.evaluate_run(config, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_training_starts_from_the_file_with_its_averages_and_its_head(config, tmp_path):
    tensors = file(classes=10, inputs=1)
    np.savez(tmp_path / "weights.npz", **tensors)
    config.method.name = "sampling_free"  # a new head of it starts at the log prior
    resolved = config_lib.resolve(config)
    state = experiment.build(resolved, data_lib.build(resolved)).init_pretrained()
    chex.assert_trees_all_equal(state.params["head"]["bias"], tensors["linear.bias"])
    block = "stage3", "BasicBlock_0"
    found = state.params[block[0]][block[1]]["Conv_1"]["kernel"], state.batch_stats[block[0]][block[1]]["BatchNorm_1"]
    chex.assert_trees_all_equal(found[0], tensors["layer3.0.conv2.weight"].transpose(2, 3, 1, 0))
    chex.assert_trees_all_equal(found[1]["var"], tensors["layer3.0.bn2.running_var"])
