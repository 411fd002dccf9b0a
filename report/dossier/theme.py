"""The figures' colours in the page's dark theme, as CSS rules made from the palette.

matplotlib writes colours into ``style`` attributes. Rules that match those attributes recolour the
very same SVG on a dark screen; paper, PDF and light screens see it untouched.
"""

from __future__ import annotations

from report.plots import palette, style

DARK_FURNITURE = {
    style.INK: "#e7eaee",
    style.MUTED: "#a3abb5",
    style.GRID: "#333941",
    style.PAPER: "#15181d",
    style.SHADE: "#262c34",
    style.WARNING_INK: "#ffcf7d",
    style.WARNING_PAPER: "#3b2c0e",
    palette.STATES["unsupported"].fill: "#1d2127",
    palette.STATES["unsupported"].ink: "#aab1ba",
}


def dark_colours() -> dict[str, str]:
    """Light -> dark for everything a figure may be drawn in; a state's cell keeps its colours."""
    looks = [*palette.LOOKS.values(), *palette.FAMILIES.values(), palette.OTHER]
    looks += palette.ARM_LOOKS.values()
    return {look.colour: look.dark for look in looks} | dict(palette.KERNEL_CLASSES.values()) | DARK_FURNITURE


def dark_rules() -> str:
    """One rule per colour and property, under the class of the figures; a hatch has its colours as attributes."""
    return "\n".join(
        f'.plot svg [style*="{name}: {light}"],.plot svg [{name}="{light}"]{{{name}:{dark}!important}}'
        for light, dark in dark_colours().items()
        for name in ("fill", "stroke")
    )
