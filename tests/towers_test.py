"""The image towers of CLIP and DINOv2: features as `transformers` computes them, from files by its names."""

import dataclasses
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from helpers import REPOSITORY

from mfm_jax import models
from mfm_jax.errors import UserError
from mfm_jax.models import pretrained, vit
from mfm_jax.models.vit import VisionTransformer

GOLDEN = REPOSITORY / "tests/golden/towers.json"
TOWERS = {"clip_vit_b16": vit.CLIP, "dinov2_vit_b14": vit.DINOV2, "dinov2_reg_vit_b14": vit.DINOV2_REGISTERS}
WIDTH, DEPTH, PATCH, SIDE, NUMBERS = 8, 2, 4, 8, 6  # of the small towers; NUMBERS is CLIP's projection
IMAGES = np.random.default_rng(1).uniform(-2, 2, (3, SIDE, SIDE, 3)).astype(np.float32)


def weights(shapes: dict[str, list[int]]) -> dict[str, np.ndarray]:
    """Returns random tensors by name, of which those that scale are near 1."""
    rng = np.random.default_rng(0)
    scales = {name: name.endswith("lambda1") or ("norm" in name and name.endswith("weight")) for name in shapes}
    return {name: rng.uniform(-0.5, 0.5, shape).astype(np.float32) + scales[name] for name, shape in shapes.items()}


def golden(name: str) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Returns the tensors of a small tower and the features of IMAGES, as transformers 5.24.0 computed them."""
    found = json.loads(GOLDEN.read_text())[name]
    return weights(found["shapes"]), np.float32(found["features"])


def small(name: str, classes: int = 3) -> VisionTransformer:
    tower = TOWERS[name]
    tower = dataclasses.replace(tower, projection=NUMBERS if tower.projection else 0)
    return VisionTransformer(classes, WIDTH, DEPTH, PATCH, tower=tower)


def load(tensors, folder, name: str, side: int = SIDE):
    path = folder / "tower.safetensors"
    safetensors.numpy.save_file(tensors, path)
    drawn = jax.jit(small(name).init)(jax.random.key(0), jnp.zeros((1, side, side, 3)))
    return pretrained.of_file(path, drawn["params"], {}, name)[0]


@jax.jit(static_argnums=0)
def features(module, params):
    seen = {}

    def record(site, found):
        seen[site] = found
        return found

    module.apply({"params": params}, IMAGES, modulate=record)
    return seen["pooled"]


def of_transformers(name: str):
    """Returns the shapes of a small tower's tensors, and the function of these tensors that gives the features."""
    torch, theirs = pytest.importorskip("torch"), pytest.importorskip("transformers")
    size = {"hidden_size": WIDTH, "num_hidden_layers": DEPTH, "num_attention_heads": 1, "patch_size": PATCH}
    size |= {"image_size": SIDE}
    if name == "clip_vit_b16":
        config = theirs.CLIPVisionConfig(**size, intermediate_size=4 * WIDTH, projection_dim=NUMBERS)
        net = theirs.CLIPVisionModelWithProjection(config)
    elif name == "dinov2_vit_b14":
        net = theirs.Dinov2Model(theirs.Dinov2Config(**size))
    else:
        net = theirs.Dinov2WithRegistersModel(theirs.Dinov2WithRegistersConfig(**size))

    def run(tensors):
        net.load_state_dict({key: torch.from_numpy(tensor) for key, tensor in tensors.items()})
        with torch.no_grad():
            found = net.eval()(torch.from_numpy(IMAGES.transpose(0, 3, 1, 2)))
        return (found.image_embeds if name == "clip_vit_b16" else found.pooler_output).numpy()

    return {key: list(tensor.shape) for key, tensor in net.state_dict().items()}, run


def write_golden() -> None:
    """Writes what `golden` reads; where transformers is installed: `python -c "...; towers_test.write_golden()"`."""
    made = {}
    for name in TOWERS:
        shapes, run = of_transformers(name)
        made[name] = {"shapes": shapes, "features": run(weights(shapes)).astype(float).round(7).tolist()}
    GOLDEN.write_text(json.dumps(made) + "\n")


