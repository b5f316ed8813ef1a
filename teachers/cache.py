"""What a teacher says of a fixed bank of views, kept on disk: it is asked once, and then only remembered."""

import json
import os
import shutil
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

VALUES, INDEX, KEY = "values.bin", "index.bin", "cache.json"
VERSION = 1  # of the files' layout

_ENTRY = np.dtype([("values", "<u4"), ("pixels", "<u4")])  # CRC-32s; of values that are not there 0


class Shown(Protocol):
    """Which picture a teacher is asked about.

    Attributes:
        file: its name, for messages.
        number: of the image, from 0.
        view: of the bank, from 0.
        pixels: CRC-32 of the network's input.
    """

    file: str
    number: int
    view: int
    pixels: int


class CacheError(ValueError):
    """A cache that does not belong to this teacher and these pictures, or cannot be used; the message is one line."""


class Part(NamedTuple):
    """One level of one field of a teacher's output: where it lies in a record, and its (C, H, W)."""

    start: int
    end: int
    shape: tuple[int, int, int]


class TeacherCache:
    """A folder with a record for every view of every image: the parts of the teacher's output that are wanted, float16.

    Records are filled when their view is first seen. What is given is what a record holds, be it there already or just
    made; so training comes to the same end whatever was there before, and wherever it was interrupted. A record counts
    once the checksum beside it agrees, so none is read that was half written, by a process that was killed or by a
    machine that went down; the pixels' checksum tells whether it is of the picture that the student sees.

    Several processes may fill one folder, as each writes records of its own images.

    Args:
        folder: its place; nothing is written before `create`.
        key: all that the teacher's output depends on, by a name for messages; plain values, None for one that is not
            known yet.
        output: what the teacher makes of any images of the size, for the shapes.
        wanted: (field, level) of all that is read.
        images: how many there are.
        views: of each.
        warn: is told once if no more can be written; what is missing is then asked of the teacher.

    Raises:
        CacheError: the folder holds something else, or a cache of another key; or what is wanted is no map.
    """

    def __init__(
        self,
        folder: str | Path,
        key: Mapping[str, Any],
        output: NamedTuple,
        wanted: Collection[tuple[str, int]],
        images: int,
        views: int,
        warn: Callable[[str], None],
    ):
        self.folder, self.views, self.records = Path(folder), views, images * views
        self._output, self._warn = output, warn
        wanted = {(_field(output, name), level) for name, level in wanted}
        # what does not go by images is the same for all of them, so it is known already
        levels = [(field, i, x) for field, levels in zip(output._fields, output) for i, x in enumerate(levels)]
        for name, i, x in levels:
            if (name, i) in wanted and x.dim() == 3:
                raise CacheError(f"what its losses go by ({name}) is no map, and only maps are kept; leave cache out")
        wanted = {f"{name} {i}": list(x.shape[1:]) for name, i, x in levels if (name, i) in wanted and x.dim() == 4}
        self._key = json.loads(json.dumps({"version": VERSION, **key, "images": images, "views": views}))
        shapes = self._shapes = self._stored(wanted)
        self._json = json.dumps({**self._key, "parts": shapes}, indent=2) + "\n"
        self._parts, end = {}, 0
        for name, (channels, height, width) in shapes.items():
            start, end = end, end + channels * height * width
            self._parts[name] = Part(start, end, (channels, height, width))
        self._wanted = {name: self._parts[name] for name in wanted}
        self.record_bytes = 2 * end
        self._values = self._index = None
        self._files: tuple | None = None  # to write to; None where nothing can be

    @property
    def filled(self) -> int:
        """How many records are there."""
        file = self.folder / INDEX
        if not file.is_file():
            return 0
        return int(np.count_nonzero(np.fromfile(file, dtype=_ENTRY)["values"]))

    @property
    def missing_bytes(self) -> int:
        """What it will still take of the disk."""
        return (self.records - self.filled) * (self.record_bytes + _ENTRY.itemsize)

    @property
    def free_bytes(self) -> int:
        """What the disk has left."""
        there = next(folder for folder in (self.folder, *self.folder.absolute().parents) if folder.is_dir())
        return shutil.disk_usage(there).free

    def create(self) -> None:
        """Makes the folder and its files, where they are not there; one process does it for all.

        Where nothing can be written, one that is there is used as it is, and who is told of a full disk is told of
        what it lacks.

        Raises:
            CacheError: it is not there and cannot be made, or another run has made one of its own meanwhile.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not (self.folder / KEY).exists():
                staged = self.folder / f".{KEY}.{os.getpid()}"
                staged.write_text(self._json)
                try:
                    os.link(staged, self.folder / KEY)
                except FileExistsError:  # of several runs that start together, one makes it
                    pass
                except OSError:  # a file system without links
                    staged.replace(self.folder / KEY)
                staged.unlink(missing_ok=True)
            if self._stored(self._shapes) != self._shapes:
                raise CacheError(f"{self.folder} was just made by a run of other losses; start this one again")
            for name, size in ((VALUES, self.record_bytes), (INDEX, _ENTRY.itemsize)):
                with (self.folder / name).open("ab") as file:
                    file.truncate(self.records * size)  # holes, which take no disk
        except OSError as error:
            if not (self.folder / KEY).is_file():
                raise CacheError(f"cannot write to {self.folder} ({error.strerror}); name another folder") from None
            if self.filled < self.records:
                self._warn(
                    f"cache: {self.folder} cannot be written to ({error.strerror}) and has {self.filled} of "
                    f"{self.records} records; the teacher is asked for the others"
                )

    def open(self) -> None:
        """Is called by every process, once the folder is there."""
        paths = self.folder / VALUES, self.folder / INDEX
        self._values = np.memmap(paths[0], "<f2", "r", shape=(self.records, self.record_bytes // 2))
        self._index = np.memmap(paths[1], _ENTRY, "r", shape=(self.records,))
        self._sound = np.zeros(self.records, dtype=bool)  # read before
        try:
            self._files = tuple(path.open("r+b", buffering=0) for path in paths)
        except OSError:  # it can only be read, see `create`
            self._files = None

    def recall(self, shown: Sequence[Shown], images: Tensor, ask: Callable[[Tensor], NamedTuple]) -> NamedTuple:
        """What the teacher makes of some views: float32 tensors on the images' device, and where something is not
        wanted, tensors of its shape on the meta device, so that nobody can go by it.

        Args:
            shown: which views these are.
            images: (B, 3, H, W); all of them are looked at if one is not known, so that what is new does not depend on
                what was there.
            ask: the teacher itself.

        Raises:
            CacheError: a record is of another picture, or what the teacher says is no number in half precision.
        """
        slots = np.array([one.number * self.views + one.view for one in shown])
        known = np.array([self._knows(slot, one) for slot, one in zip(slots.tolist(), shown)], dtype=bool)
        if known.all():
            return self._restore(self._values, slots, images.device)
        rows = self._to_rows(ask(images), shown)
        rows[known] = self._values[slots[known]]
        for slot, row, one in zip(slots[~known].tolist(), rows[~known], [x for x, k in zip(shown, known) if not k]):
            self._write(slot, row, one.pixels)
        return self._restore(rows, np.arange(len(rows)), images.device)

    def _stored(self, wanted: dict[str, list[int]]) -> dict[str, list[int]]:
        """Shapes of what a record holds: what is wanted, or what was when the folder was made."""
        file = self.folder / KEY
        way_out = "name another folder, or remove this one"
        if self.folder.exists() and not file.is_file():
            if not self.folder.is_dir():
                raise CacheError(f"{self.folder} is a file; name a folder")
            others = {path.name for path in self.folder.iterdir() if not path.name.startswith(f".{KEY}")}
            others -= {VALUES, INDEX}
            if others:
                raise CacheError(f"{self.folder} holds other files ({min(others)}); name another folder")
        if not file.exists():
            return wanted
        try:
            found = json.loads(file.read_text())
            parts = found.pop("parts")
        except (ValueError, KeyError, AttributeError):
            raise CacheError(f"{file} is not what a cache writes; {way_out}") from None
        differing = [key for key, value in self._key.items() if value is not None and found.get(key) != value]
        if differing:
            said = "; ".join(_difference(key, found.get(key), self._key.get(key)) for key in differing[:3])
            more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
            raise CacheError(f"{self.folder} is of other settings: {said}{more}; {way_out}")
        lacking = [name for name, shape in wanted.items() if parts.get(name) != shape]
        if lacking:
            raise CacheError(
                f"{self.folder} has no {lacking[0]}, which these losses go by (it has {', '.join(parts)}); {way_out}"
            )
        return parts

    def _knows(self, slot: int, one: Shown) -> bool:
        entry = self._index[slot]
        if not entry["values"]:
            return False
        if not self._sound[slot]:
            self._sound[slot] = _checksum(self._values[slot]) == entry["values"]
        if self._sound[slot] and entry["pixels"] != one.pixels:
            raise CacheError(
                f"{self.folder} holds another picture of {one.file} (view {one.view}): the file, or the library that "
                "reads it, has changed since; name another folder, or remove this one"
            )
        return bool(self._sound[slot])

    def _to_rows(self, output: NamedTuple, shown: Sequence[Shown]) -> np.ndarray:
        """(B, values of a record) float16; maps lie location by location, as channels_last has them."""
        maps = [getattr(output, field)[int(level)] for field, level in map(str.split, self._parts)]
        rows = torch.cat([x.permute(0, 2, 3, 1).flatten(1) for x in maps], dim=1).half().cpu()
        for one, good in zip(shown, rows.isfinite().all(dim=1).tolist()):
            if not good:
                raise CacheError(
                    f"what the teacher says of {one.file} goes beyond half precision (65504) or is no number; leave "
                    "cache out"
                )
        return rows.numpy()

    def _write(self, slot: int, row: np.ndarray, pixels: int) -> None:
        if self._files is None:
            return
        entry = np.array([(_checksum(row), pixels)], dtype=_ENTRY)
        try:
            for file, content in zip(self._files, (row, entry)):
                file.seek(slot * content.nbytes)
                data = content.tobytes()
                if file.write(data) < len(data):
                    raise OSError(None, "no space is left")
        except OSError as error:
            self._files = None
            self._warn(
                f"cache: {self.folder} takes no more records ({error.strerror}); training goes on, and the teacher is "
                "asked for those that are missing"
            )

    def _restore(self, rows: np.ndarray, at: np.ndarray, device: torch.device) -> NamedTuple:
        fields = []
        for field, levels in zip(self._output._fields, self._output):
            restored = []
            for number, like in enumerate(levels):
                part = self._wanted.get(f"{field} {number}")
                if like.dim() != 4:
                    restored.append(like.to(device))
                elif part is None:
                    restored.append(torch.empty(len(at), *like.shape[1:], device="meta"))
                else:
                    channels, height, width = part.shape
                    values = torch.from_numpy(rows[at, part.start : part.end]).to(device).float()
                    restored.append(values.view(-1, height, width, channels).permute(0, 3, 1, 2))
            fields.append(tuple(restored))
        return type(self._output)(*fields)


def _field(output: NamedTuple, name: str) -> str:
    """A field by its name, or by the other name that a family gives it to be like others."""
    if name in output._fields:
        return name
    levels = getattr(output, name)
    return next(field for field, own in zip(output._fields, output) if own is levels)


def _checksum(row: np.ndarray) -> int:
    return zlib.crc32(row.tobytes()) or 1


def _difference(key: str, before: Any, now: Any) -> str:
    if isinstance(now, str) and len(now) == 64:  # a hash
        return f"its {key} {'differ' if key.endswith('s') else 'differs'}"
    return f"{key} {before}, now {now}"
