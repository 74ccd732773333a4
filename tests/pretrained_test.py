"""Weights under the names of torchvision and timm find their places; what does not fit is named."""

import json
import re
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from helpers import REPOSITORY

from mfm_jax import config as config_lib
from mfm_jax import data as data_lib
from mfm_jax import models
from mfm_jax.errors import UserError
from mfm_jax.models import hub_cache, pretrained
from mfm_jax.models.imagenet import ResNet
from mfm_jax.models.vit import VisionTransformer
from mfm_jax.training import experiment as experiment_lib

RNG = np.random.default_rng(0)
W, K = 4, 3  # width and classes


def conv(outputs: int, inputs: int, side: int) -> dict:
    return {"weight": (outputs, inputs, side, side)}


def dense(outputs: int, inputs: int) -> dict:
    return {"weight": (outputs, inputs), "bias": (outputs,)}


def norm(size: int) -> dict:
    return dict.fromkeys(("weight", "bias", "running_mean", "running_var"), (size,)) | {"num_batches_tracked": ()}


def state_dict(layers: dict) -> dict[str, np.ndarray]:
    """Returns random tensors by name, from `{layer: shape, or shapes by name}`."""
    flat = {}
    for layer, shapes in layers.items():
        named = shapes if isinstance(shapes, dict) else {"": shapes}
        flat |= {f"{layer}.{name}".rstrip("."): shape for name, shape in named.items()}
    return {name: RNG.uniform(0.1, 1.0, shape).astype(np.float32) for name, shape in flat.items()}


# A ResNet-10 of bottlenecks, two stages: written out as PyTorch prints it.
RESNET = ResNet((2, 1), K, W, bottleneck=True)
RESNET_LAYERS = {
    "conv1": conv(W, 3, 7),
    "bn1": norm(W),
    "layer1.0.conv1": conv(W, W, 1),
    "layer1.0.bn1": norm(W),
    "layer1.0.conv2": conv(W, W, 3),
    "layer1.0.bn2": norm(W),
    "layer1.0.conv3": conv(4 * W, W, 1),
    "layer1.0.bn3": norm(4 * W),
    "layer1.0.downsample.0": conv(4 * W, W, 1),
    "layer1.0.downsample.1": norm(4 * W),
    "layer1.1.conv1": conv(W, 4 * W, 1),
    "layer1.1.bn1": norm(W),
    "layer1.1.conv2": conv(W, W, 3),
    "layer1.1.bn2": norm(W),
    "layer1.1.conv3": conv(4 * W, W, 1),
    "layer1.1.bn3": norm(4 * W),
    "layer2.0.conv1": conv(2 * W, 4 * W, 1),
    "layer2.0.bn1": norm(2 * W),
    "layer2.0.conv2": conv(2 * W, 2 * W, 3),
    "layer2.0.bn2": norm(2 * W),
    "layer2.0.conv3": conv(8 * W, 2 * W, 1),
    "layer2.0.bn3": norm(8 * W),
    "layer2.0.downsample.0": conv(8 * W, 4 * W, 1),
    "layer2.0.downsample.1": norm(8 * W),
    "fc": dense(K, 8 * W),
}
VIT = VisionTransformer(K, W, depth=2, patch=8)
TIMM = {
    "cls_token": (1, 1, W),
    "pos_embed": (1, 5, W),
    "patch_embed.proj": conv(W, 3, 8) | {"bias": (W,)},
    **{
        f"blocks.{i}.{layer}": shapes
        for i in range(2)
        for layer, shapes in {
            "norm1": {"weight": (W,), "bias": (W,)},
            "attn.qkv": dense(3 * W, W),
            "attn.proj": dense(W, W),
            "norm2": {"weight": (W,), "bias": (W,)},
            "mlp.fc1": dense(4 * W, W),
            "mlp.fc2": dense(W, 4 * W),
        }.items()
    },
    "norm": {"weight": (W,), "bias": (W,)},
    "head": dense(K, W),
}
TORCHVISION = {
    "cls_token": "class_token",
    "pos_embed": "encoder.pos_embedding",
    "patch_embed.proj.": "conv_proj.",
    "blocks.": "encoder.layers.encoder_layer_",
    ".norm1.": ".ln_1.",
    ".norm2.": ".ln_2.",
    ".attn.qkv.": ".self_attention.in_proj_",
    ".attn.proj.": ".self_attention.out_proj.",
    ".mlp.fc1.": ".mlp.0.",
    ".mlp.fc2.": ".mlp.3.",
    "norm.": "encoder.ln.",
    "head.": "heads.head.",
}


