"""Networks written out a second time, in PyTorch: the same numbers from the same weights. And their derivatives."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import configured, to_double

from mfm_jax import models
from mfm_jax.errors import UserError
from mfm_jax.models import native, pretrained
from mfm_jax.models.densenet import DenseNet
from mfm_jax.models.efficientnet import EfficientNet, Plan
from mfm_jax.models.wide_resnet import WideResNet

STAGES = (Plan(1, 3, 1, 16, 1), Plan(2, 5, 2, 24, 6), Plan(2, 3, 1, 24, 6))
NETWORKS = {
    "wide": WideResNet(2, 3, 4, widen=2),
    "dense": DenseNet(2, 3, 4),
    "efficient": EfficientNet(3, 16, STAGES),
}
IMAGES = np.random.default_rng(0).normal(size=(3, 16, 16, 3)).astype(np.float32)


def randomised(module):
    """Returns variables of which nothing is zero or one."""
    drawn, rng = jax.jit(module.init)(jax.random.key(0), IMAGES), np.random.default_rng(1)

    def away(path, leaf):
        if path[-1].key == "kernel":
            return leaf
        return (leaf + rng.uniform(0.05, 0.4, leaf.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(away, drawn)


class InTorch:
    """The layers of a network, by the names that they have here."""

    def __init__(self, torch, variables):
        self.torch, self.functional = torch, torch.nn.functional
        self.params, self.stats = variables["params"], variables["batch_stats"]

    def tensor(self, value):
        return self.torch.from_numpy(np.array(value))

    def at(self, tree, path):
        for part in path.split("/"):
            tree = tree[part]
        return tree

    def conv(self, x, path, stride=1):
        kernel = self.tensor(self.at(self.params, path)["kernel"]).permute(3, 2, 0, 1)
        return self.functional.conv2d(x, kernel, stride=stride, padding=kernel.shape[-1] // 2)

    def norm(self, x, path):
        own, stats = self.at(self.params, path), self.at(self.stats, path)
        given = (stats["mean"], stats["var"], own["scale"], own["bias"])
        return self.functional.batch_norm(x, *map(self.tensor, given))

    def active(self, x, path):
        return self.functional.relu(self.norm(x, path))

    def head(self, x):
        kernel, bias = (self.tensor(self.params["head"][name]) for name in ("kernel", "bias"))
        return x.mean((2, 3)) @ kernel + bias


def wide_resnet(net, x):
    x = net.conv(x, "stem")
    for i in (1, 2, 3):
        for j in (0, 1):
            block, stride = f"stage{i}/block{j}", 2 if i > 1 and j == 0 else 1
            active = net.active(x, f"{block}/norm1")
            y = net.conv(net.active(net.conv(active, f"{block}/conv1", stride), f"{block}/norm2"), f"{block}/conv2")
            x = y + (net.conv(active, f"{block}/shortcut", stride) if j == 0 else x)
    return net.head(net.active(x, "norm"))


def densenet(net, x):
    x = net.conv(x, "stem")
    for i in (1, 2, 3):
        for j in (0, 1):
            layer = f"stage{i}/layer{j}"
            y = net.conv(net.active(x, f"{layer}/norm1"), f"{layer}/conv1")
            x = net.torch.cat([x, net.conv(net.active(y, f"{layer}/norm2"), f"{layer}/conv2")], 1)
        x = net.active(x, f"stage{i}/norm")
        x = net.functional.avg_pool2d(net.conv(x, f"stage{i}/transition"), 2) if i < 3 else x
    return net.head(x)


@pytest.mark.parametrize(("name", "theirs"), [("wide", wide_resnet), ("dense", densenet)])
def test_logits_are_those_of_the_network_in_pytorch(name, theirs):
    torch = pytest.importorskip("torch")
    module = NETWORKS[name]
    variables = randomised(module)
    images = torch.from_numpy(IMAGES.transpose(0, 3, 1, 2).copy())
    expected = theirs(InTorch(torch, jax.device_get(variables)), images).numpy()
    assert expected.std(axis=0).min() > 5e-3  # images differ
    chex.assert_trees_all_close(jax.jit(module.apply)(variables, IMAGES), expected, rtol=1e-5, atol=2e-5)


# --- EfficientNet, by torchvision's names -----------------------------------------------------------


def efficient_net(torch):
    """Returns the network of `STAGES` as torchvision names its parts."""
    nn = torch.nn

    def unit(inputs, outputs, kernel, stride=1, groups=1, active=True):
        conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
        return nn.Sequential(conv, nn.BatchNorm2d(outputs), *[nn.SiLU()] * active)

    class Excitation(nn.Module):
        def __init__(self, channels, squeezed):
            super().__init__()
            self.fc1, self.fc2 = nn.Conv2d(channels, squeezed, 1), nn.Conv2d(squeezed, channels, 1)

        def forward(self, x):
            return x * torch.sigmoid(self.fc2(nn.functional.silu(self.fc1(x.mean((2, 3), keepdim=True)))))

    class Bottleneck(nn.Module):
        def __init__(self, inputs, outputs, stride, plan):
            super().__init__()
            inner, self.adds = inputs * plan.expand, stride == 1 and inputs == outputs
            first = [unit(inputs, inner, 1)] if plan.expand > 1 else []
            depthwise = unit(inner, inner, plan.kernel, stride, groups=inner)
            last = unit(inner, outputs, 1, active=False)
            self.block = nn.Sequential(*first, depthwise, Excitation(inner, max(inputs // 4, 1)), last)

        def forward(self, x):
            return x + self.block(x) if self.adds else self.block(x)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            stages, inputs = [unit(3, 16, 3, 2)], 16
            for plan, outputs in zip(STAGES, (8, 16, 16), strict=True):
                blocks = []
                for i in range(plan.blocks):
                    blocks.append(Bottleneck(inputs, outputs, plan.stride if i == 0 else 1, plan))
                    inputs = outputs
                stages.append(nn.Sequential(*blocks))
            stages += [nn.Identity()] * (8 - len(stages)) + [unit(inputs, 640, 1)]  # the last one is features.8
            self.features = nn.Sequential(*stages)
            self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(640, 3))

        def forward(self, x):
            return self.classifier(self.features(x).mean((2, 3)))

    return Net().eval()


def test_logits_are_those_of_an_efficientnet_whose_weights_are_named_as_torchvision_names_them(tmp_path):
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    theirs = efficient_net(torch)
    with torch.no_grad():
        for name, tensor in [*theirs.named_parameters(), *theirs.named_buffers()]:
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 1.5)
            elif tensor.ndim == 1:
                tensor.add_(0.3 * torch.rand_like(tensor))
            elif tensor.ndim == 4:
                tensor.mul_(2)
        expected = theirs(torch.from_numpy(IMAGES.transpose(0, 3, 1, 2).copy())).numpy()
    assert expected.std(axis=0).min() > 1e-3  # images differ
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    module = NETWORKS["efficient"]
    new = jax.eval_shape(module.init, jax.random.key(0), IMAGES)
    start = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), new)
    given = start["params"], start["batch_stats"], "efficientnet_b0"
    pair = pretrained.load(tmp_path / "weights.pth", *given, whole=True)
    found = jax.jit(module.apply)(dict(zip(("params", "batch_stats"), pair, strict=True)), IMAGES)
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-5)


def test_the_tensors_of_an_efficientnet_have_torchvisions_names():
    """Some of those that torchvision lists for `efficientnet_b0`, and how many it has."""
    shapes = jax.eval_shape(models.create("efficientnet_b0", 1000, 0).init, jax.random.key(0), np.zeros((1, 64, 64, 3)))
    named = {}
    for path, leaf in jax.tree.leaves_with_path(shapes):
        name = pretrained._name("/".join(key.key for key in path[1:]), pretrained._EFFICIENT)
        assert named.setdefault(name, leaf.shape) is leaf.shape
    assert len(named) == 213 + 2 * 49  # parameters, and the averages of 49 norms
    listed = {
        "features.0.0.weight": (3, 3, 3, 32),
        "features.1.0.block.0.0.weight": (3, 3, 1, 32),
        "features.1.0.block.1.fc1.weight": (1, 1, 32, 8),
        "features.1.0.block.2.1.running_mean": (16,),
        "features.2.0.block.0.0.weight": (1, 1, 16, 96),
        "features.3.1.block.1.0.weight": (5, 5, 1, 240),
        "features.3.1.block.2.fc2.bias": (240,),
        "features.7.0.block.3.0.weight": (1, 1, 1152, 320),
        "features.8.1.bias": (1280,),
        "classifier.1.weight": (1280, 1000),
    }
    assert {name: named[name] for name in listed} == listed


# --- derivatives ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_of_a_training_pass_are_finite_differences(name, wide):
    """In float64, along a random direction, batch statistics included."""
    module = NETWORKS[name].clone(dtype=jnp.float64)
    variables, images = to_double(randomised(NETWORKS[name])), jnp.asarray(IMAGES, jnp.float64)

    @jax.jit
    def loss(params):
        given = {**variables, "params": params}
        logits, _ = module.apply(given, images, train=True, mutable=["batch_stats"])
        return jnp.sin(logits).sum()

    rng = np.random.default_rng(2)
    direction = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), variables["params"])
    gradient = jax.jit(jax.grad(loss))(variables["params"])
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient))
    slope = sum(jnp.vdot(a, b) for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(direction), strict=True))
    step = 1e-7  # few of the ReLUs pass zero on so short a way
    ends = [loss(jax.tree.map(lambda p, d, s=s: p + s * step * d, variables["params"], direction)) for s in (1, -1)]
    assert float(slope) == pytest.approx(float(ends[0] - ends[1]) / (2 * step), rel=1e-4)


@pytest.mark.parametrize("name", NETWORKS)
def test_native_convolutions_give_the_numbers_of_xlas(name, monkeypatch):
    """Where there are kernels: what they do not do, such as a convolution of each channel for itself, is XLA's."""
    if native.lowering() == "xla":
        pytest.skip(f"no native kernels: {native.reason()}")
    module = NETWORKS[name]
    variables = randomised(module)

    def run():
        def loss(params):
            return jnp.sin(module.apply({**variables, "params": params}, IMAGES)).sum()

        return jax.jit(jax.value_and_grad(loss))(variables["params"])

    found = run()
    monkeypatch.setattr(native, "lowering", lambda dtype="float32": "xla")
    jax.clear_caches()
    expected = run()
    size = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected))
    chex.assert_trees_all_close(found, expected, atol=1e-4 * size)


@pytest.mark.parametrize("name", ["wrn28_10", "densenet_bc100"])
def test_no_files_are_read_for_a_network_without_published_names(name):
    with pytest.raises(UserError, match=rf"model.pretrained = 'a.npz': no files are read for model.name = '{name}'"):
        configured("ce", model__name=name, model__pretrained="a.npz")


@pytest.mark.parametrize("name", ["efficientnet_b0", "densenet_bc100"])
def test_networks_of_unequal_blocks_are_not_scanned(name):
    with pytest.raises(UserError, match=f"model.scan_blocks = True: {name} is not made of equal blocks; choose"):
        configured("ce", model__name=name, model__scan_blocks=True)
