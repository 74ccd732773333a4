"""The same network, loss, optimizer and MFM step in PyTorch, written for this comparison.

The meta-gradient is taken the way PyTorch offers, by reverse over reverse mode: `torch.func.grad` of a function that
itself takes `torch.func.grad` and does the SGD step with the result. The policy on batch norm is that of
`mfm_jax.bilevel`: running averages in the meta pass, and running averages that describe the plain network.

Options are the fast ones: cuDNN tries its algorithms, and on GPUs float32 products may use TF32, as in JAX.
"""

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from contenders import Program, Spec
from torch import Tensor, nn
from torch.func import functional_call, grad, grad_and_value

Tensors = dict[str, Tensor]
Modulate = Callable[[str, Tensor], Tensor]
MOMENTUM, WEIGHT_DECAY, LEARNING_RATE, META_LEARNING_RATE = 0.9, 5e-4, 0.1, 1e-2


class Norm(nn.Module):
    """Batch norm whose mode is an argument, so that one module serves the training pass and the meta pass."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.mean: Tensor
        self.var: Tensor
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("var", torch.ones(channels))

    def forward(self, x: Tensor, train: bool) -> Tensor:
        return F.batch_norm(x, self.mean, self.var, self.weight, self.bias, train, 1 - MOMENTUM, 1e-5)


def _conv(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    conv = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
    nn.init.kaiming_normal_(conv.weight)
    return conv


class Block(nn.Module):
    """Two 3x3 convolutions and the shortcut that subsamples and pads with zeros (option A of He et al.)."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.stride, self.extra = stride, outputs - inputs
        self.conv0, self.norm0 = _conv(inputs, outputs, stride), Norm(outputs)
        self.conv1, self.norm1 = _conv(outputs, outputs), Norm(outputs)

    def forward(self, x: Tensor, train: bool) -> Tensor:
        y = F.relu(self.norm0(self.conv0(x), train))
        y = self.norm1(self.conv1(y), train)
        if self.extra:
            padding = (0, 0, 0, 0, self.extra // 2, self.extra - self.extra // 2)
            x = F.pad(x[:, :, :: self.stride, :: self.stride], padding)
        return F.relu(x + y)


class Net(nn.Module):
    """`mfm_jax.models.resnet.CifarResNet`, images as [B, C, H, W]."""

    def __init__(self, blocks: int, classes: int, width: int):
        super().__init__()
        self.stem, self.stem_norm = _conv(3, width), Norm(width)
        before = width
        for i in range(3):
            channels = width * 2**i
            first = Block(before, channels, 2 if i else 1)
            rest = [Block(channels, channels, 1) for _ in range(blocks - 1)]
            self.add_module(f"stage{i + 1}", nn.ModuleList([first, *rest]))
            before = channels
        self.head = nn.Linear(before, classes)
        nn.init.kaiming_normal_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor, train: bool, modulate: Modulate = lambda site, x: x) -> Tensor:
        x = modulate("stem", F.relu(self.stem_norm(self.stem(x), train)))
        for site in ("stage1", "stage2", "stage3"):
            for block in self.get_submodule(site).children():
                x = block(x, train)
            x = modulate(site, x)
        return modulate("logits", self.head(modulate("pooled", x.mean((2, 3)))))


def site_channels(net: Net, sites: tuple[str, ...]) -> dict[str, int]:
    """Returns the channels of the chosen sites."""
    width = net.stem.out_channels
    known = {"stem": width, "stage1": width, "stage2": 2 * width, "stage3": 4 * width, "pooled": 4 * width}
    return {site: (known | {"logits": net.head.out_features})[site] for site in sites}


def identity(channels: dict[str, int]) -> Tensors:
    """Returns the modulation that changes nothing, of form `direct`: `site.gamma` and `site.beta`."""
    return {f"{site}.{name}": torch.zeros(size) for site, size in channels.items() for name in ("gamma", "beta")}


def film(phi: Tensors) -> Modulate:
    def modulate(site: str, x: Tensor) -> Tensor:
        if f"{site}.gamma" not in phi:
            return x
        shape = (-1,) + (1,) * (x.ndim - 2)
        return x + (phi[f"{site}.gamma"].view(shape) * x + phi[f"{site}.beta"].view(shape))

    return modulate


def sgd(params: Tensors, momenta: Tensors, grads: Tensors) -> tuple[Tensors, Tensors]:
    """Returns (parameters, momenta) after a step of SGD with Nesterov momentum and L2 decay in the gradient."""
    decayed = {name: grads[name] + WEIGHT_DECAY * value for name, value in params.items()}
    momenta = {name: decayed[name] + MOMENTUM * value for name, value in momenta.items()}
    return {
        name: value - LEARNING_RATE * (decayed[name] + MOMENTUM * momenta[name]) for name, value in params.items()
    }, momenta