def in_torchvision(tensors: dict) -> dict:
    renamed = {}
    for name, tensor in tensors.items():
        for theirs, other in TORCHVISION.items():
            name = other + name[len(theirs) :] if name.startswith(theirs) else name
            name = name.replace(theirs, other) if theirs.startswith(".") else name
        renamed[name] = tensor
    return renamed


def variables_of(module, shape=(1, 16, 16, 3)):
    """Returns the shapes of a new classifier; where a leaf stays as it is, its shape stays."""
    return jax.eval_shape(module.init, jax.random.key(0), jnp.zeros(shape))


def load(tensors, folder, module=VIT, name="vit_b16", shape=(1, 16, 16, 3)):
    path = folder / "weights.safetensors"
    safetensors.numpy.save_file(tensors, path)
    start = variables_of(module, shape)
    params, batch_stats = pretrained.of_file(path, start["params"], start.get("batch_stats", {}), name)
    chex.assert_trees_all_equal_shapes_and_dtypes(
        {"params": params, "batch_stats": batch_stats}, {"batch_stats": {}, **start}
    )
    return params, batch_stats


def total(tree) -> float:
    return sum(float(np.sum(leaf, dtype=np.float64)) for leaf in jax.tree.leaves(tree))


def test_a_resnet_finds_every_place(tmp_path, capsys):
    tensors = state_dict(RESNET_LAYERS)
    params, batch_stats = load(
        {f"module.{name}": tensor for name, tensor in tensors.items()}, tmp_path, RESNET, "resnet50"
    )
    chex.assert_trees_all_equal(params["stem"]["kernel"][2, 6, 1], tensors["conv1.weight"][:, 1, 2, 6])
    chex.assert_trees_all_equal(params["stage1"]["block1"]["norm2"]["scale"], tensors["layer1.1.bn2.weight"])
    chex.assert_trees_all_equal(params["stage1"]["block1"]["norm2"]["bias"], tensors["layer1.1.bn2.bias"])
    chex.assert_trees_all_equal(batch_stats["stem_norm"]["mean"], tensors["bn1.running_mean"])
    shortcut = params["stage2"]["block0"]["shortcut"]["kernel"]
    chex.assert_trees_all_equal(shortcut[0, 0], tensors["layer2.0.downsample.0.weight"][:, :, 0, 0].T)
    found = batch_stats["stage2"]["block0"]["shortcut_norm"]["var"]
    chex.assert_trees_all_equal(found, tensors["layer2.0.downsample.1.running_var"])
    chex.assert_trees_all_equal(params["head"]["kernel"], tensors["fc.weight"].T)
    used = {name: tensor for name, tensor in tensors.items() if not name.endswith("num_batches_tracked")}
    assert total((params, batch_stats)) == pytest.approx(total(used))
    assert capsys.readouterr().err == f"pretrained weights: {tmp_path / 'weights.safetensors'}\n"


def test_a_transformer_finds_every_place_under_either_name(tmp_path):
    tensors = state_dict(TIMM)
    params, _ = load(tensors, tmp_path)
    chex.assert_trees_all_equal(params["stem"]["positions"], tensors["pos_embed"])
    chex.assert_trees_all_equal(params["block2"]["qkv"]["kernel"], tensors["blocks.1.attn.qkv.weight"].T)
    chex.assert_trees_all_equal(params["block1"]["fc2"]["bias"], tensors["blocks.0.mlp.fc2.bias"])
    assert total(params) == pytest.approx(total(tensors))
    other = in_torchvision(tensors)
    assert {"encoder.layers.encoder_layer_1.self_attention.in_proj_bias", "encoder.ln.weight", "conv_proj.bias"} <= set(
        other
    )
    assert not set(other) & set(tensors)
    chex.assert_trees_all_equal(load(other, tmp_path)[0], params)
    older = {
        name.replace(".mlp.0.", ".mlp.linear_1.").replace(".mlp.3.", ".mlp.linear_2."): other[name] for name in other
    }
    chex.assert_trees_all_equal(load(older, tmp_path)[0], params)


