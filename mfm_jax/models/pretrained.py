"""Weights from elsewhere, by the names of torchvision, timm, `transformers` or CIFAR-LT code, into parameters here.

A file may be safetensors, NumPy's `.npz`, or a PyTorch state dict, of the same architecture. Every tensor of the file
has its place and every parameter its tensor; what does not fit is an error, never a guess. Three things may differ, and
a line names those that do: the head, which starts fresh for another number of classes or where one is linear and the
other normalised; the position embeddings of a vision transformer, which are interpolated to another image size; and
the channels of the images, whose stem is summed for grey ones (which is what it computes from a grey picture given
three times).

Layouts: PyTorch keeps a convolution as `[out, in, h, w]` and a matrix as `[out, in]`; Flax as `[h, w, in, out]` and
`[in, out]`. A normalised head has no bias and keeps its weights as `[in, out]` in PyTorch too, as LDAM's code has it.
"""

import pickle
import re
import sys
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors
import safetensors.numpy

from mfm_jax.config import SMALL_RESNETS, TOWERS, VITS
from mfm_jax.errors import UserError, some_of
from mfm_jax.models import hub_cache, hugging_face
from mfm_jax.models.tuning import is_added
from mfm_jax.types import PyTree

_Rules = Sequence[tuple[str, str | Callable[[re.Match[str]], str]]]  # pattern, replacement
_WRAPPERS = ("state_dict", "model")
ARRAYS = (".safetensors", ".npz")
UNREADABLE = (
    *(OSError, ValueError, AttributeError, RuntimeError, EOFError),
    *(zipfile.BadZipFile, zlib.error, pickle.UnpicklingError, safetensors.SafetensorError),
)

# torchvision's names of a vision transformer, in timm's. Published files have the MLP's layers under an older name.
_TIMM = (
    (r"^class_token$", "cls_token"),
    (r"^conv_proj\.", "patch_embed.proj."),
    (r"^encoder\.pos_embedding$", "pos_embed"),
    (r"^encoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1."),
    (r"^encoder\.ln\.", "norm."),
    (r"^heads\.head\.", "head."),
    (r"\.ln_([12])\.", r".norm\1."),
    (r"\.self_attention\.in_proj_", ".attn.qkv."),
    (r"\.self_attention\.out_proj\.", ".attn.proj."),
    (r"\.mlp\.(0|linear_1)\.", ".mlp.fc1."),
    (r"\.mlp\.(3|linear_2)\.", ".mlp.fc2."),
)
# A path in a classifier's variables here, in timm's names.
_LEAVES = (("/(kernel|scale)$", "/weight"), ("/mean$", "/running_mean"), ("/var$", "/running_var"))
_RESNET = (
    *_LEAVES,
    ("^stem/", "conv1/"),
    ("^stem_norm/", "bn1/"),
    (r"^stage(\d)/block(\d+)/", r"layer\1/\2/"),
    (r"/norm(\d)/", r"/bn\1/"),
    ("/shortcut/", "/downsample/0/"),
    ("/shortcut_norm/", "/downsample/1/"),
    ("^head/", "fc/"),
)
# The names that code for long-tailed CIFAR shares.
_CIFAR = (
    *_LEAVES,
    ("^stem/", "conv1/"),
    ("^stem_norm/", "bn1/"),
    (r"^stage(\d)/BasicBlock_(\d+)/", r"layer\1/\2/"),
    (r"/Conv_(\d)/", lambda found: f"/conv{int(found[1]) + 1}/"),
    (r"/BatchNorm_(\d)/", lambda found: f"/bn{int(found[1]) + 1}/"),
    ("^head/", "linear/"),
)
# torchvision's names.
_EFFICIENT = (
    *_LEAVES,
    ("^stem/", "features/0/0/"),
    ("^stem_norm/", "features/0/1/"),
    (r"^stage(\d)/block(\d+)/", r"features/\1/\2/block/"),
    ("/expand(_norm)?/", lambda found: f"/0/{int(bool(found[1]))}/"),
    ("/depthwise(_norm)?/", lambda found: f"/1/{int(bool(found[1]))}/"),
    ("/squeeze/", "/2/fc1/"),
    ("/excite/", "/2/fc2/"),
    ("/project(_norm)?/", lambda found: f"/3/{int(bool(found[1]))}/"),
    (r"^(features/1/\d+/block)/(\d)/", lambda found: f"{found[1]}/{int(found[2]) - 1}/"),  # which does not expand
    ("^top/", "features/8/0/"),
    ("^top_norm/", "features/8/1/"),
    ("^head/", "classifier/1/"),
)
_VIT = (
    *_LEAVES,
    ("^stem/class_token$", "cls_token"),
    ("^stem/positions$", "pos_embed"),
    ("^stem/projection/", "patch_embed/proj/"),
    ("^stem/registers$", "reg_token"),
    ("^pre_norm/", "norm_pre/"),
    (r"^block(\d+)/", lambda found: f"blocks/{int(found[1]) - 1}/"),
    (r"^(blocks/\d+)/(qkv|proj)/", r"\1/attn/\2/"),
    (r"^(blocks/\d+)/(fc[12])/", r"\1/mlp/\2/"),
    (r"^(blocks/\d+)/scale([12])$", r"\1/ls\2/gamma"),
)
_OTHERS = {"efficientnet_b0": _EFFICIENT, **dict.fromkeys(VITS, _VIT)}


