"""What the labels of list files stand for: numbers of classes, or their names.

The whole numbers from 0 to K - 1 are the numbers of K classes. Where a few of them are missing, or a few lines have
other labels, these are mistakes. All else are names: years, 007, digits beside letters, numbers from 1.
"""

import re
from collections.abc import Collection, Iterator, Mapping

from mfm_jax.data.walk import Problem

_WHOLE = re.compile(r"-?(0|[1-9][0-9]{0,17})")
_NUMBER = re.compile(r"-?\d+(\.\d+)?")
_CHANGED = {  # what a spreadsheet, or a table of numbers, makes of other things
    "a date": r"\d{1,2}-[A-Z][a-z]{2}(-\d{2,4})?|[A-Z][a-z]{2}-\d{2}|\d{1,2}([-/.])\d{1,2}\2\d{4}"
    r"|\d{4}([-/.])\d{1,2}\3\d{1,2}|\d{1,2}/\d{1,2}/\d{2}",
    "a truth value": "TRUE|FALSE|True|False",
    "a number with a fraction or an exponent": r"\d+\.0+|\d([.,]\d+)?E[+-]\d{2,}",
    "a value that is missing": r"#(N/A|REF!|NAME\?|VALUE!|DIV/0!|NUM!|NULL!)|nan|NaN|<NA>",
}


def not_numbers(uses: Mapping[str, int]) -> dict[str, str] | None:
    """Returns which labels are no class numbers, and why, though the others are; None where labels are names.

    `uses` has in how many lines each label stands.
    """
    whole = {label: int(label) for label in uses if _WHOLE.fullmatch(label)}
    # A few classes may have lost all their lines, but not most of them: beyond that a number is no class.
    beyond = 2 * len(whole)
    others: dict[str, str] = {}
    for label in uses:
        number = whole.get(label)
        if number is None:
            others[label] = f"label {label!r} is no whole number, as the others are"
        elif number < 0:
            others[label] = f"label {number} is negative"
        elif number >= beyond:
            others[label] = f"label {number} is out of range for {beyond // 2} different labels"
    classes = [uses[label] for label in uses if label not in others]
    # What stands in about as many lines as a class does is the name of one; -1 never is.
    most = max((uses[label] for label in others if whole.get(label, 0) >= 0), default=0)
    numbered = "0" in uses and len(classes) > 1 and 2 * most * len(classes) < sum(classes)
    return others if numbered else None


def ordered(names: Collection[str]) -> list[str]:
    """Returns class names in alphabetical order, or by their values if all are whole numbers."""
    return sorted(names, key=int if all(map(_WHOLE.fullmatch, names)) else None)


def changed(names: Mapping[str, str]) -> Iterator[Problem]:
    """Yields what a program may have made of other names; `names` has where each class name stands first."""
    padded = min((len(name) for name in names if re.fullmatch("0[0-9]+", name)), default=0)
    for name, where in names.items():
        if len(name) < padded and re.fullmatch("[0-9]+", name):
            reason = f"label {name!r} is shorter than others that begin with 0; a spreadsheet takes zeros away"
            yield Problem(where, reason)
    if all(map(_NUMBER.fullmatch, names)):
        return
    for what, pattern in _CHANGED.items():
        alike = [name for name in names if re.fullmatch(pattern, name)]
        for name in alike if len(alike) < len(names) else ():
            reason = f"label {name!r} is {what}, and other labels are not; a spreadsheet may have changed it"
            yield Problem(names[name], reason)