# --- what may differ, and is said -------------------------------------------------------------------


@pytest.mark.parametrize("classes", [7, None])
def test_a_head_of_other_classes_starts_fresh(classes, tmp_path, capsys):
    tensors = state_dict(TIMM if classes is None else TIMM | {"head": dense(classes, W)})
    if classes is None:
        del tensors["head.weight"], tensors["head.bias"]
    params, _ = load(tensors, tmp_path)
    assert isinstance(params["head"]["kernel"], jax.ShapeDtypeStruct)  # what was given
    assert isinstance(params["norm"]["scale"], np.ndarray)
    why = "the file has none" if classes is None else "the file's has 7 classes, not 3"
    assert capsys.readouterr().err.endswith(f"; the head starts fresh: {why}\n")


def test_positions_of_another_grid_are_interpolated(tmp_path, capsys):
    tensors = state_dict(TIMM)
    # A ramp from left to right, whose interpolation is a ramp but for the border.
    ramp = np.broadcast_to(np.arange(4.0, dtype=np.float32)[None, :, None], (4, 4, W)).reshape(1, 16, W)
    tensors["pos_embed"] = np.concatenate([tensors["cls_token"], ramp], axis=1)
    positions = load(tensors, tmp_path, shape=(1, 64, 64, 3))[0]["stem"]["positions"]
    chex.assert_trees_all_equal(positions[:, :1], tensors["cls_token"])
    grid = positions[0, 1:].reshape(8, 8, W)
    chex.assert_trees_all_close(grid, np.broadcast_to(grid[:1, :, :1], grid.shape), rtol=1e-5)
    chex.assert_trees_all_close(grid[0, 2:6, 0], np.float32([0.75, 1.25, 1.75, 2.25]), atol=0.05)
    assert "interpolated from 4 x 4 to 8 x 8" in capsys.readouterr().err


def test_a_grey_picture_is_read_as_three_equal_channels(tmp_path, capsys):
    tensors = state_dict(RESNET_LAYERS)
    colour, _ = load(tensors, tmp_path, RESNET, "resnet50")
    grey, _ = load(tensors, tmp_path, RESNET, "resnet50", (1, 16, 16, 1))
    picture = RNG.normal(size=(1, 9, 9, 1)).astype(np.float32)

    def stem(image, kernel):
        return jax.lax.conv_general_dilated(image, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    found, expected = stem(picture, grey["stem"]["kernel"]), stem(picture.repeat(3, -1), colour["stem"]["kernel"])
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-5)
    assert "the stem's 3 input channels are summed to 1" in capsys.readouterr().err


def test_adapters_are_no_part_of_a_file(tmp_path):
    params, _ = load(state_dict(TIMM), tmp_path, VIT.clone(adapter_size=2))
    assert isinstance(params["block1"]["adapter_up"]["kernel"], jax.ShapeDtypeStruct)


# --- what is refused --------------------------------------------------------------------------------


def refusal(tensors, folder, *args) -> str:
    with pytest.raises(UserError) as caught:
        load(tensors, folder, *args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_tensor_is_accounted_for(tmp_path):
    tensors = state_dict(TIMM)
    del tensors["blocks.1.norm2.bias"]
    tensors["blocks.7.extra"] = tensors["head.weight"]
    tensors["norm.weight"] = np.ones(W + 1, np.float32)
    told = refusal(tensors, tmp_path)
    assert told.startswith(f"model.pretrained = {str(tmp_path / 'weights.safetensors')!r}: ")
    assert "missing: blocks.1.norm2.bias; unknown: blocks.7.extra; of another shape: norm.weight ([5], not [4]" in told


def test_another_architecture_is_refused(tmp_path):
    assert re.search("missing: .* more; unknown: .* more", refusal(state_dict(TIMM), tmp_path, RESNET, "resnet50"))


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        pretrained.of_file(tmp_path / "none.npz", {}, {}, "resnet50")
    np.savez(tmp_path / "words.npz", arch="resnet50")
    for name in ("damaged.safetensors", "damaged.npz"):
        (tmp_path / name).write_bytes(b"\x07" * 50)
    for name in ("damaged.safetensors", "damaged.npz", "words.npz"):
        with pytest.raises(UserError, match=f"{name}.*: cannot be read"):
            pretrained.of_file(tmp_path / name, {}, {}, "resnet50")


def test_torch_files_without_torch_say_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)  # as if it were not installed
    (tmp_path / "weights.pth").write_bytes(b"")
    with pytest.raises(UserError, match="needs PyTorch: install the extra `bench`, or convert"):
        pretrained.of_file(tmp_path / "weights.pth", {}, {}, "resnet50")


