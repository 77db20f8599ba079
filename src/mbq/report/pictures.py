"""Pictures inside the page: small copies as data: addresses, a bounded number of bytes of them."""

from __future__ import annotations

import base64
import io
from pathlib import Path

from mbq.errors import MBQError
from mbq.images import open_image

LONGEST_SIDE = 384  # pixels
LARGEST_FILE = 32 * 2**20  # bytes of a picture that is opened
BUDGET = 4_000_000  # characters of all pictures of a page


class Pictures:
    """A small copy of each picture that was asked for, once; ``left_out`` counts those that there was no room for.

    Copies are made anew from the pixels, so that nothing else that a file holds (places, names) gets into the page.
    """

    def __init__(self, budget: int = BUDGET) -> None:
        self.budget = budget
        self.addresses: list[str] = []
        self.sizes: list[tuple[int, int]] = []
        self.left_out = 0
        self._numbers: dict[Path, int | None] = {}

    def number(self, folder: Path, name: str) -> int | None:
        """The picture's place in ``addresses``; None where there is no room, or ``folder`` holds no such picture."""
        path = (folder / name).resolve()
        if path not in self._numbers:
            self._numbers[path] = self._added(folder.resolve(), path)
        return self._numbers[path]

    def _added(self, folder: Path, path: Path) -> int | None:
        try:
            if not path.is_relative_to(folder):
                raise MBQError(f"{path} lies outside of {folder}.")
            if path.stat().st_size > LARGEST_FILE:
                raise MBQError(f"{path} has more than {LARGEST_FILE >> 20} MB.")
            picture = open_image(path, "a report")
        except (MBQError, OSError):
            self.left_out += 1
            return None
        picture.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
        file = io.BytesIO()
        picture.save(file, "WEBP", quality=85)
        address = "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()
        if len(address) > self.budget:
            self.left_out += 1
            return None
        self.budget -= len(address)
        self.addresses.append(address)
        self.sizes.append(picture.size)
        return len(self.addresses) - 1
