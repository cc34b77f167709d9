"""Which bytes each process sends and stores in each round of a broadcast between slices.

The transfers at one place of the mesh are one string of bytes, cut into windows. Every byte of a window has one
sender and all others put zero there, so a sum of the windows over the slices is the bytes themselves.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
from collections.abc import Callable, Sequence

import numpy as np

from emergency_ckpt.errors import TopologyError

ReadWindow = Callable[[int, int], np.ndarray]
WriteWindow = Callable[[int, np.ndarray], None]


@dataclasses.dataclass(frozen=True, slots=True)
class Transfer:
    """Bytes `[offset, offset + nbytes)` of the source's region go to the same place in each receiver's region.

    Source and receivers are process indices; all stand at the same place of the mesh, in different slices.
    """

    source: int
    receivers: tuple[int, ...]
    offset: int
    nbytes: int

    def __post_init__(self) -> None:
        if self.source in self.receivers:
            raise ValueError(f"process {self.source} is both source and receiver of a transfer")
        if self.offset < 0 or self.nbytes < 0:
            raise ValueError(f"a transfer of {self.nbytes} bytes at offset {self.offset}")


@dataclasses.dataclass(frozen=True)
class Lane:
    """The transfers at one place of the mesh, one after the other as one string of bytes.

    Attributes:
      places: the columns of the flattened mesh that the processes of this lane own; each carries its part of
        every round.
      starts: where each transfer begins in the lane's string of bytes.
    """

    places: tuple[int, ...]
    transfers: tuple[Transfer, ...]
    starts: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return self.starts[-1] + self.transfers[-1].nbytes

    @property
    def bytes_per_device(self) -> int:
        return -(-self.nbytes // len(self.places))

    def pieces(self, at: int, length: int) -> list[tuple[Transfer, int, int, int]]:
        """What lies in `[at, at + length)`: (transfer, offset in the region, offset in this piece, length)."""
        found = []
        first = max(0, bisect.bisect_right(self.starts, at) - 1)
        for transfer, start in zip(self.transfers[first:], self.starts[first:], strict=True):
            if start >= at + length:
                break
            low, high = max(at, start), min(at + length, start + transfer.nbytes)
            if low < high:
                found.append((transfer, transfer.offset + low - start, low - at, high - low))
        return found


def plan_lanes(owners: np.ndarray, transfers: Sequence[Transfer]) -> list[Lane]:
    """The transfers by their place; `owners[replica, place]` is the process that owns the device there.

    Raises TopologyError where source and receivers do not stand at the same place.
    """
    by_places: dict[tuple[int, ...], list[Transfer]] = {}
    for transfer in transfers:
        places = {p: _places_of(owners, p) for p in (transfer.source, *transfer.receivers)}
        if len(set(places.values())) > 1:
            raise TopologyError(
                f"process {transfer.source} cannot send its region to processes {list(transfer.receivers)}: "
                f"they do not stand at the same place of the mesh (places by process: {places}); send between "
                "counterparts of different slices only"
            )
        by_places.setdefault(places[transfer.source], []).append(transfer)
    taken: dict[int, tuple[int, ...]] = {}
    for places in by_places:
        for place in places:
            other = taken.setdefault(place, places)
            if other != places:
                raise TopologyError(
                    f"transfers at places {places} and {other} of the mesh overlap: the processes of different "
                    "slices do not line up, so no region can be sent as it is"
                )
    return [
        Lane(places, tuple(chosen), tuple(itertools.accumulate((t.nbytes for t in chosen[:-1]), initial=0)))
        for places, chosen in by_places.items()
    ]


def _places_of(owners: np.ndarray, process: int) -> tuple[int, ...]:
    places = tuple(np.unique(np.nonzero(owners == process)[1]).tolist())
    if not places:
        raise TopologyError(f"process {process} has no device in the mesh; transfers are between its processes")
    return places


class Ends:
    """This process's ends of the lanes: what it sends and stores in each round, and the first error it met."""

    def __init__(
        self,
        process: int,
        lanes: Sequence[Lane],
        window_bytes: int,
        read_window: ReadWindow,
        write_window: WriteWindow,
    ) -> None:
        self._process = process
        self._lane_of = {place: lane for lane in lanes for place in lane.places}
        self._window_bytes = window_bytes
        self._read_window = read_window
        self._write_window = write_window
        self.error: Exception | None = None

    def fill(self, window: np.ndarray, place: int, round_: int) -> bool:
        """Puts what this process sends at `place` into a uint8 window, zeros elsewhere; False for nothing."""
        pieces = [p for p in self._pieces(place, round_) if p[0].source == self._process]
        if not pieces:
            return False
        window.fill(0)
        for _, offset, at, length in pieces:
            try:
                window[at : at + length] = _checked(self._read_window(offset, length), offset, length)
            except Exception as error:  # kept: the others wait for this process's windows
                window[at : at + length] = 0
                self.error = self.error or error
        return True

    def receives(self, place: int, round_: int) -> bool:
        return any(self._process in piece[0].receivers for piece in self._pieces(place, round_))

    def store(self, window: np.ndarray, place: int, round_: int) -> None:
        """Stores what arrived at `place` for this process."""
        for transfer, offset, at, length in self._pieces(place, round_):
            if self._process in transfer.receivers:
                try:
                    self._write_window(offset, window[at : at + length])
                except Exception as error:  # kept: the others wait for this process's windows
                    self.error = self.error or error

    def _pieces(self, place: int, round_: int) -> list[tuple[Transfer, int, int, int]]:
        lane = self._lane_of.get(place)
        if lane is None:
            return []
        index = round_ * len(lane.places) + lane.places.index(place)
        return lane.pieces(index * self._window_bytes, self._window_bytes)


def _checked(data: np.ndarray, offset: int, length: int) -> np.ndarray:
    if data.dtype != np.uint8 or data.shape != (length,):
        raise ValueError(
            f"reading {length} bytes at offset {offset} of a region gave {data.dtype} of shape {data.shape}"
        )
    return data