def meta_gradient(net: Net, sites: tuple[str, ...]) -> Callable[..., tuple[Tensors, Any]]:
    """Returns `(phi, params, momenta, buffers, batch, meta_batch) -> (d meta loss / d phi, rest)`.

    `rest` is (loss, parameters, momenta and buffers after the step, meta loss); batches are (images, labels).
    """
    reaches_norms = any(site in ("stem", "stage1", "stage2") for site in sites)

    def train_loss(params, phi, buffers, batch):
        buffers = {name: value.clone() for name, value in buffers.items()}  # written by the pass
        logits = functional_call(net, (params, buffers), (batch[0], True, film(phi)))
        return F.cross_entropy(logits, batch[1]), buffers

    def objective(phi, params, momenta, buffers, batch, meta_batch):
        grads, (loss, written) = grad_and_value(train_loss, has_aux=True)(params, phi, buffers, batch)
        new_params, new_momenta = sgd(params, momenta, grads)
        logits = functional_call(net, (new_params, buffers), (meta_batch[0], False))
        meta_loss = F.cross_entropy(logits, meta_batch[1])
        return meta_loss, (loss, new_params, new_momenta, written, meta_loss)

    def run(phi, params, momenta, buffers, batch, meta_batch):
        found, rest = grad(objective, has_aux=True)(phi, params, momenta, buffers, batch, meta_batch)
        if reaches_norms:
            plain = {name: value.clone() for name, value in buffers.items()}
            with torch.no_grad():
                functional_call(net, (params, plain), (batch[0], True))
            rest = (*rest[:3], plain, rest[4])
        return found, rest

    return run


def build(spec: Spec) -> Program:
    """Returns the contender `spec` on the first GPU, or on as many CPU threads as this process may use."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")
    torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    torch.manual_seed(0)
    layout = torch.channels_last if spec.layout == "channels_last" else torch.contiguous_format
    net = Net((int(spec.model.removeprefix("resnet")) - 2) // 6, spec.classes, spec.width)
    net = net.to(device, memory_format=layout)
    batches = []
    for size in (spec.batch, spec.meta_batch):
        image = torch.randn(size, 3, spec.image_size, spec.image_size).to(device, memory_format=layout)
        batches.append((image, torch.arange(size, device=device) % spec.classes))
    step = _plain_step(net, batches[0], spec) if spec.step == "plain" else _meta_step(net, batches, spec)
    loss = torch.zeros(())

    def run(steps: int) -> None:
        nonlocal loss
        for _ in range(steps):
            loss = step()
        if device.type == "cuda":
            torch.cuda.synchronize()

    def finish() -> dict[str, Any]:
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the loss is {float(loss)}")
        return {"device_mb": torch.cuda.max_memory_allocated() / 1e6} if device.type == "cuda" else {}

    version = f"torch {torch.__version__} on {device.type}, {torch.get_num_threads()} threads"
    return Program(run, finish, {"version": version})


def _plain_step(net: Net, batch: tuple[Tensor, Tensor], spec: Spec) -> Callable[[], Tensor]:
    """The step as anyone writes it: `zero_grad`, `backward`, `optim.SGD`."""
    optimizer = torch.optim.SGD(net.parameters(), LEARNING_RATE, MOMENTUM, weight_decay=WEIGHT_DECAY, nesterov=True)
    forward = torch.compile(net, mode="reduce-overhead" if spec.graphs else None) if spec.compiled else net
    device, lower = batch[0].device.type, spec.dtype == "bfloat16"

    def step() -> Tensor:
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=lower):
            logits = forward(batch[0], True)
        loss = F.cross_entropy(logits.float(), batch[1])
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def _meta_step(net: Net, batches: list[tuple[Tensor, Tensor]], spec: Spec) -> Callable[[], Tensor]:
    """The lagged MFM step: the virtual step is the real one; Adam moves the modulation."""
    device = batches[0][0].device
    phi = {name: value.to(device) for name, value in identity(site_channels(net, spec.sites)).items()}
    optimizer = torch.optim.Adam(phi.values(), META_LEARNING_RATE)
    params = {name: value.detach() for name, value in net.named_parameters()}
    buffers = {name: value.detach() for name, value in net.named_buffers()}
    momenta = {name: torch.zeros_like(value) for name, value in params.items()}
    gradient = meta_gradient(net, spec.sites)
    if spec.compiled:
        gradient = torch.compile(gradient)

    def step() -> Tensor:
        nonlocal params, momenta, buffers
        found, (loss, params, momenta, buffers, _) = gradient(phi, params, momenta, buffers, *batches)
        for name, value in phi.items():
            value.grad = found[name]
        optimizer.step()
        return loss

    return step
