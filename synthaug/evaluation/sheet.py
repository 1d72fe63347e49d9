"""Real beside synthetic to look at: one self-contained HTML page, and a contact sheet as PNG.

The page needs no network, no script and no other file: pictures are inline PNG, plots inline SVG, the switch between image,
outlines and labels is CSS. A volume is shown as three orthogonal planes at true aspect: xy, below it xz, beside it yz.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from html import escape
from itertools import zip_longest
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from synthaug.datasets.pictures import GAMMA, Bytes, grey, label_colours, orthogonal_views, outlines, panel
from synthaug.evaluation.realism import RealismReport, cell_tables
from synthaug.evaluation.tiles import (
    MIN_TILE,
    TILE,
    Pair,
    VoxelSize,
    check_sets,
    common_shape,
    cut_tiles,
)
from synthaug.generators.stage import write_atomic

HISTOGRAMS = ("area", "eccentricity", "intensity", "density", "nearest_neighbour")
"""The properties the page plots of frames, and of volumes that are not annotated in all planes."""

VOLUME_HISTOGRAMS = ("volume", "sphericity", "elongation", "z_extent", "intensity", "density", "nearest_neighbour")
"""Those it plots of volumes."""

_GAP = 8
_SEAM_GREY = 72
"""Grey between them on the page, which may be dark or bright."""


def display_range(pairs: Sequence[Pair]) -> tuple[float, float]:
    """Counts shown as black and as white: 0.5 % quantile, and the 90 % quantile of the frames' 99.9 % quantiles."""
    low, high = np.transpose([np.percentile(image, (0.5, 99.9)) for image, _ in pairs])
    black, white = float(np.median(low)), float(np.percentile(high, 90))
    return black, white if white > black else black + 1.0


def _show(pair: Pair, draw: Callable[[Pair], Bytes], voxel_size_um: VoxelSize | None, fill: int = 0) -> Bytes:
    """A frame as `draw` draws it, a volume as the panel of its three planes."""
    if pair[0].ndim == 2:
        return draw(pair)
    return panel({name: draw(view) for name, view in orthogonal_views(pair, voxel_size_um).items()}, fill)


def _png(pixels: Bytes) -> bytes:
    import imageio.v3 as iio

    data: bytes = iio.imwrite("<bytes>", pixels, extension=".png")
    return data


def _picture(kind: str, pixels: Bytes, text: str) -> str:
    height, width = pixels.shape[:2]
    source = base64.b64encode(_png(pixels)).decode()
    return (
        f'<img class="{kind}" width="{width}" height="{height}" alt="{escape(text)}" '
        f'src="data:image/png;base64,{source}">'
    )


def _frame(
    pair: Pair | None, limits: tuple[float, float], kind: str, number: int, voxel_size_um: VoxelSize | None
) -> str:
    if pair is None:
        return f'<div class="frame {kind} none"></div>'
    text = f"{kind} frame {number}"
    pictures = {
        "image": (_show(pair, lambda view: grey(view[0], limits), voxel_size_um, _SEAM_GREY), text),
        "outlines": (_show(pair, lambda view: outlines(view[1]), voxel_size_um), f"{text}, outlines"),
        "labels": (_show(pair, lambda view: label_colours(view[1]), voxel_size_um), f"{text}, labels"),
    }
    return (
        f'<div class="frame {kind}"><div class="stack">'
        + "".join(_picture(view, *shown) for view, shown in pictures.items())
        + f"</div><p>{kind} {number} · {int(pair[1].max())} cells</p></div>"
    )


