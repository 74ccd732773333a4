"""Export a trained classifier to files that need neither mfm_jax nor the data set.

    python -m mfm_jax.export --checkpoint=runs/cifar10 --out=exported

The folder gets the plain classifier with its normalisation and parameters as a `jax.export` artifact for CPU, CUDA and
TPU (`classifier.bin`: uint8 [b, H, W, C] -> probabilities float32 [b, K], any b), its facts (`classifier.json`), a
script that uses both (`how_to_use.py`), what it decodes with (`pictures.py`, `formats.py`), and the model card
(`MODEL_CARD.md`); with `--onnx`, `classifier.onnx` too. The modulator stays behind. `--hub=FOLDER` lays out a folder
for a model hub in their place, which `mfm_jax.load` reads. Exit status: 0 done; 2 a mistake, in one line.
"""

import dataclasses
import inspect
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.export
import numpy as np

from mfm_jax import command, hub
from mfm_jax.data import formats, pictures
from mfm_jax.errors import UserError, in_a_line, install
from mfm_jax.evaluation import classifier
from mfm_jax.evaluation.classifier import Classifier
from mfm_jax.fields import names_own
from mfm_jax.machine import disk, versions
from mfm_jax.pages import card, style
from mfm_jax.workdir.files import Workdir

PLATFORMS = ("cpu", "cuda", "tpu")


def export(
    workdir: str | Path,
    out: str | Path,
    which: str = "last",
    *,
    onnx: bool = False,
    made_by: str = "",
    module: Any = None,
) -> dict[str, int]:
    """Writes the classifier of a finished run to the folder `out`.

    Args:
      workdir: of the run.
      out: the folder; files of an earlier export there are replaced.
      which: "last" or "best", the checkpoint.
      onnx: write `classifier.onnx` as well.
      made_by: the command, for the card.
      module: as in `classifier.load`.

    Returns:
      The bytes of each file of the classifier.

    Raises:
      UserError: the run has not finished or cannot be loaded, `out` holds a run, or what `--onnx` needs is not
        installed.
      RuntimeError: a file's probabilities differ from the checkpoint's by more than 1e-5.
    """
    workdir, out = Path(workdir), Path(out)
    Workdir(out).check_no_run()
    trained, run, found = hub.loaded(workdir, which, module)
    programs = {"classifier.bin": _serialized(trained)}
    if onnx:
        programs["classifier.onnx"] = _onnx(trained)
    out.mkdir(parents=True, exist_ok=True)
    for name, program in programs.items():
        disk.write(out / name, program)
    calibration = found.get("calibration")
    facts = dataclasses.asdict(trained.facts) | {
        "temperature": calibration and calibration["temperature"],  # not applied in the artifact
        "prediction_sets": trained.sets and trained.sets.to_dict(),
        "decisions": trained.decisions and trained.decisions.to_dict(),
        "method": run.results["method"],
        "which": which,
        "step": trained.step,
        "manifest": run.manifest.get("hash"),
        "versions": versions.versions(),
    }
    disk.write_object(Workdir(out).facts, facts)  # by the name that it has in a workdir
    disk.write(out / "how_to_use.py", style.template("how_to_use.py.jinja").render())
    for module in (formats, pictures):
        name = module.__name__.rpartition(".")[2]
        disk.write(out / f"{name}.py", inspect.getsource(module).replace("from mfm_jax.data.", "from "))
    sizes = {name: len(program) for name, program in programs.items()}
    card.write_card(workdir, out / "MODEL_CARD.md", which, made_by, sizes)
    return sizes


def exported(trained: Classifier) -> jax.export.Exported:
    """Returns uint8 `[b, H, W, C]` -> float32 `[b, K]` for every platform, b symbolic, the parameters inside.

    Raises:
      UserError: a module of the user's own that does not take a free batch size.
    """
    try:
        return jax.export.export(jax.jit(trained.forward), platforms=PLATFORMS)(_images(trained))
    except Exception as error:
        if not names_own(trained.config.model.name):
            raise
        raise UserError(
            f"model.name = {trained.config.model.name!r}: fails where the batch size is free ({in_a_line(error)});"
            " change what needs a number, e.g. len(x) to x.shape[0], and export again"
        ) from error


def _images(trained: Classifier) -> jax.ShapeDtypeStruct:
    height, width, channels = trained.image_shape
    return jax.ShapeDtypeStruct(jax.export.symbolic_shape(f"b, {height}, {width}, {channels}"), np.uint8)


def _serialized(trained: Classifier) -> bytes:
    content = exported(trained).serialize()
    call = jax.jit(jax.export.deserialize(content).call)
    hub.check("classifier.bin", trained, lambda images: np.asarray(call(images)))
    return bytes(content)


def _onnx(trained: Classifier) -> bytes:
    try:
        import jax2onnx
        import onnxruntime
    except ImportError as error:
        raise UserError(f"--onnx: jax2onnx and onnxruntime are not installed; {install('onnx')}") from error
    content = jax2onnx.to_onnx(trained.forward, [_images(trained)]).SerializeToString()
    session = onnxruntime.InferenceSession(content)
    name = session.get_inputs()[0].name
    hub.check("classifier.onnx", trained, lambda images: session.run(None, {name: images})[0])
    return content


def main(argv: Sequence[str]) -> int:
    parser = command.Parser("export", __doc__)
    run_flags = ("--checkpoint", "--workdir")
    parser.add_argument(*run_flags, dest="checkpoint", type=Path, required=True, help="workdir of the finished run")
    parser.add_argument("--out", type=Path, help="the folder to write to (WORKDIR/exported)")
    parser.add_argument("--hub", type=Path, help="in the place of --out: a folder as model hubs take it, with weights")
    parser.add_argument("--license", help=f"with --hub: of the weights, such as apache-2.0 ({hub.NO_LICENSE})")
    parser.add_argument("--which", choices=classifier.WHICH, default="last", help="checkpoint (%(default)s)")
    parser.add_argument("--onnx", action="store_true", help="also write classifier.onnx (needs the extra `onnx`)")
    options: Any = parser.parse_args(argv[1:])
    made_by = f"python -m mfm_jax.export {shlex.join(argv[1:])}"
    if options.hub:
        if options.out or options.onnx:
            parser.error("--hub: lays out a folder of its own; leave --out and --onnx out")
        license_id = options.license or hub.NO_LICENSE
        hub.lay_out(options.checkpoint, options.hub, options.which, license_id=license_id, made_by=made_by)
        print(
            f"{options.hub}: model.safetensors, config.json and README.md; mfm_jax.load({str(options.hub)!r}) reads it"
        )
        print(
            f"to publish it: hf upload USER/NAME {options.hub}" + ("" if options.license else "; --license is not set")
        )
        return 0
    if options.license:
        parser.error("--license: only a card for --hub has one")
    out = options.out or Workdir(options.checkpoint).exported
    sizes = export(options.checkpoint, out, options.which, onnx=options.onnx, made_by=made_by)
    facts = Workdir(out).facts.name
    for name, size in sizes.items():
        print(f"{out / name}: {size:,} bytes, the checkpoint's probabilities to {classifier.TOLERANCE:g}")
    print(f"{out / 'how_to_use.py'}: names the classes of pictures with it and {facts}")
    print(f"{out / 'MODEL_CARD.md'}: what it was trained on, how accurate it is, and its limits")
    return 0


if __name__ == "__main__":
    sys.exit(command.guarded(main, sys.argv))