# --- in a run ---------------------------------------------------------------------------------------


def test_a_run_starts_from_the_file_and_tunes_the_head_alone(tmp_path):
    config = config_lib.default()
    config.data.update(source="digits", name="digits", imbalance_factor=10.0)
    config.augment.update(pad=0, flip=False)
    config.model.update(name="resnet10", width=W, tune="head", pretrained=str(tmp_path / "weights.npz"))
    resolved = config_lib.resolve(config)
    experiment = experiment_lib.build(resolved, data_lib.build(resolved))
    with pytest.raises(UserError, match="no such file"):
        experiment.init_pretrained()
    np.savez(tmp_path / "weights.npz", **resnet10_file())
    state = experiment.init_pretrained()
    chex.assert_trees_all_equal(state.params["stage2"]["block0"]["conv1"]["kernel"], jnp.full((3, 3, W, 2 * W), 0.25))
    chex.assert_trees_all_equal(state.batch_stats["stem_norm"]["var"], jnp.full(W, 0.25))
    assert float(state.params["head"]["kernel"].std()) > 0.1  # the file's head was for 2 classes


def resnet10_file() -> dict[str, np.ndarray]:
    """Returns a file's content for plain blocks: all values 1/4, and a head of 2 classes."""
    layers = {"conv1": conv(W, 1, 7), "bn1": norm(W), "fc": dense(2, 8 * W)}
    for i in range(4):
        inputs, outputs = W * 2 ** max(i - 1, 0), W * 2**i
        block = {
            "conv1": conv(outputs, inputs, 3),
            "bn1": norm(outputs),
            "conv2": conv(outputs, outputs, 3),
            "bn2": norm(outputs),
        }
        if i:
            block |= {"downsample.0": conv(outputs, inputs, 1), "downsample.1": norm(outputs)}
        layers |= {f"layer{i + 1}.0.{name}": shapes for name, shapes in block.items()}
    return {name: np.full_like(tensor, 0.25) for name, tensor in state_dict(layers).items()}


# --- against PyTorch --------------------------------------------------------------------------------


