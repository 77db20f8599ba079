"""Pictures of rows: where they are, and how they are opened."""

from __future__ import annotations

import base64
import binascii
import io
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit

from PIL import Image, ImageOps

from mbq.errors import MBQError


class StoredImage(Protocol):
    """A picture that stays where it is until somebody looks at it; ``str()`` names it in messages."""

    def read(self) -> bytes: ...


ImageSource = Path | bytes | Image.Image | StoredImage


def image_source(value: Any, folder: Path, where: str) -> ImageSource:
    """What a row says about a picture (a path relative to ``folder``, a data: URL, the picture itself) as a source.

    Raises MBQError naming ``where`` for anything else; nothing is opened.
    """
    if isinstance(value, Image.Image | Path) or hasattr(value, "read"):
        return value
    if not isinstance(value, str) or not value:
        raise MBQError(f"{where}: an image must be a path or a data: URL, not {type(value).__name__}.")
    if value.startswith("data:"):
        head, _, data = value.partition(",")
        try:
            return base64.b64decode(data if head.endswith(";base64") else "!", validate=True)
        except (binascii.Error, ValueError):
            raise MBQError(f"{where}: the data: URL of an image is not valid base64; write it anew.") from None
    if value.startswith(("http://", "https://")):
        raise MBQError(f"{where}: the image {value} is a web address; download it and give its path.")
    if value.startswith("file://"):
        value = unquote(urlsplit(value).path)
    return folder / value


def open_image(source: ImageSource, where: str) -> Image.Image:
    """Decode a picture: upright, RGB. Raises MBQError naming ``where`` and the picture if it is missing or corrupt."""
    if isinstance(source, Image.Image):
        return source.convert("RGB")
    try:
        with Image.open(io.BytesIO(image_bytes(source, where))) as picture:
            return ImageOps.exif_transpose(picture).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise MBQError(
            f"{where}: the image {_name(source)} cannot be decoded ({_one_line(error)}); replace it or drop the row."
        ) from error


def image_bytes(source: ImageSource, where: str) -> bytes:
    """The bytes that identify a picture: the file's, or mode, size and pixels of one in memory."""
    if isinstance(source, bytes):
        return source
    if isinstance(source, Image.Image):
        return f"{source.mode} {source.size} ".encode() + source.tobytes()
    if isinstance(source, Path) and source.exists() and not (source.is_file() or source.is_dir()):
        raise MBQError(f"{where}: the image {_name(source)} is no ordinary file; give a picture's path.")
    try:
        return source.read_bytes() if isinstance(source, Path) else source.read()
    except FileNotFoundError:
        raise MBQError(
            f"{where}: the image {_name(source)} does not exist; check the path and --images, which it is relative to."
        ) from None
    except OSError as error:
        raise MBQError(f"{where}: the image {_name(source)} cannot be read ({error.strerror}); check it.") from error


def _name(source: ImageSource) -> str:
    return "in the data: URL" if isinstance(source, bytes) else str(source)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
