"""The accuracy study: every run behind a table of docs/results, in tiers, each run once.

    TFDS_DATA_DIR=... python benchmarks/study.py --config=configs/cifar10_lt_small.py --workdir=runs/study --jobs=2

Started again with the same folder it goes on where it was. Tiers (`--tiers=main,factors,...`), in their order:

  main      factor 100, 5 seeds: CE, logit adjustment and MFM, each as validation chose
  factors   factors 200 and 50, 3 seeds: the same
  peers     factor 100, 5 seeds: LDAM-DRW and Meta-Weight-Net as validation chose, and logit adjustment as published
  transfer  factors 200 and 50, 2 seeds: MFM with the modulator of main's seed 0, frozen, and fine-tuned
  borrowed  the config's factor, 5 seeds: CE, MFM, and MFM with the modulator of the run `--source`, frozen, fine-tuned
  others    factor 100, 1 seed: every other method at its defaults, untuned
  features  factor 100, 2 seeds: MFM as in configs/cifar10_lt_features.py, the pooled features modulated, too
  costs     the config's factor, 3 seeds: a miss of the three rarest classes costs 5, 90 % of the rarest are to be
            found; or what the config's eval.costs and eval.recall say
  explained 1 seed: what the methods below CE lack, put right one at a time
  contrast  factor 100, 1 seed: CE, logit adjustment and MFM as in main, beside a contrastive loss of pairs
  pretext   factor 100, 1 seed: SimSiam, and the same three from its classifier
  noise     the config's factor, 3 seeds: CE, MFM, Meta-Weight-Net, L2RW and RCAL with 0, 20 and 40 % wrong labels
  joint     the same of MFM with RCAL: features of the tier `noise`'s MFM, from the same seed, for RCAL's last layer

The last two are for short runs, such as `--tiers=noise,joint --config.train.epochs=5`. Noise is symmetric, unless
`--config.data.noise_kind` says otherwise.

`--max_seeds=1 --config.train.epochs=2` makes a trial of it; `--jobs=N` has N runs side by side. After each row the
rows that are there are written to WORKDIR/study.md, with differences paired by seed, and to `--csv`.
"""

import csv
import math
import shlex
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from absl import flags
from ml_collections import config_flags

from mfm_jax import command, compare
from mfm_jax import config as config_lib
from mfm_jax.machine import disk
from mfm_jax.methods.table import BUILT_IN
from mfm_jax.pages import comparison
from mfm_jax.study import runs, tune
from mfm_jax.workdir.files import Workdir, read_object

_TIERS = flags.DEFINE_list("tiers", ["main", "factors", "peers", "transfer"], "What to run.")
_MAX_SEEDS = flags.DEFINE_integer("max_seeds", 5, "No row gets more seeds than this.")
_SOURCE = flags.DEFINE_string("source", "", "Workdir of the run whose modulator is taken over; default: main's seed 0.")
_COSTS = flags.DEFINE_string("costs_csv", "", "CSV file of the tier costs, e.g. docs/results/costs.csv.")
_CSV = flags.DEFINE_string("csv", "", "CSV file of the rows, e.g. docs/results/cifar10_lt_small.csv.")

Values = Mapping[str, Any]
Results = list[dict[str, Any]]  # the content of `results.json` of each seed
COLUMNS = (
    *("method", "imbalance_factor", "seeds", "balanced_accuracy_mean", "balanced_accuracy_std"),
    *("head_third", "middle_third", "tail_third", "command"),
)
THIRDS = {"head": "head third", "middle": "middle third", "rarest": "rarest third"}
# What validation chose for a method, sampling included (docs/results/study.md); MFM's is in its config.
CHOSEN: dict[str, Values] = {
    "logit_adjusted": {"method.sampling": "square_root_later", "method.first_stage": 0.5, "method.tau": 0.75},
    "ldam_drw": {"method.sampling": "square_root"},
    "meta_weight_net": {"method.sampling": "square_root", "meta.learning_rate": 2e-3},
}
UNTUNED: dict[str, Values] = {"l2ac": {"meta.learning_rate": 2e-3}}  # its phi is a network, as Meta-Weight-Net's
JITTERED: Values = {"augment.color_jitter": 0.4}  # otherwise its colours alone say which image a view is of
FEATURES: Values = {"modulation.sites": "pooled:direct,logits:frequency"}
# Decided by, and what of it is trained by.
WANTED: Values = {"eval.costs": "7>*=5,8>*=5,9>*=5", "eval.recall": "9=0.9", "data.val_images_per_class": 100}
SHARED: Values = {"method.cost_share": 0.5}
META: Values = {"meta.loss": "cost"}
DECIDED = {"cost_likeliest": "likeliest", "cost_by_cost": "by_cost", "cost_with_recall": "decided"}
RECALLS = ("wanted", "reached", "likeliest_reached", "others", "likeliest_others")
MAIN = ("ce", "logit_adjusted", "mfm")
PEERS = ("ldam_drw", "meta_weight_net")
NOISY = ("ce", "mfm", "meta_weight_net", "l2rw", "rcal")
NOISES = (0.0, 0.2, 0.4)


