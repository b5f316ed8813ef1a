"""A run on one page: `report.html`, which needs no network and no other file."""

import base64
from collections.abc import Iterable
from html import escape
from typing import TYPE_CHECKING

import yaml

from distill.pictures.course import Course
from distill.report import human_ap, human_macs, human_share
from distill.run_folder import RunFolder, write_file
from distill.summary import describe_config, summary_table

if TYPE_CHECKING:
    from distill.pictures.folder import Picture

SHEETS = "What they see"  # a section of images rather than of charts

CSS = """
:root { color-scheme: light dark; --ground: #ffffff; --panel: #f6f7f9; --ink: #16181d; --faint: #5b6472;
  --line: #dfe3e8; --accent: #0072b2; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #111418; --panel: #191d23; --ink: #e6e8eb; --faint: #9aa4b2; --line: #2b323b; --accent: #56b4e9; }
  .chart img { filter: invert(1) hue-rotate(180deg); mix-blend-mode: screen; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 84rem; padding: 1.5rem 1rem 4rem; background: var(--ground); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.5rem; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2.2rem 0 .8rem; }
.state { color: var(--faint); margin: .2rem 0 1.2rem; }
.head { display: flex; flex-wrap: wrap; gap: 1rem 2.5rem; }
dl { flex: 1 1 22rem; display: grid; align-content: start; gap: .15rem 1rem; margin: 0; font-size: .92rem;
  grid-template-columns: max-content 1fr; }
dt { color: var(--faint); }
dd { margin: 0; overflow-wrap: anywhere; }
/* a shadow at the edge behind which a wide table goes on */
.scroll { overflow-x: auto; max-width: 100%; background:
  linear-gradient(to left, var(--ground) 40%, transparent) 100% 0 / 2.5rem 100% no-repeat local,
  radial-gradient(farthest-side at 100% 50%, var(--faint), transparent) 100% 0 / .9rem 100% no-repeat scroll; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; white-space: nowrap; }
th, td { padding: .3rem .6rem; text-align: right; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
th { color: var(--faint); font-weight: 500; }
tr:last-child td { font-weight: 600; }
.groups tr:last-child td { font-weight: inherit; }
.groups td:first-child { white-space: normal; overflow-wrap: anywhere; min-width: 16rem; }
.charts { columns: 22rem; column-gap: 1rem; }
.sheets { columns: 34rem; column-gap: 1rem; }
figure { margin: 0 0 1rem; break-inside: avoid; border: 1px solid var(--line); border-radius: 8px;
  padding: .6rem; background: var(--panel); }
.chart { background: #fff; }
@media (prefers-color-scheme: dark) { .chart { background: var(--panel); isolation: isolate; } }
figure img { display: block; width: 100%; height: auto; }
figcaption { color: var(--faint); font-size: .85rem; margin-top: .5rem; }
.chart figcaption { color: #5b6472; }
@media (prefers-color-scheme: dark) { .chart figcaption { color: var(--faint); } }
pre { background: var(--panel); border: 1px solid var(--line); border-radius: 8px; padding: .8rem; overflow-x: auto;
  font-size: .8rem; line-height: 1.4; }
summary { cursor: pointer; color: var(--accent); margin-top: 2rem; }
a { color: var(--accent); }
"""


def write_page(run: RunFolder, course: Course, pictures: Iterable["Picture"]) -> None:
    """Writes `report.html` with the pictures that are given; they must have been drawn."""
    sections: dict[str, list[str]] = {}
    for picture in pictures:
        data = base64.b64encode((run.pictures / f"{picture.name}.png").read_bytes()).decode()
        kind = "sheet" if picture.section == SHEETS else "chart"
        sections.setdefault(picture.section, []).append(
            f'<figure class="{kind}" id="{picture.name}"><img src="data:image/png;base64,{data}" '
            f'alt="{escape(picture.caption)}"><figcaption>{escape(picture.caption)}</figcaption></figure>'
        )
    body = "".join(
        f"<h2>{title}</h2>\n" + (f'<div class="{"sheets" if title == SHEETS else "charts"}">{"".join(figures)}</div>\n')
        for title, figures in sections.items()
    )
    facts = describe_config(course.config).items()
    facts = "".join(f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in facts)
    name = escape(run.path.resolve().name)
    settings = escape(yaml.safe_dump(course.config, sort_keys=False, allow_unicode=True, width=100))
    page = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{name} · distill</title>
