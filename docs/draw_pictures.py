"""Draws the pictures of the documentation: ``python docs/draw_pictures.py`` writes ``docs/pictures/*.svg``.

They are plain SVG, whose colors follow the reader's light or dark setting. A test compares the files with what this
draws.
"""

import html
import pathlib

FOLDER = pathlib.Path(__file__).parent / "pictures"
STYLE = """
  svg { --ink: #1c2330; --soft: #5b6577; --line: #9aa4b5; --paper: #ffffff; --token: #e7ecf5; --row: #cfe3ff;
        --hot: #ffd9a8; --gate: #d5f0dc; font-family: system-ui, sans-serif; }
  @media (prefers-color-scheme: dark) {
    svg { --ink: #e8ecf4; --soft: #a4aec0; --line: #66718a; --paper: #1b2029; --token: #2b3342; --row: #1f4473;
          --hot: #7a4b14; --gate: #1f5233; } }
  .back { fill: var(--paper); }
  text { fill: var(--ink); font-size: 14px; text-anchor: middle; dominant-baseline: central; }
  .soft { fill: var(--soft); font-size: 12px; }
  .left { text-anchor: start; }
  .mono { font-family: ui-monospace, monospace; font-size: 13px; }
  .box { stroke: var(--line); }
  .token { fill: var(--token); } .row { fill: var(--row); } .hot { fill: var(--hot); } .gate { fill: var(--gate); }
  .none { fill: none; }
  .arrow { stroke: var(--soft); stroke-width: 1.5; fill: none; marker-end: url(#head); }
  .hint { stroke: var(--line); stroke-dasharray: 4 4; fill: none; }
  #head path { fill: var(--soft); }
"""