class Row(NamedTuple):
    """One row of a table: a method, what is set for it, how many seeds; `name` tells it from others of the method."""

    name: str
    method: str
    factor: float
    seeds: int
    values: Values = MappingProxyType({})


Finished = list[tuple[Row, Results]]


def tiers(own_factor: float, source: str, wanted: Values = WANTED) -> dict[str, list[Row]]:
    """Returns the rows of every tier.

    Args:
      own_factor: the config's imbalance factor.
      source: the run whose modulator is taken over.
      wanted: what the tier `costs` is to be decided by.
    """
    known, elsewhere = {"modulation.init_from": source}, (*MAIN, *PEERS, "mfm_frozen", "simsiam")
    taken: dict[str, Values] = {"mfm_frozen": {**known, "meta.freeze": True}, "mfm_fine_tuned": known}

    def chosen(names: Sequence[str], factor: float, seeds: int) -> list[Row]:
        return [Row(name, name, factor, seeds, CHOSEN.get(name, {})) for name in names]

    def varied(ending: str, values: Values) -> list[Row]:
        return [row._replace(name=row.name + ending, values={**row.values, **values}) for row in chosen(MAIN, 100.0, 1)]

    def transferred(factor: float, seeds: int) -> list[Row]:
        return [Row(name, "mfm", factor, seeds, values) for name, values in taken.items()]

    def noisy(share: float) -> list[Row]:
        noise: Values = {"data.label_noise": share} if share else {}
        return [Row(name + _noise(share), name, own_factor, 3, {**CHOSEN.get(name, {}), **noise}) for name in NOISY]

    def joint(share: float) -> Row:
        # Of the first stage nothing is trained but a last layer, in whose place the second puts another.
        first: Values = {"model.init_from": f"{{workdir}}/factor{own_factor:g}/mfm{_noise(share)}/seed{{seed}}"}
        values: Values = {**first, "model.tune": "head"} | ({"data.label_noise": share} if share else {})
        return Row(f"mfm_rcal{_noise(share)}", "rcal", own_factor, 3, values)

    return {
        "main": chosen(MAIN, 100.0, 5),
        "factors": [row for factor in (200.0, 50.0) for row in chosen(MAIN, factor, 3)],
        "peers": [*chosen(PEERS, 100.0, 5), Row("logit_adjusted_natural", "logit_adjusted", 100.0, 5)],
        "transfer": [row for factor in (200.0, 50.0) for row in transferred(factor, 2)],
        "borrowed": chosen(("ce", "mfm"), own_factor, 5) + transferred(own_factor, 5),
        "others": [Row(name, name, 100.0, 1, UNTUNED.get(name, {})) for name in BUILT_IN if name not in elsewhere]
        + [Row("mfm_long_tail", "mfm_frozen", 100.0, 1)],
        "features": [Row("mfm_features", "mfm", 100.0, 2, FEATURES)],
        "costs": [
            *(Row(f"{name}_priced", name, own_factor, 3, {**CHOSEN.get(name, {}), **wanted}) for name in MAIN),
            Row("ce_cost_share", "ce", own_factor, 3, {**wanted, **SHARED}),
            Row("mfm_cost_share", "mfm", own_factor, 3, {**wanted, **SHARED}),
            Row("mfm_cost_meta", "mfm", own_factor, 3, {**wanted, **META}),
            Row("mfm_cost_both", "mfm", own_factor, 3, {**wanted, **SHARED, **META}),
        ],
        "explained": [
            Row("ldam_without_margins", "ldam", 100.0, 1, {"method.ldam_margin": 0.0}),
            Row("dice_balanced", "dice", 100.0, 1, {"method.sampling": "balanced"}),
            Row("l2rw_square_root", "l2rw", 100.0, 1, {"method.sampling": "square_root"}),
            *(Row(name, name, 10.0, 1) for name in ("undersample", "ce")),
        ],
        "contrast": [row for one in ("bcl", "sbcl") for row in varied(f"_{one}", {f"method.{one}_weight": 0.5})],
        "pretext": [
            Row("simsiam", "simsiam", 100.0, 1, JITTERED),
            *varied("_after_simsiam", {"model.init_from": "{workdir}/factor100/simsiam/seed0"}),
        ],
        "noise": [row for share in NOISES for row in noisy(share)],
        "joint": [joint(share) for share in NOISES],
    }


