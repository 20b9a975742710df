"""A picture of a sweep of learning rates, as SVG."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING
from xml.sax.saxutils import escape

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from drivetrain_plugins.schedule._lr_find import Sweep

WIDTH, HEIGHT = 720, 440
LEFT, RIGHT, TOP, BOTTOM = 76, 24, 48, 64
GREY, RAW, LINE = "#6b7280", "#b8c4d6", "#1d4ed8"
MARKS = {"steepest": "#c2410c", "tenth": "#15803d"}
HALO = 'stroke="white" stroke-width="3" paint-order="stroke"'


def plot(sweep: Sweep, title: str = "Learning rate range test") -> str:
    """Return an SVG of the losses over the rates, on a logarithmic axis, with the suggested rates marked."""
    shown = [i for i, loss in enumerate(sweep.smoothed) if math.isfinite(loss) and math.isfinite(sweep.losses[i])]
    rates = [sweep.rates[i] for i in shown] or [1e-7, 1.0]
    raw, smooth = [sweep.losses[i] for i in shown] or [0.0, 1.0], [sweep.smoothed[i] for i in shown] or [0.0, 1.0]
    low, high = math.log10(min(rates)), math.log10(max(rates))
    high = high if high > low else low + 1
    bottom, top = _range(raw, smooth)

    def x(rate: float) -> float:
        return LEFT + (math.log10(rate) - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def y(loss: float) -> float:
        share = min(1.0, max(0.0, (loss - bottom) / (top - bottom)))  # a diverged loss leaves through the top
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    size = f'viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" font-family="sans-serif" font-size="12">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="26" font-size="15" font-weight="bold">{escape(title)}</text>',
        *_axes(x, y, (low, high), (bottom, top)),
        _line(rates, raw, x, y, RAW, 1),
        _line(rates, smooth, x, y, LINE, 2),
        *_legend(),
        *_marks(sweep, rates, smooth, x, y),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _range(raw: Sequence[float], smooth: Sequence[float]) -> tuple[float, float]:
    """Return the losses between which the picture is: all up to the minimum; what diverges leaves through the top."""
    until = min(range(len(smooth)), key=smooth.__getitem__) + 1
    bottom, top = min(*raw, *smooth), max(*raw[:until], *smooth[:until])
    room = 0.05 * (top - bottom)
    return (bottom - room, top + room) if top > bottom else (bottom - 1, bottom + 1)


def ticks(low: float, high: float, count: int = 6) -> list[float]:
    """Return about `count` round numbers from `low` to `high`."""
    rough = (high - low) / count
    unit: float = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * times for times in (1, 2, 5, 10) if unit * times >= rough * 0.999)
    return [n * step for n in range(math.ceil(low / step), math.floor(high / step + 1e-9) + 1)]


def _axes(
    x: Callable[[float], float], y: Callable[[float], float], decades: tuple[float, float], losses: tuple[float, float]
) -> list[str]:
    floor, ceiling, end = HEIGHT - BOTTOM, TOP, WIDTH - RIGHT
    parts = []
    for loss in ticks(*losses):
        at = y(loss)
        parts.append(f'<path d="M{LEFT} {at:.1f}H{end}" stroke="#e5e7eb"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{at + 4:.1f}" text-anchor="end" fill="{GREY}">{loss:.6g}</text>')
    for decade in range(math.ceil(decades[0] - 1e-9), math.floor(decades[1] + 1e-9) + 1):
        at = x(10.0**decade)
        parts.append(f'<path d="M{at:.1f} {ceiling}V{floor + 5}" stroke="#e5e7eb"/>')
        parts.append(f'<path d="M{at:.1f} {floor}v5" stroke="{GREY}"/>')
        parts.append(f'<text x="{at:.1f}" y="{floor + 20}" text-anchor="middle" fill="{GREY}">1e{decade}</text>')
    if not any(part.startswith("<text") and ">1e" in part for part in parts):  # less than a decade, and no power in it
        for log in decades:
            at = x(10.0**log)
            parts.append(
                f'<text x="{at:.1f}" y="{floor + 20}" text-anchor="middle" fill="{GREY}">{10.0**log:.2g}</text>'
            )
    middle = (ceiling + floor) / 2
    return [
        *parts,
        f'<path d="M{LEFT} {ceiling}V{floor}H{end}" fill="none" stroke="{GREY}"/>',
        f'<text x="{(LEFT + end) / 2:.1f}" y="{floor + 42}" text-anchor="middle">learning rate</text>',
        f'<text transform="rotate(-90 20 {middle:.1f})" x="20" y="{middle:.1f}" text-anchor="middle">loss</text>',
    ]


def _line(  # noqa: PLR0917 - one after the other, as they are drawn
    rates: Sequence[float],
    losses: Sequence[float],
    x: Callable[[float], float],
    y: Callable[[float], float],
    colour: str,
    width: int,
) -> str:
    points = " ".join(f"{x(rate):.1f},{y(loss):.1f}" for rate, loss in zip(rates, losses, strict=True))
    return f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="{width}" stroke-linejoin="round"/>'


def _legend() -> list[str]:
    at, parts = WIDTH - RIGHT - 150, []
    for name, colour, width in (("loss", RAW, 1), ("smoothed", LINE, 2)):
        parts.append(f'<path d="M{at} 22h18" stroke="{colour}" stroke-width="{width + 1}"/>')
        parts.append(f'<text x="{at + 24}" y="26" fill="{GREY}">{name}</text>')
        at += 64
    return parts


def _marks(
    sweep: Sweep,
    rates: Sequence[float],
    smooth: Sequence[float],
    x: Callable[[float], float],
    y: Callable[[float], float],
) -> list[str]:
    parts = []
    names = {"steepest": "steepest descent", "tenth": "a tenth of the minimum"}
    for row, (name, rate) in enumerate((("steepest", sweep.steepest), ("tenth", sweep.tenth))):
        if rate is None or not min(rates) <= rate <= max(rates):
            continue
        colour, at = MARKS[name], x(rate)
        loss = smooth[min(range(len(rates)), key=lambda i: abs(math.log(rates[i] / rate)))]
        anchor, shift = ("start", 6) if at < WIDTH / 2 else ("end", -6)
        height = HEIGHT - BOTTOM - 12 - 18 * row
        place = f'x="{at + shift:.1f}" y="{height}" text-anchor="{anchor}"'
        parts += [
            f'<path d="M{at:.1f} {TOP}V{HEIGHT - BOTTOM}" stroke="{colour}" stroke-dasharray="4 3"/>',
            f'<circle cx="{at:.1f}" cy="{y(loss):.1f}" r="4" fill="{colour}"/>',
            f'<text {place} fill="{colour}" {HALO}>{names[name]}: {rate:.2g}</text>',
        ]
    return parts
