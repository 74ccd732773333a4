"""What is measured: one `Spec` a contender, the lists of them, and the arithmetic that each should need.

Imported by the process that directs the benchmark and by every worker, so nothing here loads JAX or PyTorch.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

FEATURE_SITES = ("stage1", "stage2", "stage3", "pooled")
SITES = ("stem", *FEATURE_SITES, "logits")
GROUPS = ("stem", "stage1", "stage2", "stage3", "head")
VIRTUAL = {"all": GROUPS, "last_stage": ("stage3", "head"), "head": ("head",)}
MATMUL_SIZE = {"cpu": 2048}  # elsewhere 8192: large enough to fill the device
# As it is taken over from a run; the step is the same whatever the modulator, so that no run is read here.
FROZEN = (("meta.freeze", True), ("modulation.init_from", "RUN"))
# Operations of a forward pass at 224 pixels with 1000 classes, a multiply-add counted as two: He et al. 2016 and
# Dosovitskiy et al. 2021, as torchvision counts them (4.09 and 17.56 G multiply-adds).
PUBLISHED_FORWARD = {"resnet50": 2 * 4.09e9, "vit_b16": 2 * 17.56e9}


@dataclass(frozen=True)
class Spec:
    """One contender: all that a worker must know to build its step."""

    name: str
    # Or plain, meta_weight_net, recipe (built from the config file), loop (the same in `main`'s own compiled call),
    # input, matmul, copy.
    step: str = "mfm"
    library: str = "jax"  # or torch
    sites: tuple[str, ...] = ("pooled",)
    every: int = 1
    lagged: bool = True
    virtual: str = "all"
    bn: str = "running"  # of the meta pass, as in the PyTorch twins; the recipe's own is "fresh"
    route: str = "mixed_mode"  # a function of `hypergrad`
    dtype: str = "float32"
    layout: str = "channels_last"  # PyTorch: of the images and kernels
    compiled: bool = False  # PyTorch: under torch.compile
    graphs: bool = False  # PyTorch: compiled into CUDA graphs (`mode="reduce-overhead"`)
    precision: str = "default"  # matmul: of the product; "default" allows TF32 on GPUs
    model: str = "resnet32"
    width: int = 16
    image_size: int = 32
    classes: int = 10
    batch: int = 100
    meta_batch: int = 100
    devices: int = 1
    seeds: int = 1  # plain, mfm, loop: runs in one program
    form: str = ""  # of their convolutions, a key of `forms.FORMS`; empty: what the library chooses
    config: str = ""  # recipe, loop: the config file
    overrides: tuple[tuple[str, Any], ...] = ()  # recipe, loop: fields set on top of the config file

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> "Spec":
        """Returns the spec of a dict that may have been through JSON, which has no tuples."""
        fields: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
        return cls(**fields)

    @property
    def plain_name(self) -> str:
        """The contender that this one's time is divided by: the plain step of its library and precision."""
        if self.library == "torch":
            return f"PyTorch plain, {self.layout}" + (", compiled" if self.compiled else "")
        return "plain" + (", bfloat16" if self.dtype == "bfloat16" else "")


class Program(NamedTuple):
    """A contender ready to run.

    run: does so many steps and waits for the device.
    finish: at the end, the facts that are known only then; raises if the training broke.
    facts: numbers for the table (`compile_seconds`, `temp_mb`, ...); a recipe adds, under `spec`, the fields of `Spec`
      that its config decides.
    """

    run: Callable[[int], None]
    finish: Callable[[], dict[str, Any]]
    facts: dict[str, Any]


def main_table(common: Spec, backend: str, *, torch: bool, quick: bool) -> list[Spec]:
    """Returns the contenders of the main table; `quick` leaves out those that are much like another."""
    four = replace(common, sites=FEATURE_SITES)
    ror = "reverse_over_reverse"
    specs = [
        replace(common, name="matmul float32", step="matmul"),
        replace(common, name="plain", step="plain"),
        replace(common, name="sampling and augmentation", step="input"),
        replace(common, name="default recipe", step="recipe"),
        replace(common, name="default recipe, frozen", step="recipe", overrides=FROZEN),
        replace(common, name="MFM, logits", sites=("logits",)),
        replace(common, name="MFM, pooled"),
        replace(four, name="MFM, four sites"),
        replace(common, name="MFM, pooled, every 5", every=5),
        replace(common, name="MFM, pooled, virtual head", virtual="head"),
        replace(common, name="MFM, pooled, not lagged", lagged=False),
        replace(common, name="reverse over reverse, pooled", route=ror),
        replace(four, name="reverse over reverse, four sites", route=ror),
        replace(common, name="Meta-Weight-Net", step="meta_weight_net", sites=()),
    ]
    if backend != "cpu":
        specs += [
            replace(common, name="matmul bfloat16", step="matmul", dtype="bfloat16"),
            replace(common, name="plain, bfloat16", step="plain", dtype="bfloat16"),
            replace(common, name="MFM, pooled, bfloat16", dtype="bfloat16"),
            replace(common, name="default recipe, bfloat16", step="recipe", dtype="bfloat16"),
        ]
    if torch:
        twin = replace(common, library="torch")
        plain = replace(twin, step="plain")
        specs += [
            replace(plain, name="PyTorch plain, contiguous", layout="contiguous"),
            replace(plain, name="PyTorch plain, channels_last"),
            replace(plain, name="PyTorch plain, channels_last, compiled", compiled=True),
            replace(twin, name="PyTorch MFM, pooled, contiguous", layout="contiguous"),
            replace(twin, name="PyTorch MFM, pooled, channels_last"),
            replace(twin, name="PyTorch MFM, four sites, channels_last", sites=FEATURE_SITES),
            replace(twin, name="PyTorch MFM, pooled, compiled", compiled=True),
            replace(twin, name="PyTorch MFM, four sites, compiled", sites=FEATURE_SITES, compiled=True),
        ]
    left_out = ("every 5", "not lagged", "four sites", "contiguous", "compiled") if quick else ()
    return [spec for spec in specs if not any(word in spec.name for word in left_out) or spec.name == "MFM, four sites"]


