"""Draw the charges and the digits into src/mbq/world: strips of grey masks, 48 of 22x22, 10 of 9x15 pixels.

    python training/charges.py

The strips are committed, so that pictures do not depend on the font or on the version of a rasteriser. Glyphs: DejaVu
Sans (free licence), as shipped with matplotlib.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont

from mbq.world.facts import CHARGES

SIZE, DRAWN = 22, 176
DIGIT_SIZE = (9, 15)
TARGET = Path(__file__).parents[1] / "src" / "mbq" / "world"


def mask(character: str, font: ImageFont.FreeTypeFont, width: int, height: int) -> np.ndarray:
    """One character, cut to its ink, fitted into width x height and centred; 255 is ink."""
    canvas = Image.new("L", (3 * DRAWN, 3 * DRAWN), 0)
    ImageDraw.Draw(canvas).text((DRAWN, DRAWN), character, font=font, fill=255)
    ink = canvas.crop(canvas.getbbox())
    factor = min(width / ink.width, height / ink.height)
    ink = ink.resize((max(1, round(ink.width * factor)), max(1, round(ink.height * factor))), Image.Resampling.LANCZOS)
    cell = Image.new("L", (width, height), 0)
    cell.paste(ink, ((width - ink.width) // 2, (height - ink.height) // 2))
    return np.asarray(cell)


def main() -> None:
    font = ImageFont.truetype(font_manager.findfont("DejaVu Sans"), DRAWN)
    bold = ImageFont.truetype(font_manager.findfont("DejaVu Sans:bold"), DRAWN)
    strip = np.concatenate([mask(chr(code), font, SIZE, SIZE) for code in CHARGES.values()], axis=1)
    Image.fromarray(strip).save(TARGET / "charges.png", optimize=True)
    digits = np.concatenate([mask(str(digit), bold, *DIGIT_SIZE) for digit in range(10)], axis=1)
    Image.fromarray(digits).save(TARGET / "digits.png", optimize=True)


if __name__ == "__main__":
    main()
