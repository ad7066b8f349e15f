"""index.html of a study: one page, without scripts or outside files, that can be mailed."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any

Json = dict[str, Any]
_MOST_GRIDS = 12
_MOST_ROUNDS = 100

_STYLE = """
:root { --ink:#1c2330; --soft:#5b6577; --line:#dde2ea; --paper:#fff; --ground:#f4f6f9;
  --blue:#2b62c9; --red:#c2452d; --green:#2e7d4f }
@media (prefers-color-scheme: dark) { :root { --ink:#e8ebf1; --soft:#9aa5b8; --line:#2f3747;
  --paper:#1a202c; --ground:#12161f; --blue:#7aa5f5; --red:#ee8a74; --green:#74c594 } }
* { box-sizing:border-box }
body { margin:0; background:var(--ground); color:var(--ink); font:16px/1.5 system-ui,sans-serif }
main { max-width:64rem; margin:0 auto; padding:2.5rem 1.25rem 4rem }
h1 { margin:0; font-size:1.9rem; line-height:1.2 }
h2 { margin:0 0 .8rem; font-size:1.1rem }
p { margin:.3rem 0 }
.soft { color:var(--soft) }
.bad { color:var(--red) }
section, .facts div { background:var(--paper); border:1px solid var(--line); border-radius:12px }
section { padding:1.2rem 1.4rem; margin-top:1.2rem }
.facts { display:grid; gap:1rem; margin-top:1.4rem;
  grid-template-columns:repeat(auto-fit,minmax(9rem,1fr)) }
.facts div { padding:.8rem 1rem }
.facts b { display:block; font-size:1.45rem; font-weight:600 }
.facts span { color:var(--soft); font-size:.85rem }
.charts { display:grid; grid-template-columns:repeat(auto-fit,minmax(18rem,1fr)); gap:1.2rem }
.grids { display:grid; grid-template-columns:repeat(auto-fill,minmax(17rem,1fr)); gap:1.1rem }
figure { margin:0 }
figcaption { color:var(--soft); font-size:.85rem; margin-bottom:.3rem }
svg { width:100%; height:auto; display:block }
img { max-width:100%; image-rendering:pixelated; border-radius:6px; display:block }
.wide { overflow-x:auto }
table { border-collapse:collapse; width:100%; font-size:.9rem }
th, td { text-align:right; padding:.35rem .6rem; border-bottom:1px solid var(--line);
  white-space:nowrap }
th { color:var(--soft); font-weight:500 }
.left { text-align:left; white-space:normal }
code { font:.85em ui-monospace,monospace }
a { color:var(--blue) }
"""


def shown(done: int) -> set[int]:
    """The rounds that a page shows, of so many: all, or the last fifty and fifty before them."""
    half = _MOST_ROUNDS // 2
    before = max(0, done - half)
    spread = min(half, before)
    return {*range(before + 1, done + 1), *(1 + i * before // spread for i in range(spread))}


def render(report: Json, folder: Path) -> str:
    """The page for a report with the rounds that are `shown`; pictures that lie in `folder` are put
    into it."""
    parts = [
        _head(report),
        _facts(report),
        _samples(folder),
        _charts(report["rounds"]),
        _grids(report["rounds"], folder),
        _rounds(report["rounds"], report["rounds_done"]),
        _traffic(report["bytes"]),
        _seconds(report["seconds"]),
        _files(report),
    ]
    title = escape(report["title"])
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{title}</title><style>{_STYLE}</style></head>\n"
        f"<body><main>\n{chr(10).join(part for part in parts if part)}\n</main></body></html>\n"
    )


def _head(report: Json) -> str:
    created = datetime.fromtimestamp(report["created"], UTC).strftime("%Y-%m-%d %H:%M UTC")
    roster = report["roster"]
    error = f'<p class="bad">{escape(report["error"])}</p>' if report["error"] else ""
    return (
        f"<h1>{escape(report['title'])}</h1>"
        f'<p class="soft">Study <code>{escape(report["study"])}</code>, {report["state"]}, begun '
        f"{created}. Strategy <code>{escape(report['strategy']['kind'])}</code>; "
        f"{len(roster['silos'])} silos, of which {roster['threshold']} must stay for a sum.</p>"
        f"{error}"
    )


def _facts(report: Json) -> str:
    rounds = report["rounds"]
    fids = [r["fid"] for r in rounds if "fid" in r]
    facts = [
        (f"{report['rounds_done']} of {report['rounds_planned']}", "rounds"),
        (_number(report["images"]), "images at the silos, about"),
        (_number(rounds[-1]["loss"] if rounds else None), "training loss, last round"),
    ]
    if fids:
        facts.append((_number(fids[-1]), f"FID ({escape(_network(rounds))} features)"))
    if union := report["auxiliary"]:
        facts.append((_number(union["images"]), "synthetic images in the union"))
        if "fid" in union:
            facts.append((_number(union["fid"]), "FID of these images"))
        facts.append((str(report["corrections"]), "corrections"))
    cells = "".join(f"<div><b>{value}</b><span>{name}</span></div>" for value, name in facts)
    return f'<div class="facts">{cells}</div>'


def _network(rounds: Sequence[Json]) -> str:
    found = next(r for r in rounds if "network" in r)
    return f"{found['network']} {found['network_sha256'][:8]}"


def _samples(folder: Path) -> str:
    picture = _picture(folder / "samples.png", "samples of the final model")
    return f"<section><h2>Samples of the final model</h2>{picture}</section>" if picture else ""


def _charts(rounds: Sequence[Json]) -> str:
    corrected = {r["round"] for r in rounds if "correction" in r}
    alone = {r["round"] for r in rounds if "sharing" in r and not r["sharing"]["share"]}
    ended = "; ○ = then silos train on their own images alone" if alone else ""
    losses = [(r["round"], r["loss"]) for r in rounds]
    series = [
        ("Training loss (mean over silos)", losses, "--blue", corrected),
        (
            "Loss on held-out auxiliary images; ○ = then corrected",
            _points(rounds, "auxiliary_loss"),
            "--green",
            corrected,
        ),
        (f"FID, smaller is better{ended}", _points(rounds, "fid"), "--red", alone),
        ("KID, mean over silos, smaller is better", _points(rounds, "kid"), "--red", corrected),
        ("Coverage of the silos' images, mean", _points(rounds, "coverage"), "--green", corrected),
        (
            "Share of samples near a training image, mean",
            _points(rounds, "copies"),
            "--blue",
            corrected,
        ),
    ]
    drawn = [
        f"<figure><figcaption>{name}</figcaption>{_chart(points, color, marked)}</figure>"
        for name, points, color, marked in series
        if points
    ]
    drawn += _loss_by_timestep(rounds)
    return (
        f'<section><h2>Curves</h2><div class="charts">{"".join(drawn)}</div></section>'
        if drawn
        else ""
    )


def _points(rounds: Sequence[Json], key: str) -> list[tuple[int, float]]:
    return [(r["round"], r[key]) for r in rounds if key in r]


def _loss_by_timestep(rounds: Sequence[Json]) -> list[str]:
    measured = [r for r in rounds if "losses" in r]
    if not measured:
        return []
    last = measured[-1]
    name = f"Loss on the silos' images by timestep, round {last['round']}; bin 0: least noise"
    chart = _chart(list(enumerate(last["losses"])), "--blue", set(), unit="bin")
    return [f"<figure><figcaption>{name}</figcaption>{chart}</figure>"]


def _chart(
    points: Sequence[tuple[int, float]], color: str, marked: set[int], unit: str = "round"
) -> str:
    """A line chart as inline SVG, rounds (or what `unit` says) on the horizontal axis."""
    width, height, left, bottom, top = 360, 190, 52, 26, 10
    xs, ys = [x for x, _ in points], [y for _, y in points]
    low, high = min(ys), max(ys)
    low, high = (low - 0.5, high + 0.5) if low == high else (low, high)
    span = max(1, xs[-1] - xs[0])

    def at(x: float, y: float) -> tuple[float, float]:
        across = left + (x - xs[0]) / span * (width - left - 12)
        return across, top + (high - y) / (high - low) * (height - bottom - top)

    places = [at(x, y) for x, y in points]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    dots = "".join(
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{5 if n in marked else 2.5}" '
        f'fill="{"var(--paper)" if n in marked else f"var({color})"}" stroke="var({color})" '
        f'stroke-width="2"><title>{unit} {n}: {value:.6g}</title></circle>'
        for (n, value), (x, y) in zip(points, places, strict=True)
    )
    ticks = "".join(
        f'<line x1="{left}" x2="{width - 12}" y1="{y:.1f}" y2="{y:.1f}" stroke="var(--line)"/>'
        f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.3g}</text>'
        for value in (low, (low + high) / 2, high)
        for _, y in [at(xs[0], value)]
    )
    ends = "".join(
        f'<text x="{at(x, low)[0]:.1f}" y="{height - 6}" text-anchor="{anchor}">{x}</text>'
        for x, anchor in dict.fromkeys([(xs[0], "start"), (xs[-1], "end")])
    )
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" font-size="11" fill="var(--soft)">{ticks}'
        f'{ends}<polyline points="{line}" fill="none" stroke="var({color})" stroke-width="2"/>'
        f"{dots}</svg>"
    )


def _grids(rounds: Sequence[Json], folder: Path) -> str:
    shown = [r for r in rounds if r["grid"]]
    if len(shown) > _MOST_GRIDS:
        step = (len(shown) - 1) / (_MOST_GRIDS - 1)
        shown = [shown[round(i * step)] for i in range(_MOST_GRIDS)]
    figures = "".join(
        f"<figure><figcaption>round {r['round']}</figcaption>"
        f"{_picture(folder / r['grid'], 'samples')}</figure>"
        for r in shown
    )
    if not figures:
        return ""
    return (
        '<section><h2>The same noise, round by round</h2><div class="grids">'
        f"{figures}</div></section>"
    )


def _picture(path: Path, text: str) -> str:
    if not path.exists():
        return ""
    content = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{text}" src="data:image/png;base64,{content}">'


def _rounds(rounds: Sequence[Json], done: int) -> str:
    if not rounds:
        return ""
    some = f": {len(rounds)} of {done}, all are in metrics.jsonl" if len(rounds) < done else ""
    body = "".join(
        f'<tr><td>{r["round"]}</td><td class="left">{escape(", ".join(r["survivors"]))}</td>'
        f"<td>{_number(r['loss'])}</td><td>{_number(r.get('auxiliary_loss'))}</td>"
        f"<td>{_number(r.get('fid'))}</td>"
        f'<td class="left">{escape(r.get("decision", {}).get("reason", ""))}</td></tr>'
        for r in rounds
    )
    return (
        f'<section><h2>Rounds{some}</h2><div class="wide"><table><tr><th>round</th>'
        '<th class="left">in the sum</th><th>loss</th><th>held-out loss</th><th>FID</th>'
        f'<th class="left">correction?</th></tr>{body}</table></div></section>'
    )


def _traffic(sites: Json) -> str:
    if not sites:
        return ""
    body = "".join(
        f'<tr><td class="left">{escape(site)}</td><td>{_bytes(both["from_silo"])}</td>'
        f"<td>{_bytes(both['to_silo'])}</td></tr>"
        for site, both in sites.items()
    )
    return (
        '<section><h2>Bytes</h2><div class="wide"><table><tr><th class="left">silo</th>'
        f"<th>sent</th><th>received</th></tr>{body}</table></div></section>"
    )


def _seconds(seconds: Json) -> str:
    body = "".join(
        f'<tr><td class="left">{escape(kind)}</td><td>{value:,.1f}</td></tr>'
        for kind, value in seconds.items()
    )
    return f"<section><h2>Seconds</h2><table>{body}</table></section>" if body else ""


def _files(report: Json) -> str:
    rows = [
        ("model/", "the model; <code>diffusers.DDPMPipeline.from_pretrained</code> loads it"),
        ("samples.png", "samples of it"),
        ("grids/", "a grid of samples per round"),
        (
            "metrics.jsonl",
            "auxiliary set, rounds, decisions, corrections, evaluations, sharing: one a line",
        ),
        ("report.json", "all that this page shows"),
    ]
    body = "".join(
        f'<tr><td class="left"><a href="{name}"><code>{name}</code></a></td>'
        f'<td class="left">{what}</td></tr>'
        for name, what in rows
    )
    fingerprint = escape(report["roster"]["fingerprint"])
    return (
        f'<section><h2>Files</h2><table>{body}</table><p class="soft">Roster fingerprint '
        f"<code>{fingerprint}</code></p></section>"
    )


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _bytes(value: int) -> str:
    for power, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if value >= 1 << power:
            return f"{value / (1 << power):.1f} {unit}"
    return f"{value} B"
