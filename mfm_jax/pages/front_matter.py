"""The head of a model card that hubs read: YAML between two lines of dashes, with the results as a `model-index`.

The form is that of the Hugging Face Hub (https://huggingface.co/docs/hub/model-cards), which other hubs read too.
"""

import re
from typing import Any

import yaml

from mfm_jax.workdir.finished import SPLITS, Finished

# The type of a metric, its name, the key of `metrics.evaluate`.
_METRICS = (
    ("balanced_accuracy", "Balanced accuracy", "balanced_accuracy"),
    ("accuracy", "Accuracy", "accuracy"),
    ("f1", "Macro F1", "macro_f1"),
    ("accuracy", "Accuracy, head third of the classes", "head_third"),
    ("accuracy", "Accuracy, middle third", "middle_third"),
    ("accuracy", "Accuracy, rarest third", "rarest_third"),
    ("expected_calibration_error", "Expected calibration error", "ece"),
)


def text(run: Finished, which: str, license_id: str) -> str:
    """Returns the front matter of the card of a run's checkpoint, values as fractions, and the empty line after it.

    `which` is the checkpoint, "last" or "best"; `license_id` is spelt as hubs do, e.g. `apache-2.0`.
    """
    method, model, data = run.results["method"], run.config["model"]["name"], str(run.manifest["dataset"])
    head: dict[str, Any] = {
        "license": license_id,
        "library_name": "mfm_jax",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "long-tailed-recognition", "jax", "flax", method],
        "metrics": ["balanced_accuracy", "accuracy"],
        "model-index": [{"name": f"{model}-{method}", "results": [_result(run, which, data)]}],
    }
    written = yaml.safe_dump(head, sort_keys=False, allow_unicode=True, width=120)
    return f"---\n{written}---\n\n"


def _result(run: Finished, which: str, data: str) -> dict[str, Any]:
    found = run.results[which][run.split]
    measured = [
        {"type": kind, "name": name, "value": round(float(found[key]), 6)}
        for kind, name, key in _METRICS
        if found.get(key) is not None
    ]
    factor = run.manifest.get("imbalance_factor")
    return {
        "task": {"type": "image-classification", "name": "Image classification"},
        "dataset": {
            "name": data,
            "type": re.sub(r"[^\w.]+", "-", data).strip("-").lower() or "images",
            "split": SPLITS[run.split],
            "args": {"protocol": run.manifest["protocol"], **({"imbalance_factor": factor} if factor else {})},
        },
        "metrics": measured,
    }