def of_file(
    path: str | Path,
    params: PyTree,
    batch_stats: PyTree,
    model_name: str,
    *,
    normalized_head: bool = False,
    whole: bool = False,
) -> tuple[PyTree, PyTree]:
    """Returns `(params, batch_stats)` with the weights in the file at `path`; adapters and LoRA do not change.

    Says on the standard error what was adapted: a head that starts fresh, positions, a summed stem.

    Args:
      path: `.safetensors`, `.npz`, or what `torch.save` wrote; a state dict, bare or under `state_dict` or `model`. Or
        `timm/NAME`, which is found in the hub's cache (`hub_cache`).
      params: of the new classifier, for its shapes and for what starts fresh.
      batch_stats: of the classifier.
      model_name: as `config.Model.name`.
      normalized_head: the classifier compares directions (`methods.heads.cosine`); a linear head of a file is not for
        it, nor the reverse.
      whole: the head has to come from the file.

    Raises:
      UserError: no such file, one that cannot be read, a network of another depth or width, tensors that are missing,
        unknown or of another shape, or no head for this classifier where one is needed.
    """
    file = hub_cache.path_of(str(path), model_name)
    tensors = _read(file)
    if model_name in TOWERS:
        tensors = hugging_face.in_timm_names(tensors)
    names = _CIFAR if model_name in SMALL_RESNETS else _OTHERS.get(model_name, _RESNET)
    if names is _CIFAR and "linear.weight" not in tensors:
        tensors = {re.sub(r"^fc\.", "linear.", name): tensor for name, tensor in tensors.items()}
    _check_size(tensors, params, path, model_name)
    variables = {"params": params, "batch_stats": batch_stats}
    leaves, structure = jax.tree_util.tree_flatten_with_path(variables)
    head = _name("head/", names)
    tensors, fresh = _with_head(tensors, head, params["head"]["kernel"].shape, normalized_head)
    said = [f"the head starts fresh: {fresh}"] if fresh else []
    if file != Path(path) and (wanted := hub_cache.normalization(file)):
        said.append(wanted)
    if fresh and whole:
        raise UserError(
            f"model.pretrained = {str(path)!r}: cannot be evaluated without training, as the head would start fresh:"
            f" {fresh}; train, or choose the method.name and the data that the file is for"
        )
    missing, misshapen, found = [], [], []
    for keys, leaf in leaves:
        parts = [key.key for key in keys[1:]]
        name = _name("/".join(parts), names)
        if is_added(parts) or (fresh and parts[0] == "head"):
            found.append(leaf)
        elif name not in tensors:
            missing.append(name)
        else:
            tensor = _fitted(tensors.pop(name), parts[-1], leaf.shape, said)
            if tensor.shape != leaf.shape:
                misshapen.append(f"{name} ({list(tensor.shape)}, not {list(leaf.shape)} as laid out here)")
            found.append(tensor)
    wrong = {"missing": missing, "unknown": sorted(tensors), "of another shape": misshapen}
    if any(wrong.values()):
        misfits = "; ".join(f"{what}: {some_of(which)}" for what, which in wrong.items() if which)
        raise UserError(
            f"model.pretrained = {str(path)!r}: these are not the weights of model.name = {model_name!r}: {misfits}"
        )
    print(f"pretrained weights: {path}" + "".join(f"; {line}" for line in said), file=sys.stderr)
    loaded = jax.tree.unflatten(structure, found)
    return loaded["params"], loaded["batch_stats"]


def _check_size(tensors: Mapping[str, np.ndarray], params: PyTree, path: str | Path, model_name: str) -> None:
    """Refuses a ResNet of another depth or width by its field, which says more than a list of tensors."""
    found = {match.groups() for name in tensors if (match := re.match(r"layer(\d+)\.(\d+)\.", name))}
    stages = [stage for stage, _ in found]
    theirs = [stages.count(stage) for stage in sorted(set(stages), key=int)]
    stem = tensors.get("conv1.weight")
    if stem is None or not theirs:  # no ResNet
        return
    ours = [len(params[name]) for name in sorted(params) if re.fullmatch(r"stage\d", name)]
    if theirs != ours:
        small = f"resnet{6 * theirs[0] + 2}"
        is_small = theirs == theirs[:1] * 3 and small in SMALL_RESNETS
        way_out = f"set model.name = {small!r}" if is_small else "choose the model.name that the file is of"
        raise UserError(
            f"model.name = {model_name!r}: has {ours} blocks in its stages, the file {path} has {theirs}; {way_out}"
        )
    width, its_width = params["stem"]["kernel"].shape[-1], stem.shape[0] if stem.ndim else 0
    if width != its_width:
        raise UserError(
            f"model.width: the stem of {model_name} has {width} channels, that of the file {path} {its_width}; set"
            f" model.width = {its_width}"
        )