@pytest.mark.parametrize("name", TOWERS)
def test_features_are_those_of_transformers(name, tmp_path):
    tensors, expected = golden(name)
    found = features(small(name), load(tensors, tmp_path, name))
    assert np.abs(expected - expected[0]).max() > 0.1  # images differ
    chex.assert_trees_all_close(found, expected, atol=2e-5)


@pytest.mark.parametrize("name", TOWERS)
def test_transformers_where_it_is_installed_says_the_same(name):
    shapes, run = of_transformers(name)
    tensors, expected = golden(name)
    assert shapes == {key: list(tensor.shape) for key, tensor in tensors.items()}
    np.testing.assert_allclose(run(tensors), expected, atol=1e-5)


def test_the_published_names_of_dinov2_are_read_too(tmp_path):
    tensors, _ = golden("dinov2_vit_b14")
    older = {"q_proj": "attention.query", "k_proj": "attention.key", "v_proj": "attention.value"}
    published = {}
    for name, tensor in tensors.items():
        for new, old in (older | {"o_proj": "output.dense"}).items():
            name = name.replace(f".attention.{new}.", f".attention.{old}.")
        published[name] = tensor
    assert "encoder.layer.1.attention.attention.query.weight" in published
    assert "encoder.layer.1.attention.output.dense.bias" in published
    expected = load(tensors, tmp_path, "dinov2_vit_b14")
    chex.assert_trees_all_equal(load(published, tmp_path, "dinov2_vit_b14"), expected)
    prefixed = {f"dinov2.{name}": tensor for name, tensor in published.items()}
    chex.assert_trees_all_equal(load(prefixed, tmp_path, "dinov2_vit_b14"), expected)


def test_of_all_of_clip_the_image_tower_is_read(tmp_path):
    tensors, _ = golden("clip_vit_b16")
    text = {"text_model.embeddings.token_embedding.weight": np.ones((5, 4)), "text_projection.weight": np.ones((6, 4))}
    more = {"logit_scale": np.array(4.6), "vision_model.embeddings.position_ids": np.arange(5)[None]}
    expected = load(tensors, tmp_path, "clip_vit_b16")
    chex.assert_trees_all_equal(load(tensors | text | more, tmp_path, "clip_vit_b16"), expected)
    del tensors["vision_model.pre_layrnorm.bias"]
    with pytest.raises(UserError, match=r"these are not the weights of .*: missing: norm_pre.bias$"):
        load(tensors, tmp_path, "clip_vit_b16")


def test_positions_are_interpolated_and_registers_have_none(tmp_path, capsys):
    tensors, _ = golden("dinov2_reg_vit_b14")
    params = load(tensors, tmp_path, "dinov2_reg_vit_b14", 2 * SIDE)
    assert "position embeddings are interpolated from 2 x 2 to 4 x 4" in capsys.readouterr().err
    assert params["stem"]["positions"].shape == (1, 17, WIDTH)
    chex.assert_trees_all_equal(params["stem"]["registers"], tensors["embeddings.register_tokens"])


@pytest.mark.parametrize(
    ("name", "side", "parameters"),
    [
        ("clip_vit_b16", 224, 86_192_640 + 513 * 10),
        ("dinov2_vit_b14", 518, 86_580_480 - 768 + 769 * 10),  # without the token of masked training
        ("dinov2_reg_vit_b14", 518, 86_583_552 - 768 + 769 * 10),
    ],
)
def test_the_published_sizes(name, side, parameters):
    """As transformers counts them, and a head of ten classes."""
    made = jax.eval_shape(models.create(name, 10, 0).init, jax.random.key(0), jnp.zeros((1, side, side, 3)))
    assert sum(leaf.size for leaf in jax.tree.leaves(made["params"])) == parameters


def test_scanned_blocks_compute_the_same():
    """With registers, layer scale and a projection at once, as no published tower has them."""
    tower = dataclasses.replace(vit.DINOV2_REGISTERS, pre_norm=True, projection=5)
    module = VisionTransformer(3, WIDTH, 3, PATCH, tower=tower, lora_rank=2)
    params = jax.jit(module.init)(jax.random.key(0), IMAGES)["params"]
    runs = models.stacked.runs(params)
    found = jax.jit(module.clone(scan_blocks=True).apply)({"params": models.stacked.stack(params, runs)}, IMAGES)
    chex.assert_trees_all_close(found, jax.jit(module.apply)({"params": params}, IMAGES), rtol=1e-4, atol=1e-6)
