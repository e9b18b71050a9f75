"""A colour for each class, the same in every picture."""

import colorsys

Colour = tuple[int, int, int]


def colour_of(label: int, classes: int) -> Colour:
    """Colours as far apart as may be: hues in turn around the circle, light and dark by turns."""
    hue = label / max(classes, 1) if classes <= 12 else label * 0.618034 % 1  # the golden ratio: neighbours differ
    red, green, blue = colorsys.hls_to_rgb((hue + 0.08) % 1, (0.55, 0.42)[label % 2], 0.85)
    return round(255 * red), round(255 * green), round(255 * blue)