def curves(common: Spec, devices: int, *, quick: bool) -> Iterator[tuple[str, list[tuple[str, Spec]]]]:
    """Yields (curve, its points), a point being (value, recipe); each is measured as plain and as the default MFM.

    `common` fixes what a curve does not vary. With `quick`, the first two points of the first two curves.
    """
    sites = [",".join(SITES[-n:]) for n in (1, 2, 3, 6)]
    found = {
        "batch": [(str(n), replace(common, batch=n, meta_batch=n)) for n in (16, 32, 64, 128)],
        "depth": [(str(n), replace(common, model=f"resnet{n}")) for n in (8, 20, 32, 44, 56)],
        "sites": [(s, replace(common, overrides=(("modulation.sites", s),))) for s in sites],
        "classes": [(str(n), replace(common, classes=n)) for n in (10, 100, 1000, 10_000)],
        "meta batch": [(str(n), replace(common, meta_batch=n)) for n in (10, 32, 100)],
        "devices": [(str(n), replace(common, devices=n)) for n in (1, 2, 4, 8) if n <= devices and devices > 1],
    }
    for curve, points in list(found.items())[: 2 if quick else None]:
        if points:
            yield curve, points[: 2 if quick else None]


def recipe(spec: Spec, method: str) -> Spec:
    """Returns `spec` as the step that the config file gives with `method.name` set to `method`."""
    return replace(spec, name=method, step="recipe", overrides=(*spec.overrides, ("method.name", method)))


def forward_flops(spec: Spec) -> dict[str, float]:
    """Returns the multiplications and additions of one image's forward pass, by group of layers.

    Convolutions and the head only: a k x k convolution from a to b channels on p pixels is 2 k^2 a b p, edges counted
    as if they were inside. The networks in `PUBLISHED_FORWARD` are counted as a whole, under `stem`.

    Raises:
      ValueError: one of those at another size than the published one.
    """
    if spec.model in PUBLISHED_FORWARD:
        if (spec.image_size, spec.classes, spec.width) != (224, 1000, 0):
            raise ValueError(f"{spec.model} is counted at 224 pixels, with 1000 classes and its own width")
        return dict.fromkeys(GROUPS, 0.0) | {"stem": PUBLISHED_FORWARD[spec.model]}
    blocks, side, width = (int(spec.model.removeprefix("resnet")) - 2) // 6, spec.image_size, spec.width
    flops = {"stem": 2.0 * 9 * 3 * width * side**2}
    before = width
    for stage in range(3):
        channels, pixels = width * 2**stage, (-(-side // 2**stage)) ** 2
        flops[f"stage{stage + 1}"] = 2.0 * 9 * pixels * channels * (before + (2 * blocks - 1) * channels)
        before = channels
    return flops | {"head": 2.0 * before * spec.classes}


def step_flops(spec: Spec) -> float:
    """Returns the arithmetic that one step needs, averaged over `every` steps; of all `seeds` together.

    F is a forward pass; a backward pass is 2 F (weights and inputs). A meta-step adds: the meta batch forward, and
    backward for the groups that move in the virtual step; a plain pass for fresh statistics, F; one tangent pass
    through those groups, 2 F (the double backward of the other route is as much); and, behind a site that is not at the
    end, the tangent of the backward signal, 2 F where the layer moves and F where it does not. A site before the last
    batch norm costs a plain pass for the running averages, in every step. Only what convolutions and the head do is
    counted.
    """
    if spec.step == "matmul":
        return 2.0 * spec.batch**3
    if spec.step in ("input", "copy"):
        return 0.0
    if spec.seeds > 1:
        return spec.seeds * step_flops(replace(spec, seeds=1))
    flops = forward_flops(spec)
    total = sum(flops.values())
    plain = 3 * spec.batch * total
    if spec.step == "plain" or (spec.step in ("recipe", "loop") and not spec.sites):
        return plain
    moved = VIRTUAL[spec.virtual]
    behind = _behind(spec.sites)
    tangent = 2 * sum(flops[g] for g in moved) + sum(flops[g] * (2 if g in moved else 1) for g in behind)
    meta = total + 2 * sum(flops[g] for g in moved)
    fresh = total if spec.bn == "fresh" else 0.0
    extra = spec.batch * (tangent + fresh) + spec.meta_batch * meta + (0 if spec.lagged else plain)
    statistics = spec.batch * total if any(site in spec.sites for site in ("stem", "stage1", "stage2")) else 0.0
    return plain + statistics + extra / spec.every


def _behind(sites: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the groups of layers behind the first of `sites`."""
    if not sites:  # Meta-Weight-Net weighs the losses, behind everything
        return ()
    first = min(SITES.index(site) for site in sites)
    return {0: GROUPS[1:], 1: GROUPS[2:], 2: GROUPS[3:], 3: GROUPS[4:], 4: GROUPS[4:], 5: ()}[first]
