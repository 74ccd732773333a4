"""What a config says of classes by their names: costs of a miss, and wanted recalls.

    eval.costs   "melanoma>nevus=10, *>melanoma=0.5"   melanoma named nevus costs 10, another class named melanoma 0.5
    eval.recall  "melanoma=0.95"                       of 100 images of melanoma 95 are to be found

A class goes by its name, or by its number where no class has that name; a name with one of `,>=` in it by its number
alone. `*` stands for every other class. A later cost takes the place of an earlier one. Whether there are such classes
is known with the data.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from mfm_jax.errors import UserError, some_of

ANY = "*"
COSTS, RECALL = "eval.costs", "eval.recall"


class Cost(NamedTuple):
    """What a miss of class `true` as class `named` costs; each a name, a number or `ANY`."""

    true: str
    named: str
    cost: float


class Recall(NamedTuple):
    """The share of a class's images that is to be found."""

    of: str
    recall: float


def costs(text: str) -> list[Cost]:
    """Returns the costs in a text such as `A>B=10, *>C=0.5`, in its order.

    Raises:
      UserError: it is not of that form, or a cost is negative or not finite, or that of a right answer not 0.
    """
    found = []
    for part in _parts(text):
        pair, _, number = part.rpartition("=")
        true, arrow, named = (word.strip() for word in pair.partition(">"))
        value = _number(number)
        if not (true and arrow and named) or value is None:
            raise UserError(f"{COSTS} = {text!r}: {part!r}: expected TRUE>NAMED=COST, comma-separated, e.g. 'a>b=10'")
        if not (0 <= value < math.inf):
            raise UserError(f"{COSTS} = {text!r}: {part!r}: a cost is 0 or more, and finite")
        if true == named != ANY and value:
            raise UserError(f"{COSTS} = {text!r}: {part!r}: a right answer costs 0; leave it out")
        found.append(Cost(true, named, value))
    return found


def recalls(text: str) -> list[Recall]:
    """Returns the recalls in a text such as `A=0.95, B=0.9`, in its order.

    Raises:
      UserError: it is not of that form, a recall is not between 0 and 1, or a class is named twice.
    """
    found = []
    for part in _parts(text):
        of, _, number = (word.strip() for word in part.rpartition("="))
        value = _number(number)
        if not of or of == ANY or value is None or not 0 < value < 1:
            raise UserError(f"{RECALL} = {text!r}: {part!r}: expected CLASS=RECALL, comma-separated, between 0 and 1")
        found.append(Recall(of, value))
    if len({one.of for one in found}) != len(found):
        raise UserError(f"{RECALL} = {text!r}: names a class twice")
    return found


def class_of(word: str, names: Sequence[str], field: str) -> int:
    """Returns the number of a class that `field` names.

    Raises:
      UserError: there is no such class.
    """
    if word in names:
        return names.index(word)
    if word.isdecimal() and len(word) < 10 and int(word) < len(names):
        return int(word)
    raise UserError(f"{field}: no class {word!r}; the classes are {some_of(names)}")


def problems(of_costs: str, of_recalls: str) -> Iterator[str]:
    """Yields what is wrong with the texts, whatever the classes."""
    for read, text in ((costs, of_costs), (recalls, of_recalls)):
        try:
            read(text)
        except UserError as error:
            yield str(error)


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",")] if text.strip() else []


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