class Picture:
    """An SVG that is put together piece by piece; numbers are pixels."""

    def __init__(self, width: int, height: int, about: str) -> None:
        self.size, self.about, self.parts = (width, height), about, list[str]()

    def box(
        self, x: int, y: int, width: int, height: int, text: str = "", kind: str = "token", words: str = ""
    ) -> None:
        """A rounded box with a text in its middle; ``words`` are classes of the text."""
        self.parts.append(f'<rect class="box {kind}" x="{x}" y="{y}" width="{width}" height="{height}" rx="5"/>')
        if text:
            self.text(x + width // 2, y + height // 2, text, words)

    def text(self, x: int, y: int, text: str, words: str = "") -> None:
        """A line of text around a point."""
        self.parts.append(f'<text class="{words}" x="{x}" y="{y}">{html.escape(text)}</text>')

    def arrow(self, *points: tuple[int, int], kind: str = "arrow") -> None:
        """A line through some points, with a head at its end."""
        way = " L ".join(f"{x} {y}" for x, y in points)
        self.parts.append(f'<path class="{kind}" d="M {way}"/>')

    def svg(self) -> str:
        """The whole file."""
        width, height = self.size
        return "\n".join([
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
            f'aria-label="{html.escape(self.about)}">',
            f"<style>{STYLE}</style>",
            '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
            'orient="auto"><path d="M 0 0 L 8 4 L 0 8 z"/></marker></defs>',
            f'<rect class="back" width="{width}" height="{height}" rx="8"/>',
            *self.parts,
            "</svg>\n",
        ])  # fmt: skip


def overview() -> Picture:
    """From tokens to the hidden state."""
    draw = Picture(
        860, 330, "Tokens become N-grams, N-grams become row numbers, rows pass a gate into the hidden state"
    )
    for place, (word, canonical) in enumerate(
        [("Only", "only"), ("Alexander", "alexander"), ("the", "the"), ("Great", "great")]
    ):
        x = 30 + place * 105
        draw.box(x, 30, 95, 32, word)
        draw.arrow((x + 47, 62), (x + 47, 82))
        draw.box(x, 84, 95, 32, canonical, "token", "mono")
    draw.text(470, 46, "tokens", "soft left")
    draw.text(470, 100, "canonical tokens", "soft left")
    draw.box(240, 146, 200, 32, "the great", "hot", "mono")
    draw.box(135, 190, 305, 32, "alexander the great", "hot", "mono")
    draw.arrow((392, 116), (392, 144))
    draw.text(30, 162, "suffix N-grams of the", "soft left")
    draw.text(30, 178, "last token: 2 and 3", "soft left")
    for line, y in enumerate((162, 206)):
        for head in range(2):
            draw.box(
                500 + head * 70, y - 14, 60, 28, str([48213, 90771, 1377, 66052][line * 2 + head]), "token", "mono"
            )
        draw.arrow((440, y), (498, y))
    draw.text(565, 132, "hash heads: row numbers", "soft")
    for row in range(9):
        kind = "row" if row in (1, 3, 5, 7) else "none"
        draw.box(672, 130 + row * 14, 70, 14, "", kind)
    draw.arrow((630, 162), (670, 157))
    draw.arrow((630, 206), (670, 213))
    draw.text(707, 116, "table", "soft")
    draw.box(672, 282, 70, 30, "gate", "gate")
    draw.arrow((707, 256), (707, 280))
    draw.text(752, 268, "key, value", "soft left")
    draw.box(30, 282, 160, 30, "hidden state", "token")
    draw.box(800, 282, 30, 30, "+", "none")
    draw.arrow((190, 297), (670, 297))
    draw.arrow((742, 297), (798, 297))
    draw.text(430, 284, "the gate compares the hidden state with the key", "soft")
    return draw


def collisions() -> Picture:
    """Why several heads: two N-grams share a row in one of them."""
    draw = Picture(700, 250, "Two N-grams share a row in one head and have their own in the others")
    draw.box(20, 60, 190, 36, "alexander the great", "hot", "mono")
    draw.box(20, 160, 190, 36, "of the city", "gate", "mono")
    for head, (first, second) in enumerate([(1, 4), (3, 3), (0, 5)]):
        x = 330 + head * 120
        draw.text(x + 40, 30, f"head {head + 1}", "soft")
        for row in range(7):
            kind = "row" if row == first == second else "hot" if row == first else "gate" if row == second else "none"
            draw.box(x, 48 + row * 24, 80, 24, "both" if row == first == second else "", kind, "soft")
    draw.arrow((210, 78), (322, 84))
    draw.arrow((210, 178), (322, 156))
    draw.text(470, 232, "one row in common, in head 2: all heads together tell them apart", "soft")
    return draw


def gate() -> Picture:
    """What the gate does with a key, a value and the hidden state."""
    draw = Picture(760, 250, "The gate is high where the normalized key agrees with the normalized hidden state")
    draw.box(20, 100, 110, 34, "rows e", "row")
    draw.text(75, 150, "of all heads", "soft")
    draw.box(200, 50, 110, 34, "key W_K e", "row")
    draw.box(200, 150, 110, 34, "value W_V e", "row")
    draw.arrow((130, 110), (198, 70))
    draw.arrow((130, 124), (198, 164))
    draw.box(200, 204, 110, 34, "hidden h", "token")
    draw.box(380, 50, 130, 34, "score k · h", "gate")
    draw.arrow((310, 67), (378, 67))
    draw.arrow((310, 221), (350, 221), (350, 76), (378, 76))
    draw.box(560, 50, 170, 34, "gate α, from 0 to 1", "gate")
    draw.arrow((510, 67), (558, 67))
    draw.text(535, 104, "signed square root, then sigmoid", "soft")
    draw.box(560, 150, 170, 34, "α × value", "row")
    draw.arrow((310, 167), (558, 167))
    draw.arrow((645, 84), (645, 148))
    draw.text(645, 208, "+ short convolution, then added to h", "soft")
    return draw


def tiers() -> Picture:
    """Row numbers are known early, so rows can come from far away."""
    draw = Picture(
        760, 260, "Row numbers are known before the forward pass, so rows arrive while earlier blocks compute"
    )
    for place, (name, about) in enumerate([
        ("device", "with the weights"), ("host", "in RAM"), ("mmap", "in a file, mapped"), ("file", "in a file, read"),
        ("remote", "on another machine"),
    ]):  # fmt: skip
        x = 20 + place * 146
        draw.box(x, 24, 136, 50, "", "row")
        draw.text(x + 68, 40, name, "mono")
        draw.text(x + 68, 60, about, "soft")
    draw.text(20, 92, "fastest, smallest", "soft left")
    draw.text(650, 92, "slowest, any size", "soft left")
    draw.text(20, 130, "time", "soft left")
    draw.arrow((60, 130), (735, 130))
    draw.box(60, 150, 110, 30, "hash all tokens", "hot")
    draw.box(170, 150, 260, 30, "fetch the rows of block 6", "row")
    for block in range(6):
        draw.box(170 + block * 62, 196, 60, 30, f"block {block}", "token")
    draw.box(542, 196, 170, 30, "block 6 reads memory", "gate")
    draw.arrow((430, 165), (617, 165), (617, 194))
    draw.text(310, 244, "the rows are there before their block begins", "soft")
    return draw


PICTURES = {"overview": overview, "collisions": collisions, "gate": gate, "tiers": tiers}


def main() -> None:
    """Write all pictures."""
    FOLDER.mkdir(exist_ok=True)
    for name, draw in PICTURES.items():
        (FOLDER / f"{name}.svg").write_text(draw().svg(), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