def _number(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def histogram_svg(name: str, unit: str, real: NDArray[np.float64], synthetic: NDArray[np.float64]) -> str:
    """Two step histograms of equal area over common bins, as inline SVG.

    The range is the 0.5-99.5 % range of both; what lies outside is left out of the plot, not of the counts in the caption.
    """
    title = name.replace("_", " ")
    head = f"<figure><figcaption><b>{title}</b> <span>{escape(unit)}</span></figcaption>"
    counts = f"n {len(real)} | {len(synthetic)}"
    if not len(real) or not len(synthetic):
        return f"{head}<p>Too few whole cells to plot ({counts}).</p></figure>"
    ends = np.percentile(np.concatenate([real, synthetic]), (0.5, 99.5))
    low, high = float(ends[0]), float(ends[1])
    if high - low < 1e-9:
        low, high = low - 0.5, high + 0.5
    # Few values want few bins: one a tile is all the density has.
    edges = np.linspace(low, high, int(np.clip(2 * min(len(real), len(synthetic)) ** (1 / 3), 6, 28)) + 1)
    shares = [np.histogram(v, edges)[0] / len(v) for v in (real, synthetic)]
    top = max(float(max(s.max() for s in shares)), 1e-9)
    width, height, left, base = 300.0, 150.0, 6.0, 128.0
    across = (width - 2 * left) / (len(edges) - 1)
    paths = []
    for kind, share in zip(("real", "synthetic"), shares):
        steps = [f"M{left:.1f} {base:.1f}"]
        for i, value in enumerate(share):
            y = base - 116 * value / top
            steps.append(f"V{y:.1f}H{left + (i + 1) * across:.1f}")
        steps.append(f"V{base:.1f}")
        paths.append(f'<path class="{kind}" d="{"".join(steps)}"/>')
    ticks = []
    for at, anchor in ((0.0, "start"), (0.5, "middle"), (1.0, "end")):
        x = left + at * (width - 2 * left)
        ticks.append(f'<path class="tick" d="M{x:.1f} {base:.1f}v4"/>')
        label = _number(low + at * (high - low))
        ticks.append(f'<text x="{x:.1f}" y="{height - 5:.0f}" text-anchor="{anchor}">{label}</text>')
    medians = f"median {_number(float(np.median(real)))} | {_number(float(np.median(synthetic)))}"
    return (
        f'{head}<svg viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{title}, real | synthetic: {medians}">'
        f'<path class="tick" d="M{left:.1f} {base:.1f}H{width - left:.1f}"/>'
        + "".join([*paths, *ticks])
        + f"</svg><p>{medians}, {counts}</p></figure>"
    )


_STYLE = """
:root{color-scheme:light dark;--page:#fbfbfa;--text:#1d1d1f;--soft:#5f6368;--line:#d9d9d6;--card:#fff;
--real:#1f6fb8;--synthetic:#c4570a}
@media(prefers-color-scheme:dark){:root{--page:#151617;--text:#ececea;--soft:#a3a7ab;--line:#383a3c;--card:#1e1f21;
--real:#6cb2f2;--synthetic:#f0964a}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1500px;padding:1rem clamp(.75rem,3vw,2.5rem) 3rem;background:var(--page);color:var(--text);
font:16px/1.5 system-ui,sans-serif}
h1{font-size:1.5rem;line-height:1.25;margin:.5rem 0}h2{font-size:1.1rem;margin:2rem 0 .6rem}
p,li,h1{overflow-wrap:anywhere}.soft,figure p,.frame p,figcaption span{color:var(--soft);font-size:.85rem}
.view{position:absolute;opacity:0}
.switch{display:flex;flex-wrap:wrap;gap:.4rem;align-items:center;position:sticky;top:0;z-index:2;padding:.6rem 0;
background:var(--page)}
.switch label{border:1px solid var(--line);border-radius:999px;padding:.25rem .9rem;cursor:pointer;background:var(--card)}
#view-image:checked~.switch [for=view-image],#view-outlines:checked~.switch [for=view-outlines],
#view-labels:checked~.switch [for=view-labels]{background:var(--text);color:var(--page);border-color:var(--text)}
.view:focus-visible~.switch label{outline:2px solid var(--real);outline-offset:2px}
.pairs{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,26rem),1fr));gap:1.2rem}
.pair{display:grid;grid-template-columns:1fr 1fr;gap:.4rem}
.stack{position:relative;line-height:0;background:#000}
.stack img{width:100%;height:auto}
.stack .outlines,.stack .labels{position:absolute;inset:0;visibility:hidden}
#view-outlines:checked~.pairs .outlines,#view-labels:checked~.pairs .labels{visibility:visible}
#view-labels:checked~.pairs .image{visibility:hidden}
.frame p{margin:.2rem 0 0;border-top:3px solid var(--line)}
.frame.real p{border-color:var(--real)}.frame.synthetic p{border-color:var(--synthetic)}
.plots{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,15rem),1fr));gap:1rem}
figure{margin:0;padding:.8rem;border:1px solid var(--line);border-radius:.5rem;background:var(--card)}
figure p{margin:.2rem 0 0}svg{display:block;width:100%;height:auto}
svg text{fill:var(--soft);font:11px system-ui,sans-serif}
svg path{fill:none;stroke-width:1.8}svg .tick{stroke:var(--line);stroke-width:1}
svg .real{stroke:var(--real);fill:var(--real);fill-opacity:.22}svg .synthetic{stroke:var(--synthetic)}
.key b{font-weight:600}.key .real{color:var(--real)}.key .synthetic{color:var(--synthetic)}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:.28rem clamp(.4rem,1.5vw,1rem) .28rem 0;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
th:first-child,td:first-child{text-align:left;font-weight:400;white-space:normal;min-width:6.5rem}
thead th,thead th:first-child{font-weight:600;vertical-align:bottom;white-space:normal}
@media(max-width:32rem){table{font-size:.85rem}}
pre{overflow-x:auto;padding:.8rem;border:1px solid var(--line);border-radius:.5rem;background:var(--card);
font-size:.85rem}
ul{padding-left:1.2rem}
"""


_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

_KEY = """<p class="key"><b class="real">■ real</b> &nbsp; <b class="synthetic">□ synthetic</b>
<span class="soft">whole cells of all tiles, equal areas; medians and numbers as real | synthetic</span></p>"""


def _report_section(report: RealismReport) -> str:
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th>' + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>"
        for name, *cells in report.rows()
    )
    notes = "".join(f"<li>{escape(note)}</li>" for note in report.notes())
    return (
        '<h2>Numbers</h2><div class="scroll"><table><thead><tr><th scope="col">Distance</th>'
        '<th scope="col">real–real</th><th scope="col">real–synthetic</th><th scope="col">ratio</th></tr></thead>'
        f'<tbody>{rows}</tbody></table></div><ul class="soft">{notes}</ul>'
    )