<link rel="icon" href="data:,">
<style>{CSS}</style>
</head>
<body>
<h1>{name}</h1>
<p class="state">{escape(describe_state(course))}</p>
<div class="head">
<div class="scroll">{_table(*numbers(course))}</div>
<dl>{facts}</dl>
</div>
{body}{_pruning(course)}<details><summary>All settings</summary><pre>{settings}</pre></details>
</body>
</html>
"""
    write_file(run.report_file, page)


def describe_state(course: Course) -> str:
    """How far the run is, and what its table was measured on."""
    done = f"{len(course.rows)} of {course.total_epochs} epochs"
    if not course.summary:
        return f"in training: {done}; measured on {(course.config.get('data') or {}).get('val', 'val')}"
    return f"finished: {done}; measured on {course.summary.get('split')}"


def numbers(course: Course) -> tuple[tuple[str, ...], list[list[str | None]]]:
    """Columns and rows of the table at the top: the summary's, or how the student stands while there is none."""
    if course.summary:
        return summary_table(course.summary)
    rows = []
    for row in course.rows[-1:]:
        scores = [human_ap(row.get(key)) for key in ("ap", "ap50", "ap75")]
        rows.append([f"student, epoch {row['epoch']}", *scores, human_macs(row.get("macs"))])
    if course.teacher_ap is not None:
        rows.insert(0, ["teacher", human_ap(course.teacher_ap), None, None, None])
    return ("", "AP", "AP50", "AP75", "MACs"), rows


def _pruning(course: Course) -> str:
    """What each group lost, what stays whole and why, and which cuts were taken back; empty where nothing is cut."""
    if not course.pruning:
        return ""
    rows = [
        [
            ", ".join(group.layers),
            str(group.widths[0][1]),
            str(group.widths[-1][1]),
            human_share(group.left),
            human_macs(group.macs_saved) if group.macs_saved else None,
            *(None if value is None else f"{value:.2e}" for value in (group.kept, group.removed)),
        ]
        for group in course.groups
    ]
    columns = ("layers", "before", "now", "left", "MACs saved", "importance of those kept", "removed at the last cut")
    text = f'<h2>Groups of channels</h2>\n<div class="scroll groups">{_table(columns, rows)}</div>\n' if rows else ""
    if course.retreats:
        back = [
            [f"before epoch {entry['epoch'] + 1}", human_share(entry["left"]), f"{entry['until']}", entry["objection"]]
            for entry in course.retreats
        ]
        table = _table(("cut", "would have left", "judged after epoch", "why"), back)
        text += f'<h2>Cuts taken back</h2>\n<div class="scroll">{table}</div>\n'
    blocks = [
        [f"{cut['epoch'] + 1}", block["name"], f"{block['importance']:.3g}", human_macs(block["macs_saved"])]
        for cut in course.pruning["cuts"]
        for block in cut["blocks"]
    ]
    if blocks:
        table = _table(("before epoch", "residual branch", "importance", "MACs saved"), blocks)
        text += f'<h2>Blocks that are gone</h2>\n<div class="scroll groups">{table}</div>\n'
    if whole := course.pruning.get("whole"):
        whole = _table(("layer", "why it stays whole"), [list(pair) for pair in whole.items()])
        text += f'<details><summary>Layers that stay whole</summary><div class="scroll">{whole}</div></details>\n'
    return text


def _table(columns: tuple[str, ...], rows: list[list[str | None]]) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape('-' if cell is None else cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