def _noise(share: float) -> str:
    """Returns what tells the name of a row with wrong labels."""
    return f"_noise{100 * share:g}" if share else ""


def main(argv: Sequence[str]) -> int:
    del argv
    workdir, config = command.workdir(), command.config()
    source = _SOURCE.value or "{workdir}/factor100/mfm/seed0"
    planned = tiers(config.data.imbalance_factor, source, {} if config.eval.costs else WANTED)
    finished: Finished = []
    failed: list[str] = []
    for tier in _TIERS.value:
        rows = [row._replace(seeds=min(_MAX_SEEDS.value, row.seeds)) for row in planned[tier]]
        todo = [runs_of(row, config, workdir) for row in rows]
        each = [run for group in todo for run in group]

        def ended(*_: Any, now: tuple[list[Row], list[list[runs.Task]]] = (rows, todo)) -> None:
            write([*finished, *there(*now)], workdir)

        outcomes = runs.train_all([[run] for run in each], flags.FLAGS.jobs, ended=ended)
        failed += [f"{run.label}: {one.error}" for run, one in zip(each, outcomes, strict=True) if one.error]
        finished.extend(there(rows, todo))
    write(finished, workdir)
    print(markdown(finished), *(f"failed: {line}" for line in failed), sep="\n")
    return 1 if failed else 0


def there(rows: Sequence[Row], todo: Sequence[Sequence[runs.Task]]) -> Finished:
    """Returns the rows all of whose runs, `todo`, have finished."""
    return [
        (row, [read_object(Workdir(run.workdir).results) for run in group])
        for row, group in zip(rows, todo, strict=True)
        if all(Workdir(run.workdir).is_finished(run.config) for run in group)
    ]


def write(finished: Finished, workdir: Path) -> None:
    """Writes the tables to the workdir and, where they are asked for, to CSV files."""
    (workdir / "study.md").write_text(markdown(finished))
    if _CSV.value:
        write_csv(finished, Path(_CSV.value))
    if _COSTS.value:
        write_costs(finished, Path(_COSTS.value))


def filled(values: Values, **known: object) -> Values:
    """Returns values with what is `known` of a run, such as `{seed}`, filled in."""
    return {path: value.format(**known) if isinstance(value, str) else value for path, value in values.items()}


def runs_of(row: Row, config: Any, workdir: Path) -> list[runs.Task]:
    """Returns the runs of a row, one for each seed."""
    planned = []
    for seed in range(row.seeds):
        values = {"data.imbalance_factor": row.factor, **filled(row.values, workdir=workdir, seed=seed)}
        fields = tune.with_values(compare.run_fields(config, row.method, seed), values)
        folder = workdir / f"factor{row.factor:g}" / row.name / f"seed{seed}"
        planned.append(runs.Task(f"{row.name}, factor {row.factor:g}, seed {seed}", config_lib.resolve(fields), folder))
    return planned