def _with_head(
    tensors: dict[str, np.ndarray], head: str, shape: tuple[int, int], normalized: bool
) -> tuple[dict[str, np.ndarray], str]:
    """Returns the tensors with a head in the layout of a linear one, and ""; or without, and why there is none.

    Names of the head begin with `head`; here it has the `shape` `(C, K)`, and is a normalised one or linear.
    """
    weight, bias = tensors.get(f"{head}weight"), tensors.get(f"{head}bias")
    others = {name: tensor for name, tensor in tensors.items() if not name.startswith(head)}
    size, classes = shape
    if weight is None:
        return others, "the file has none"
    if bias is None and (weight.ndim != 2 or len(weight) != size or size == classes):
        # [K, C] may be a linear head without bias or another's normalised one; a square one may be any.
        return others, f"the file's has no bias and weights {list(weight.shape)}, which may mean several things"
    theirs = weight.shape[1] if bias is None else bias.size
    if theirs != classes:
        return others, f"the file's has {theirs} classes, not {classes}"
    if (bias is None) != normalized:
        kinds = ("normalised", "linear") if bias is None else ("linear", "normalised")
        return others, "the file's is {}, that of the method {}".format(*kinds)
    if bias is None:
        return {**others, f"{head}weight": weight.T, f"{head}bias": np.zeros(classes, np.float32)}, ""
    return tensors, ""


def _read(path: Path) -> dict[str, np.ndarray]:
    """Returns the arrays in a file, named as in `_canonical`."""
    if path.is_dir():
        raise UserError(
            f"model.pretrained = {str(path)!r}: a folder, not a file; to start from the classifier of a run there, set"
            f" model.init_from = {str(path)!r} in its place"
        )
    if not path.is_file():
        raise UserError(f"model.pretrained = {str(path)!r}: no such file")
    try:
        return _canonical(arrays_in(path) if path.suffix in ARRAYS else _read_torch(path))
    except UserError:
        raise
    except UNREADABLE as error:
        raise UserError(
            f"model.pretrained = {str(path)!r}: cannot be read ({' '.join(str(error).split())[:200]}); expected"
            " .safetensors, .npz, or a PyTorch state dict"
        ) from error


def arrays_in(path: Path) -> Mapping[str, np.ndarray]:
    """Returns the arrays by name in a file of `ARRAYS`; raises one of `UNREADABLE`."""
    if path.suffix == ".safetensors":
        found: Mapping[str, np.ndarray] = safetensors.numpy.load_file(path)
        return found
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


def _read_torch(path: Path) -> Mapping[str, Any]:
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"model.pretrained = {str(path)!r}: reading this needs PyTorch: install the extra `bench`, or convert the"
            " file to .safetensors where PyTorch is"
        ) from error
    loaded = torch.load(path, map_location="cpu", weights_only=True)
    for wrapper in _WRAPPERS:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(wrapper), Mapping):
            loaded = loaded[wrapper]
    if not isinstance(loaded, Mapping) or not all(isinstance(value, torch.Tensor) for value in loaded.values()):
        raise ValueError("not a mapping from names to tensors")
    return {name: tensor.float().numpy() for name, tensor in loaded.items()}


def _canonical(tensors: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Returns float32 arrays by timm's names, without the counts that batch norm keeps in PyTorch."""
    plain = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    return {
        _substituted(name, _TIMM): np.asarray(tensor, np.float32)
        for name, tensor in plain.items()
        if not name.endswith("num_batches_tracked")
    }


def _name(path: str, names: _Rules) -> str:
    return _substituted(path, names).replace("/", ".")


def _substituted(name: str, rules: _Rules) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def _fitted(tensor: np.ndarray, leaf: str, shape: tuple[int, ...], said: list[str]) -> np.ndarray:
    """Returns a tensor in the layout of Flax, adapted to `shape` where that is possible; notes it in `said`."""
    if leaf == "kernel":
        tensor = tensor.transpose(2, 3, 1, 0) if tensor.ndim == 4 else tensor.T
        if len(shape) == tensor.ndim == 4 and shape[2] == 1 and tensor.shape[2] == 3:
            said.append("the stem's 3 input channels are summed to 1")
            tensor = tensor.sum(axis=2, keepdims=True)
    if leaf == "positions" and tensor.ndim == 3 and tensor.shape != shape and tensor.shape[2] == shape[2]:
        old, new = round((tensor.shape[1] - 1) ** 0.5), round((shape[1] - 1) ** 0.5)
        if tensor.shape[1] == 1 + old**2 and shape[1] == 1 + new**2:
            said.append(f"position embeddings are interpolated from {old} x {old} to {new} x {new}")
            grid = tensor[:, 1:].reshape(1, old, old, -1)
            resized = jax.image.resize(grid, (1, new, new, grid.shape[-1]), "bicubic")
            tensor = np.concatenate([tensor[:, :1], np.asarray(resized).reshape(1, new**2, -1)], axis=1)
    return tensor
