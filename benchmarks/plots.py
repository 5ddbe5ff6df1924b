"""Pictures that are small, and the same bytes whenever they are drawn from the same numbers."""

import io
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from PIL import Image

DPI, PALETTE = 80, 32


def save(figure: Any, file: Path) -> None:
    """Write a picture as a PNG with a palette: for so many lines and points a fraction of an SVG."""
    file.parent.mkdir(parents=True, exist_ok=True)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=DPI, metadata={"Software": None})
    plt.close(figure)
    # This method keeps the colours of thin lines; the default one gives most of the palette to shades of white.
    picture = Image.open(drawn).convert("RGB").quantize(PALETTE, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    picture.save(file, optimize=True)
