"""How many of 16 bits the pictures of a set use: one number for all, found when they are checked.

Pictures of 8 bits have no part in it.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from mfm_jax.data.pictures import WHITE, Facts

FEW = 64  # levels; with fewer, a picture of 16 bits has lost what a picture of 8 would show


def white(given: int, facts: Sequence[Facts], in_training: npt.NDArray[np.bool_]) -> int:
    """Returns the value of 16-bit pictures that becomes 255.

    It is `given`, or where that is 0, the largest of as many whole bits as the training pictures use or state: those
    that are tested on have no say in how pictures are read.
    """
    used = max((fact.bits for fact, trained in zip(facts, in_training.tolist(), strict=True) if trained), default=0)
    return given or (2**used - 1 if used else WHITE)


def levels(bits: int, white: int) -> int:
    """Returns how many of 256 levels are left of a picture whose values take so many bits."""
    return min(((2**bits - 1) * 255 + white // 2) // white, 255) + 1


def loses(facts: Iterable[Facts], white: int) -> bool:
    """Whether half of the pictures of 16 bits are left with few levels; some may well be dark."""
    deep = [fact.bits for fact in facts if fact.bits]
    return bool(deep) and levels(int(np.median(deep)), white) < FEW


def in_words(facts: Iterable[Facts], white: int) -> str:
    """Returns a line on the pictures of 16 bits: what is white, and how many levels are left of which."""
    deep = [fact.bits for fact in facts if fact.bits]
    few = sum(levels(bits, white) < FEW for bits in deep)
    over = sum(2**bits - 1 > white for bits in deep)
    least = levels(min(deep), white)
    return (
        f"16 bits a channel: {len(deep):,}, of which {min(deep)} to {max(deep)} are used; 0 to {white} become 0 to 255,"
        f" which leaves {least} to {levels(max(deep), white)} levels"
        + (f"; fewer than {FEW} in {few:,}" if few else "")
        + (f"; values above {white} in up to {over:,} become 255" if over else "")
    )
