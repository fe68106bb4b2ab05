"""A plot as a PNG file, with the standard library alone: panels one below the other, over one axis of time. Pure.

The format needs zlib and twenty lines, the letters fifty small ones: less than
a dependency that has to be kept up to date. Names and numbers are written in
capitals of three by five pixels, doubled.
"""

import struct
import zlib
from collections.abc import Iterator, Sequence

from attrs import define, field, frozen

Colour = tuple[int, int, int]
WHITE, BLACK, GREY = (255, 255, 255), (40, 40, 40), (220, 220, 220)
COLOURS: Sequence[Colour] = ((31, 119, 180), (214, 39, 40), (44, 160, 44), (148, 103, 189))
_WIDTH, _PANEL_HEIGHT = 900, 150
_LEFT, _RIGHT, _TOP, _BOTTOM = 90, 20, 26, 24
_SCALE = 2
_STEP = 4 * _SCALE
# Five rows of three pixels, each row an octal digit.
_GLYPHS = {
    "0": "75557",
    "1": "26227",
    "2": "71747",
    "3": "71717",
    "4": "55711",
    "5": "74717",
    "6": "74757",
    "7": "71122",
    "8": "75757",
    "9": "75717",
    ".": "00002",
    ",": "00024",
    "-": "00700",
    "/": "11244",
    "%": "51245",
    ":": "02020",
    "(": "12221",
    ")": "42224",
    "A": "25755",
    "B": "65656",
    "C": "34443",
    "D": "65556",
    "E": "74647",
    "F": "74644",
    "G": "34553",
    "H": "55755",
    "I": "72227",
    "J": "11152",
    "K": "55655",
    "L": "44447",
    "M": "57755",
    "N": "65555",
    "O": "25552",
    "P": "65644",
    "Q": "25573",
    "R": "65655",
    "S": "34216",
    "T": "72222",
    "U": "55557",
    "V": "55552",
    "W": "55775",
    "X": "55255",
    "Y": "55222",
    "Z": "71247",
    " ": "00000",
}


def png(width: int, height: int, pixels: bytes) -> bytes:
    """A PNG file of *pixels*: three bytes each, row by row from the top."""
    stride = 3 * width
    if len(pixels) != stride * height:
        raise ValueError(f"{len(pixels)} bytes are not {width} x {height} pixels")
    rows = b"".join(b"\0" + pixels[row * stride : (row + 1) * stride] for row in range(height))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(rows, 9)) + _chunk(b"IEND")


def _chunk(kind: bytes, data: bytes = b"") -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@define(eq=False)
class Canvas:
    """Pixels to be drawn on; what is beyond the edge is left out."""

    width: int
    height: int
    pixels: bytearray = field(init=False)

    @pixels.default
    def _blank(self) -> bytearray:
        return bytearray(bytes(WHITE) * (self.width * self.height))

    def dot(self, x: int, y: int, colour: Colour) -> None:
        """One pixel."""
        if 0 <= x < self.width and 0 <= y < self.height:
            at = 3 * (y * self.width + x)
            self.pixels[at : at + 3] = bytes(colour)

    def line(self, start: tuple[int, int], end: tuple[int, int], colour: Colour) -> None:
        """From *start* to *end*."""
        (x0, y0), (x1, y1) = start, end
        steps = max(abs(x1 - x0), abs(y1 - y0), 1)
        for step in range(steps + 1):
            self.dot(x0 + round((x1 - x0) * step / steps), y0 + round((y1 - y0) * step / steps), colour)

    def text(self, x: int, y: int, text: str, colour: Colour = BLACK) -> None:
        """In capitals, from the upper left; what has no glyph is a gap."""
        for number, letter in enumerate(text.upper()):
            for row, digit in enumerate(_GLYPHS.get(letter, _GLYPHS[" "])):
                for column in range(3):
                    if int(digit) >> (2 - column) & 1:
                        self._square(x + number * _STEP + column * _SCALE, y + row * _SCALE, colour)

    def _square(self, x: int, y: int, colour: Colour) -> None:
        for across in range(_SCALE):
            for down in range(_SCALE):
                self.dot(x + across, y + down, colour)


@frozen
class Line:
    """Values over time, in the order of their times; a value that is None is a gap."""

    name: str
    values: Sequence[float | None]


@frozen
class Panel:
    """Lines over one axis that begins at zero."""

    title: str
    lines: Sequence[Line]

    @property
    def top(self) -> float:
        """Where the axis ends: a round number that nothing exceeds."""
        most = max((value for line in self.lines for value in line.values if value is not None), default=0.0)
        return round_up(most)


def round_up(value: float) -> float:
    """The next of 1, 2, 5, 10, 20, ... and their tenths, hundredths and so on; 1 for zero."""
    if value <= 0:
        return 1.0
    power = 1.0
    while power > value:
        power /= 10
    while power * 10 <= value:
        power *= 10
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= value)


def plot(times: Sequence[float], panels: Sequence[Panel], unit: str) -> bytes:
    """*panels* over *times*, which ascend, as a PNG file."""
    canvas = Canvas(_WIDTH, _PANEL_HEIGHT * len(panels))
    for number, panel in enumerate(panels):
        _draw(canvas, _PANEL_HEIGHT * number, times, panel, unit)
    return png(canvas.width, canvas.height, bytes(canvas.pixels))


def _draw(canvas: Canvas, above: int, times: Sequence[float], panel: Panel, unit: str) -> None:
    top, bottom, right = above + _TOP, above + _PANEL_HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    for part in range(5):
        y = bottom - (bottom - top) * part // 4
        canvas.line((_LEFT, y), (right, y), BLACK if part == 0 else GREY)
        canvas.text(4, y - 5, f"{panel.top * part / 4:g}")
    canvas.text(_LEFT, above + 8, panel.title)
    canvas.text(_LEFT, bottom + 8, f"{times[0]:.0f}")
    last = f"{times[-1]:.0f} {unit}"
    canvas.text(right - _STEP * len(last), bottom + 8, last)
    legend = _LEFT + _STEP * (len(panel.title) + 4)
    for line, colour in zip(panel.lines, COLOURS, strict=False):
        canvas.text(legend, above + 8, line.name, colour)
        legend += _STEP * (len(line.name) + 3)
        for start, end in _strokes(times, line, (top, bottom, right), panel.top):
            canvas.line(start, end, colour)


def _strokes(
    times: Sequence[float], line: Line, edges: tuple[int, int, int], most: float
) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    top, bottom, right = edges
    span = (times[-1] - times[0]) or 1.0
    before: tuple[int, int] | None = None
    for at, value in zip(times, line.values, strict=True):
        if value is None:
            before = None
            continue
        x = _LEFT + round((right - _LEFT) * (at - times[0]) / span)
        point = (x, bottom - round((bottom - top) * value / most))
        yield before or point, point
        before = point