def randomised(torch, net):
    """Returns a network of which nothing is zero or one; small tokens, so that the norms' epsilon counts."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, tensor in [*net.named_parameters(), *net.named_buffers()]:
            if (
                name.endswith(("cls_token", "class_token", "pos_embed", "pos_embedding", "proj.weight"))
                and "block" not in name
            ):
                tensor.normal_(std=2e-3)
            elif name.endswith(("fc.weight", "head.weight")):
                tensor.normal_(std=0.3)
            elif name.endswith("running_var"):
                tensor.uniform_(0.5, 1.5)
            elif tensor.ndim == 1:
                tensor.add_(0.2 * torch.rand_like(tensor))
    return net.eval()


def torch_nets():
    torchvision, timm = pytest.importorskip("torchvision").models, pytest.importorskip("timm").models
    vit = {"num_classes": K, "image_size": 32, "patch_size": 8, "num_layers": 2, "num_heads": 2}
    block = torchvision.resnet
    return {
        "resnet": (block.ResNet(block.BasicBlock, [1, 1, 1, 1], K), models.create("resnet10", K, 0)),
        "bottleneck": (block.ResNet(block.Bottleneck, [1, 2, 1, 1], K), ResNet((1, 2, 1, 1), K, bottleneck=True)),
        "resnext": (
            block.ResNet(block.Bottleneck, [1, 1, 1, 1], K, groups=32, width_per_group=4),
            ResNet((1, 1, 1, 1), K, bottleneck=True, groups=32),
        ),
        "timm_resnet": (timm.create_model("resnet18", num_classes=K), models.create("resnet18", K, 0)),
        "vit": (torchvision.VisionTransformer(hidden_dim=128, mlp_dim=512, **vit), VisionTransformer(K, 128, 2, 8)),
        "timm_vit": (
            timm.VisionTransformer(32, 8, num_classes=K, embed_dim=128, depth=2, num_heads=2),
            VisionTransformer(K, 128, 2, 8),
        ),
    }


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["resnet", "bottleneck", "resnext", "timm_resnet", "vit", "timm_vit"])
@pytest.mark.parametrize("wrapper", [None, "state_dict"])
def test_logits_are_those_of_pytorch(kind, wrapper, tmp_path):
    torch = pytest.importorskip("torch")
    theirs, ours = torch_nets()[kind]
    state = randomised(torch, theirs).state_dict()
    torch.save({wrapper: state} if wrapper else state, tmp_path / "weights.pth")
    new = variables_of(ours, (1, 32, 32, 3))
    name = "vit_b16" if "vit" in kind else "resnet50"
    params, batch_stats = pretrained.of_file(tmp_path / "weights.pth", new["params"], new.get("batch_stats", {}), name)
    images = np.random.default_rng(1).normal(size=(3, 32, 32, 3)).astype(np.float32)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(images.transpose(0, 3, 1, 2))).numpy()
    assert expected.std(axis=0).min() > 0.02  # images differ
    found = jax.jit(ours.apply)({"params": params, "batch_stats": batch_stats}, images)
    chex.assert_trees_all_close(found, expected, atol=1e-4)


# --- by timm's names, from the hub's cache ----------------------------------------------------------

TIMM_NAMES = {name: name for name in ("resnet18", "resnet50")}
TIMM_NAMES |= {"resnext50": "resnext50_32x4d", "vit_b16": "vit_base_patch16_224"}


def cached(name: str, cache, commit: str = "0a1b", main: bool = True):
    """Makes a place for the file of `timm/NAME` as the hub's client lays it out, and returns its path."""
    folder = cache / "hub" / f"models--timm--{name}"
    (folder / "snapshots" / commit).mkdir(parents=True)
    (folder / "refs").mkdir(exist_ok=True)
    if main:
        (folder / "refs" / "main").write_text(commit)
    return folder / "snapshots" / commit / "model.safetensors"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.mark.parametrize("name", TIMM_NAMES)
def test_every_tensor_of_timm_has_its_place(name, monkeypatch):
    """At full size, by the names and shapes that timm 1.0.31 lists: values that take no memory."""
    shapes = json.loads((REPOSITORY / "tests/golden/timm.json").read_text())[TIMM_NAMES[name]]
    tensors = {key: np.broadcast_to(np.float32(0), shape) for key, shape in shapes.items()}
    monkeypatch.setattr(pretrained, "_read", lambda path: tensors)
    new = variables_of(models.create(name, 1000, 0), (1, 224, 224, 3))
    found = pretrained.of_file("weights.safetensors", new["params"], new.get("batch_stats", {}), name, whole=True)
    chex.assert_trees_all_equal_shapes(found, (new["params"], new.get("batch_stats", {})))


def test_a_name_of_timm_is_found_in_the_cache(cache, capsys):
    path = cached("resnet18.a1_in1k", cache)
    assert hub_cache.cache() == cache / "hub"
    with pytest.raises(UserError, match=r"not in the cache, .*hf download timm/resnet18.a1_in1k model.safetensors"):
        hub_cache.path_of("timm/resnet18.a1_in1k", "resnet18")
    path.touch()
    assert hub_cache.path_of("timm/resnet18.a1_in1k", "resnet18") == path
    cached("resnet18.a1_in1k", cache, "9f", main=False).touch()  # another version; the main one counts
    assert hub_cache.path_of("timm/resnet18.a1_in1k", "resnet18") == path
    (path.parents[2] / "refs" / "main").unlink()
    with pytest.raises(UserError, match="2 versions in the cache, none of them main"):
        hub_cache.path_of("timm/resnet18.a1_in1k", "resnet18")
    path.unlink()
    assert hub_cache.path_of("timm/resnet18.a1_in1k", "resnet18").parent.name == "9f"


