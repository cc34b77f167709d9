"""How an array that is too large to be copied at once is cut into pieces that lie one after the other.

All pieces of an array have one shape, so that one compiled program cuts them all, and each is contiguous in C
order: written one after the other, less what they repeat, they are the array's bytes.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence

# Pieces of the last axis begin at multiples of this many elements where that is possible: packed dtypes and
# vector units are not made for odd places.
_ALIGNED_ELEMENTS = 128


@dataclasses.dataclass(frozen=True)
class Cut:
    """An array cut along `axis`, once for every index along the axes before it.

    Attributes:
      shape: of the array.
      axis: the first axis of which one row is small enough; meaningless where there is only one piece.
      rows: length of every piece along `axis`.
    """

    shape: tuple[int, ...]
    axis: int
    rows: int

    @property
    def piece_shape(self) -> tuple[int, ...]:
        """The shape of every piece, of as many dimensions as the array."""
        if not self.shape:
            return ()
        return (*(1,) * self.axis, self.rows, *self.shape[self.axis + 1 :])

    def pieces(self) -> Iterator[tuple[tuple[int, ...], int]]:
        """Where each piece starts, in C order, and how many leading elements the piece before it had already.

        A last piece that would be shorter starts earlier instead.
        """
        if not self.shape:
            yield (), 0
            return
        length, behind = self.shape[self.axis], (0,) * (len(self.shape) - self.axis - 1)
        row = math.prod(self.shape[self.axis + 1 :])
        for before in itertools.product(*map(range, self.shape[: self.axis])):
            for start in range(0, max(length, 1), max(self.rows, 1)):
                begin = min(start, length - self.rows)
                yield (*before, begin, *behind), (start - begin) * row


def cut_array(shape: Sequence[int], itemsize: int, piece_bytes: int) -> Cut:
    """Cuts into pieces of at most `piece_bytes` (of one element, where not even that fits), alike in size."""
    shape = tuple(shape)
    elements = max(1, piece_bytes // itemsize)
    if math.prod(shape) <= elements:
        return Cut(shape, 0, shape[0] if shape else 1)
    axis = next(k for k in range(len(shape)) if math.prod(shape[k + 1 :]) <= elements)
    most = elements // math.prod(shape[axis + 1 :])
    rows = -(-shape[axis] // -(-shape[axis] // most))
    if axis == len(shape) - 1 and most >= _ALIGNED_ELEMENTS:
        rows = min(-(-rows // _ALIGNED_ELEMENTS), most // _ALIGNED_ELEMENTS) * _ALIGNED_ELEMENTS
    return Cut(shape, axis, rows)