def _extra_section(extra: str | Mapping[str, object]) -> str:
    if isinstance(extra, str):
        return f"<h2>More</h2><pre>{escape(extra)}</pre>"
    rows = "".join(f'<tr><th scope="row">{escape(k)}</th><td>{escape(str(v))}</td></tr>' for k, v in extra.items())
    return f'<h2>More</h2><div class="scroll"><table><tbody>{rows}</tbody></table></div>'


def _common_tile(
    real_pairs: Sequence[Pair], synthetic_pairs: Sequence[Pair], voxel_size_um: VoxelSize | None
) -> tuple[int, ...]:
    check_sets({"real_pairs": real_pairs, "synthetic_pairs": synthetic_pairs}, voxel_size_um)
    shape = common_shape([real_pairs, synthetic_pairs])
    side = min(TILE, *shape[-2:])
    return (*(min(TILE, depth) for depth in shape[:-2]), side, side)


def write_sheet(
    out_html: str | Path,
    real_pairs: Sequence[Pair],
    synthetic_pairs: Sequence[Pair],
    *,
    title: str,
    report: RealismReport | None = None,
    extra: str | Mapping[str, object] | None = None,
    num: int = 12,
    voxel_size_um: VoxelSize | None = None,
) -> None:
    """Write a static HTML page with real beside synthetic frames, histograms and numbers.

    All frames are shown at the same contrast, fixed by the real ones: the page names the range. Frames are cut to tiles of
    one size, 256 px or the smallest side of all frames; the middle tile of each is shown, the histograms use all of them.
    Of a volume's middle tile those planes are shown that pass through most of the cells.

    Args:
        out_html: File to write; its folder is created. A crash leaves either the old page or the new one.
        real_pairs: (image float32 [(Z,) Y, X] in counts, labels int32 of the same shape).
        synthetic_pairs: The same, synthetic.
        title: Heading of the page.
        report: Its numbers become a table.
        extra: Text, or names and values, put at the end.
        num: Frames of either kind that are shown at most.
        voxel_size_um: (Z, Y, X) of all volumes; None: voxels are shown as cubes.

    Raises:
        InputError: A list is empty, images and labels do not fit, or frames and volumes are mixed.
    """
    tile = _common_tile(real_pairs, synthetic_pairs, voxel_size_um)
    limits = display_range(real_pairs)
    shown = [[cut_tiles([pair], tile) for pair in pairs[:num]] for pairs in (real_pairs, synthetic_pairs)]
    middle = [[tiles[len(tiles) // 2] for tiles in group] for group in shown]
    figures = [
        f'<div class="pair">{_frame(a, limits, "real", i, voxel_size_um)}'
        f"{_frame(b, limits, 'synthetic', i, voxel_size_um)}</div>"
        for i, (a, b) in enumerate(zip_longest(*middle), start=1)
    ]
    (real, synthetic), units = cell_tables([real_pairs, synthetic_pairs], tile, voxel_size_um)
    names = VOLUME_HISTOGRAMS if "volume" in real else HISTOGRAMS
    plots = [histogram_svg(name, units[name], real[name], synthetic[name]) for name in names]
    views = (("image", "Image"), ("outlines", "Outlines"), ("labels", "Labels"))
    radios = "".join(
        f'<input class="view" type="radio" name="view" id="view-{view}"{" checked" if view == "image" else ""}>'
        for view, _ in views
    )
    buttons = "".join(f'<label for="view-{view}">{text}</label>' for view, text in views)
    sides = str(tile[0]) if len(tile) == 2 else " x ".join(map(str, tile))
    contrast = (
        f"Tiles of {sides} px. All at the same contrast: black {_number(limits[0])}, white {_number(limits[1])} counts, "
        f"gamma {GAMMA}."
    )
    if len(tile) == 3:
        contrast += " Of each volume three planes through its cells: xy, below it xz, beside it yz."
    page = [
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width,initial-scale=1">',
        # No source but this file: a page that tried to fetch anything would be stopped by the browser.
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
        f'<title>{escape(title)}</title><link rel="icon" href="data:,"><style>{_STYLE}</style></head><body>',
        f"<h1>{escape(title)}</h1>",
        f'<p class="soft">{contrast}</p>',
        f"<h2>Frames</h2>{radios}",
        f'<div class="switch">{buttons}</div><div class="pairs">{"".join(figures)}</div>',
        f"<h2>Distributions</h2>{_KEY}",
        f'<div class="plots">{"".join(plots)}</div>',
        _report_section(report) if report is not None else "",
        _extra_section(extra) if extra else "",
        "</body></html>\n",
    ]
    path = Path(out_html)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, "".join(page).encode())


def _heading(text: str, width: int, height: int) -> Bytes:
    """uint8 [height, width]: dark text on white."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / 100, height / 100), dpi=100, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    figure.text(0.0, 0.3, text, fontsize=0.36 * height, color="black")
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[:height, :width, 0].copy()


def write_contact_sheet(
    out_png: str | Path,
    real_pairs: Sequence[Pair],
    synthetic_pairs: Sequence[Pair],
    num: int = 20,
    voxel_size_um: VoxelSize | None = None,
) -> None:
    """Write `num` real frames (left) and `num` synthetic ones (right) as one grey PNG at the same contrast.

    Args:
        out_png: File to write; its folder is created. A crash leaves either the old picture or the new one.
        real_pairs: (image float32 [(Z,) Y, X] in counts, labels int32 of the same shape); the middle 256 px tile of the
            first `num`, of volumes the three planes that pass through most of its cells.
        synthetic_pairs: The same, synthetic.
        num: Frames of either kind at most; fewer leave white places.
        voxel_size_um: (Z, Y, X) of all volumes; None: voxels are shown as cubes.

    Raises:
        InputError: A list is empty, images and labels do not fit, or frames and volumes are mixed.
    """
    tile = _common_tile(real_pairs, synthetic_pairs, voxel_size_um)
    limits = display_range(real_pairs)
    shown: list[list[Bytes]] = []
    for pairs in (real_pairs, synthetic_pairs):
        tiles = [cut_tiles([pair], tile) for pair in pairs[:num]]
        middle = [group[len(group) // 2] for group in tiles]
        shown.append([_show(pair, lambda view: grey(view[0], limits), voxel_size_um, 255) for pair in middle])
    height, width = shown[0][0].shape
    most = max(map(len, shown))
    columns = max(min(4, most), 1)
    rows = -(-most // columns)
    down, across, margin, head = height + _GAP, width + _GAP, 3 * _GAP, max(height // 5, MIN_TILE // 2)
    blocks = []
    for text, pictures in zip(("real", "synthetic"), shown):
        block = np.full((head + rows * down, columns * across), 255, np.uint8)
        block[:head] = _heading(text, columns * across, head)
        for i, picture in enumerate(pictures):
            top, left = head + i // columns * down, i % columns * across
            block[top : top + height, left : left + width] = picture
        blocks.append(block)
    page = np.pad(np.concatenate([blocks[0], np.full((len(blocks[0]), margin), 255, np.uint8), blocks[1]], 1), _GAP)
    page[:_GAP], page[-_GAP:], page[:, :_GAP], page[:, -_GAP:] = 255, 255, 255, 255
    path = Path(out_png)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, _png(page))
