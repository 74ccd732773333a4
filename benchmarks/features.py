r"""What modulating features, drawing and weighting add to the curve at the logits: variants of MFM on validation.

    TFDS_DATA_DIR=... python benchmarks/features.py --workdir=runs/features --csv=docs/results/features.csv

The images are those of the setting `cifar10_100` of the table of regret (`regret_settings.py`): CIFAR-10 at 16x16,
1,000 to 10 training images a class, 500 validation images of each. No run reads the test split. Each variant is trained
on two networks, of which the second fits the head classes, with the same recipe and seeds. Resumable: what is there is
not trained again, and the table is written anew after each row.
"""

import argparse
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from regret_settings import SETTINGS, Values, fields, pack

from mfm_jax import command, compare
from mfm_jax import config as config_lib
from mfm_jax.errors import UserError
from mfm_jax.machine import disk
from mfm_jax.study import tune
from mfm_jax.training import train
from mfm_jax.workdir import finished
from mfm_jax.workdir.files import Workdir, read_object
from mfm_jax.workdir.finished import shown

NETWORKS: Mapping[str, Values] = {
    "resnet8": {},
    "resnet20": {"model.name": "resnet20", "train.epochs": 60},
}
_CURVE = "logits:frequency"
_WEIGHTS: Values = {"method.base": "class_balanced"}
VARIANTS: Mapping[str, Values] = {
    "logits": {"modulation.sites": _CURVE},
    "pooled_network": {"modulation.sites": f"pooled:network,{_CURVE}"},
    "stage3_pooled_network": {"modulation.sites": f"stage3:network,pooled:network,{_CURVE}"},
    "pooled_direct": {"modulation.sites": f"pooled:direct,{_CURVE}"},
    "stages_direct": {"modulation.sites": f"stage1:direct,stage2:direct,stage3:direct,{_CURVE}"},
    "pooled_network_slow": {"modulation.sites": f"pooled:network,{_CURVE}", "meta.learning_rate": 0.0025},
    # What a curve over the count could govern besides, set by hand: by which power of the counts images are drawn (the
    # default's is 1/2), and a weight for each class.
    "drawn_as_they_are": {"modulation.sites": _CURVE, "method.sampling": "natural"},
    "drawn_later": {"modulation.sites": _CURVE, "method.sampling": "square_root_later", "method.first_stage": 0.5},
    "drawn_balanced": {"modulation.sites": _CURVE, "method.sampling": "balanced"},
    "weights_square_root": {"modulation.sites": _CURVE, **_WEIGHTS, "method.weighting": "sqrt_frequency"},
}
COLUMNS = (
    *("network", "variant", "seeds", "balanced_accuracy_mean", "balanced_accuracy_std", "minus_logits"),
    *("head_third", "middle_third", "rarest_third", "training_accuracy", "sites"),
)
_TESTED = ("head_third", "middle_third", "rarest_third")


def configs(network: str, variant: str, data: Path, seeds: int) -> list[config_lib.Config]:
    """Returns the config of each seed; none reads the test split."""
    values = {**NETWORKS[network], **VARIANTS[variant], "eval.test": False}
    recipe = fields(SETTINGS["cifar10_100"], data)
    return [
        config_lib.resolve(tune.with_values(compare.run_fields(recipe, "mfm", seed), values)) for seed in range(seeds)
    ]


def balanced(folders: Sequence[Path]) -> list[float]:
    """Returns the balanced accuracy on validation at the last epoch of each run, in percent."""
    return [100 * shown(read_object(Workdir(folder).results))["balanced_accuracy"] for folder in folders]


def line(network: str, variant: str, folders: Sequence[Path], base: Sequence[float]) -> dict[str, Any]:
    """Returns a line of the CSV file, in percent; `minus_logits` is the mean of differences paired by seed."""
    values, tested = balanced(folders), [shown(read_object(Workdir(folder).results)) for folder in folders]
    fitted = [finished.rows(folder)["train"][-1]["accuracy"] for folder in folders]
    means = {
        "balanced_accuracy_mean": statistics.fmean(values),
        "balanced_accuracy_std": statistics.stdev(values) if len(values) > 1 else math.nan,
        "minus_logits": statistics.fmean(a - b for a, b in zip(values, base, strict=True)),
        **{name: 100 * statistics.fmean(one[name] for one in tested) for name in _TESTED},
        "training_accuracy": 100 * statistics.fmean(fitted),
    }
    text = {name: "" if math.isnan(value) else f"{value:.2f}" for name, value in means.items()}
    names = {"network": network, "variant": variant, "seeds": len(values)}
    return names | text | {"sites": VARIANTS[variant]["modulation.sites"]}


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--seeds", type=int, default=2)
    for name, known in (("networks", NETWORKS), ("variants", VARIANTS)):
        parser.add_argument(f"--{name}", default=list(known), type=lambda text: text.split(","), help=",".join(known))
    options = parser.parse_args(argv)
    for name, known in (("networks", NETWORKS), ("variants", VARIANTS)):
        if unknown := [word for word in getattr(options, name) if word not in known]:
            raise UserError(f"--{name}={','.join(unknown)}: allowed: {', '.join(known)}")
    data, lines = options.workdir / "cifar10_100.npz", []
    if not data.exists():
        pack(SETTINGS["cifar10_100"], data)
    for network in options.networks:
        base: list[float] = []
        for variant in dict.fromkeys(("logits", *options.variants)):
            folders = [options.workdir / network / variant / f"seed{seed}" for seed in range(options.seeds)]
            train.train_together(configs(network, variant, data, options.seeds), folders, pages=False)
            jax.clear_caches()  # the next variant's programs are others
            base = base or balanced(folders)
            lines.append(line(network, variant, folders, base))
            for path in filter(None, (options.workdir / "features.csv", options.csv)):
                disk.write_rows(path, [COLUMNS, *([one[name] for name in COLUMNS] for one in lines)])
    print(*(" ".join(str(one[name]) for name in COLUMNS[:6]) for one in lines), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(command.guarded(main, sys.argv[1:]))