def summary(results: Results) -> dict[str, float]:
    """Returns mean and standard deviation (NaN of one seed) of the last epoch's balanced accuracy, its thirds; in %."""
    last = [one["last"][one["split"]] for one in results]
    balanced = [100 * one["balanced_accuracy"] for one in last]
    found = {"mean": statistics.fmean(balanced), "std": statistics.stdev(balanced) if len(balanced) > 1 else math.nan}
    return found | {name: 100 * statistics.fmean(one[f"{name}_third"] for one in last) for name in THIRDS}


def spread(found: Mapping[str, float]) -> str:
    """Returns mean and standard deviation of a `summary`; of one seed the mean."""
    return f"{found['mean']:.1f} ± {found['std']:.1f}".removesuffix(" ± nan")


def difference(results: Results, baseline: Results) -> str:
    """Returns the difference in balanced accuracy, paired by seed, with its 95 % interval, in words."""
    rows = compare.table({"baseline": baseline[: len(results)], "row": results})
    return comparison.interval(next(row for row in rows if (row["method"], row["epoch"]) == ("row", "last")))


def markdown(finished: Finished) -> str:
    """Returns the tables, one for each imbalance factor."""
    lines = []
    for factor in dict.fromkeys(row.factor for row, _ in finished):
        here = [(row, results) for row, results in finished if row.factor == factor]
        known = {row.name: results for row, results in here}
        lines += [f"Imbalance factor {factor:g}", ""]
        against = [name for name in ("ce", "logit_adjusted") if name in known]
        head = ["method", "balanced accuracy", *(f"minus `{name}`" for name in against), *THIRDS.values(), "seeds"]
        lines += [" | ".join(["", *head, ""]).strip(), "|" + " --- |" * len(head)]
        for row, results in sorted(here, key=lambda pair: -summary(pair[1])["mean"]):
            found = summary(results)
            cells = [f"`{row.name}`", spread(found)]
            cells += ["–" if row.name == name else difference(results, known[name]) for name in against]
            cells += [f"{found[name]:.1f}" for name in THIRDS] + [str(row.seeds)]
            lines.append(" | ".join(["", *cells, ""]).strip())
        lines.append("")
    return "\n".join(lines)


def write_csv(finished: Finished, path: Path) -> None:
    """Writes a line for each row, accuracies in percent."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for row, results in finished:
            numbers = ["" if math.isnan(value) else f"{value:.2f}" for value in summary(results).values()]
            writer.writerow([row.name, f"{row.factor:g}", row.seeds, *numbers, shell(row)])


def write_costs(finished: Finished, path: Path) -> None:
    """Writes a line for each row with costs: an image's mean cost over the seeds, and recalls of one class, in %."""
    lines = []
    for row, results in finished:
        measured = [one["last"]["decisions"]["measured"][one["split"]] for one in results if "decisions" in one["last"]]
        if not measured:
            continue
        costs = {name: [one[key]["mean_cost"] for one in measured] for name, key in DECIDED.items()}
        spread = [f"{statistics.stdev(values):.4f}" if len(values) > 1 else "" for values in costs.values()]
        recalls = [f"{100 * statistics.fmean(one['recalls'][0][name] for one in measured):.2f}" for name in RECALLS]
        means = [f"{statistics.fmean(values):.4f}" for values in costs.values()]
        lines.append([row.name, row.seeds, *means, *spread, *recalls, shell(row)])
    head = ["method", "seeds", *DECIDED, *(f"{name}_std" for name in DECIDED), *RECALLS, "command"]
    disk.write_rows(path, [head, *lines])


def shell(row: Row) -> str:
    """Returns the command that trains the row by itself."""
    values = {"data.imbalance_factor": row.factor, **filled(row.values, workdir="WORKDIR", seed="SEED")}
    each = any("SEED" in str(value) for value in values.values())  # what it starts from is another for each seed
    seeds = "SEED" if each else ",".join(map(str, range(row.seeds)))
    source = config_flags.get_config_filename(flags.FLAGS["config"])
    words = [f"--config={source}", f"--methods={row.method}", f"--seeds={seeds}"]
    words += [word for word in sys.argv[1:] if word.startswith("--config.")]
    words += [f"--config.{path}={value}" for path, value in values.items()]
    return shlex.join(["python", "-m", "mfm_jax.compare", *words, "--workdir=WORKDIR"])


if __name__ == "__main__":
    command.run(main)
