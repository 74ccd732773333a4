"""The commands and the Python of docs/using.md run as they stand, one after the other."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENT = (ROOT / "docs" / "using.md").read_text()


@pytest.mark.slow
def test_the_document_runs(tmp_path):
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    bare = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment = bare | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    steps = re.findall(r"^    ((?:python|mfm-jax) [^\n]*)$|^```python\n(.*?)^```$", DOCUMENT, re.MULTILINE | re.DOTALL)
    assert len(steps) == 14
    code, printed = "", ""
    for command, block in steps:
        code += block  # a block goes on from the one before
        program, *words = command.split() if command else ("python", "-c", code)
        words = ["-m", "mfm_jax", *words] if program == "mfm-jax" else words
        done = subprocess.run([sys.executable, *words], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, (command or block, done.stderr)
        printed += done.stdout
    for name in (
        "predictions.csv",
        "digits/eval/train/report.html",
        "digits/eval/outside-pictures/report.html",
        "hub/README.md",
    ):
        assert (tmp_path / "runs" / name).stat().st_size > 1000
    assert re.search(r"\.png +\d+\.\d %  \d", printed)