def test_the_cache_is_where_the_client_has_it(monkeypatch, tmp_path):
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert hub_cache.cache() == tmp_path / ".cache/huggingface/hub"
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert str(hub_cache.cache()) == "/x/huggingface/hub"
    monkeypatch.setenv("HF_HOME", "/h")
    assert str(hub_cache.cache()) == "/h/hub"
    monkeypatch.setenv("HF_HUB_CACHE", "/c")
    assert str(hub_cache.cache()) == "/c"


def test_a_name_of_another_architecture_is_refused(cache, tmp_path, monkeypatch):
    """Also where the tensors would fit: `resnetblur50` has those of `resnet50`."""
    with pytest.raises(UserError, match=r"not of model.name = 'resnet50'; timm's are resnet50$"):
        hub_cache.path_of("timm/resnetblur50.bt_in1k", "resnet50")
    with pytest.raises(UserError, match=r"not of model.name = 'resnet50'; set model.name = 'vit_b16'"):
        hub_cache.path_of("timm/vit_base_patch16_384.augreg_in1k", "resnet50")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "timm").mkdir()
    (tmp_path / "timm" / "mine").touch()  # a file of the user's comes first
    assert hub_cache.path_of("timm/mine", "resnet50") == hub_cache.Path("timm/mine")


@pytest.mark.parametrize(
    ("mean", "std", "told"),
    [
        ([0.5, 0.5, 0.5], [0.5, 0.5, 0.5], "they want data.normalize = 'half'"),
        ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225], "they want data.normalize = 'imagenet'"),
        ([0, 0, 0], [1, 1, 1], "they want images of mean [0.0, 0.0, 0.0] and deviation [1.0, 1.0, 1.0], which"),
    ],
)
def test_the_normalisation_that_weights_want_is_told(mean, std, told, cache, tmp_path, capsys):
    path = cached("resnet18.a1_in1k", cache)
    shapes = json.loads((REPOSITORY / "tests/golden/timm.json").read_text())["resnet18"]
    safetensors.numpy.save_file({name: np.zeros(shape, np.float32) for name, shape in shapes.items()}, path)
    (path.parent / "config.json").write_text(json.dumps({"pretrained_cfg": {"mean": mean, "std": std}}))
    new = variables_of(models.create("resnet18", 1000, 0), (1, 64, 64, 3))
    pretrained.of_file("timm/resnet18.a1_in1k", new["params"], new["batch_stats"], "resnet18")
    assert f"pretrained weights: timm/resnet18.a1_in1k; {told}" in capsys.readouterr().err
    (path.parent / "config.json").unlink()
    assert hub_cache.normalization(path) == ""


@pytest.mark.slow
@pytest.mark.parametrize("name", TIMM_NAMES)
def test_logits_are_those_of_timm_at_full_size(name, cache):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    torch, saved = pytest.importorskip("torch"), pytest.importorskip("safetensors.torch")
    theirs = randomised(torch, timm.create_model(TIMM_NAMES[name], num_classes=K))
    saved.save_file(theirs.state_dict(), cached(f"{TIMM_NAMES[name]}.mine", cache))
    module, side = models.create(name, K, 0), 224 if name == "vit_b16" else 96
    new = variables_of(module, (1, side, side, 3))
    given = new["params"], new.get("batch_stats", {})
    pair = pretrained.of_file(f"timm/{TIMM_NAMES[name]}.mine", *given, name, whole=True)
    images = np.random.default_rng(1).normal(size=(2, side, side, 3)).astype(np.float32)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(images.transpose(0, 3, 1, 2))).numpy()
    assert expected.std(axis=0).min() > 1e-3  # images differ
    found = jax.jit(module.apply)(dict(zip(("params", "batch_stats"), pair, strict=True)), images)
    gap = float(np.abs(found - expected).max() / np.abs(expected).max())
    print(f"{name}: largest difference / largest logit {gap:.1e}")
    assert gap < 1e-4
