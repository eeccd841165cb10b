"""Colours of experts and methods that the colour-blind can tell apart."""

from __future__ import annotations

import colorsys

# Okabe and Ito's eight, the black one last.
OKABE_ITO = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")


def expert_colors(count: int) -> list[str]:
    """A colour for each of so many experts; beyond eight, hues at two brightnesses, which numbers must support."""
    if count <= len(OKABE_ITO):
        return list(OKABE_ITO[:count])
    colors = []
    for number in range(count):
        hue = (number * 0.618034) % 1  # neighbours in number are far apart in hue
        red, green, blue = colorsys.hls_to_rgb(hue, (0.38, 0.62)[number % 2], 0.7)
        colors.append(f"#{round(red * 255):02x}{round(green * 255):02x}{round(blue * 255):02x}")
    return colors


def ink_on(color: str) -> str:
    """Black or white, whichever is easier to read on a colour (WCAG's relative luminance)."""
    channels = [int(color[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [value / 12.92 if value <= 0.03928 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    luminance = sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
    return "#000000" if luminance > 0.179 else "#ffffff"
