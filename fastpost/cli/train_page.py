"""report.html of `fastpost train`: one page that needs nothing beside itself, readable on a light and on a dark ground."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fastpost.bench.step_times import OURS, PLAIN, PUBLISHED
from fastpost.cli.files import replace_file, replace_text
from fastpost.cli.train_report import CSV_NAME, DARK, HTML_NAME, PNG_NAME, Results, data_uri, draw, milliseconds

MOST_ROWS = 16  # of metrics.csv on the page

STYLE = """
:root{color-scheme:light dark;--ground:#f5f6f9;--card:#fff;--text:#1f2430;--soft:#5d6577;--line:#dfe3ea;--mark:#2f5fd0}
@media(prefers-color-scheme:dark){:root{--ground:#12151c;--card:#1b1f29;--text:#e4e7ee;--soft:#9aa3b5;--line:#333a4a;--mark:#86a8ff}}
*{box-sizing:border-box}
body{margin:0;background:var(--ground);color:var(--text);font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:1080px;margin:0 auto;padding:28px 20px 48px}
h1{margin:0;font-size:26px}h1 b{color:var(--mark)}h2{margin:0 0 10px;font-size:16px}
.lead{margin:2px 0 20px;color:var(--soft)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(190px,1fr));gap:12px;margin-bottom:14px}
.card,.tile{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:14px 16px}
.card{margin-bottom:14px;overflow-x:auto}
.tile .what{color:var(--soft);font-size:13px}.tile .value{font-size:24px;font-weight:650;line-height:1.25}
.tile .aside{color:var(--soft);font-size:13px}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(330px,1fr));gap:14px}
img{display:block;width:100%;height:auto}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums;font-size:14px}
th{font-weight:600;color:var(--soft);text-align:right;vertical-align:bottom;white-space:normal}td{text-align:right}
th,td{padding:4px 10px;border-bottom:1px solid var(--line)}td{white-space:nowrap}
th:first-child,td:first-child{text-align:left;padding-left:0}tr:last-child td{border-bottom:0}
.words td{white-space:normal;overflow-wrap:anywhere;text-align:left;vertical-align:top}
.words td:first-child{white-space:nowrap}
code{font:13px/1.5 ui-monospace,Menlo,Consolas,monospace;overflow-wrap:anywhere}
p{margin:8px 0 0}.soft{color:var(--soft);font-size:13px}
@media print{body{background:#fff}.card,.tile{break-inside:avoid}}
"""


def shown(value: Any) -> str:
    """A number as the page writes it: four digits."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return "" if value is None else str(value)
    return str(value) if isinstance(value, int) else f"{value:.4g}"


def write(results: Results) -> list[Path]:
    """Writes metrics.csv, report.png and report.html; returns their paths."""
    table = results.write_csv()
    light, dark = draw(results), draw(results, DARK)
    picture = results.folder / PNG_NAME
    replace_file(picture, lambda beside: beside.write_bytes(light))
    page = results.folder / HTML_NAME
    replace_text(page, build(results, light, dark))
    return [table, picture, page]


def build(results: Results, light: bytes, dark: bytes) -> str:
    """The page."""
    title = f"fastpost train: {results.method}"
    tiles = "".join(
        f'<div class="tile"><div class="what">{_text(what)}</div><div class="value">{_text(value)}</div>'
        f'<div class="aside">{_text(aside)}</div></div>'
        for what, value, aside in tiles_of(results)
    )
    lead = " · ".join(_text(value) for _, value in results.facts[:2])
    changed = [(f"--{name}", shown(value)) for name, value in results.changed.items()]
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{_text(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<h1>fastpost train: <b>{_text(results.method)}</b></h1>
<div class="lead">{lead}</div>
<div class="tiles">{tiles}</div>
<div class="card">
<picture><source media="(prefers-color-scheme: dark)" srcset="{data_uri(dark)}"><img src="{data_uri(light)}"
alt="Loss, evaluation, what the method reports, and step times"></picture>
</div>
{_timing(results)}
<div class="card"><h2>Metrics</h2>
{_metrics(results)}
</div>
<div class="pair">
<div class="card"><h2>Options that differ from their default</h2>
{_table(["option", "value"], changed, "options", words=True)}
</div>
<div class="card"><h2>What was run</h2>
{_table(["what", ""], results.facts, "facts", words=True)}
</div>
</div>
<div class="card"><h2>Command</h2><code>{_text(results.command)}</code></div>
</main>
</body>
</html>
"""


def tiles_of(results: Results) -> list[tuple[str, str, str]]:
    """The few numbers to see first: what, value, aside."""
    found: list[tuple[str, str, str]] = []
    if results.metric == "score":
        kept = next(row for row in results.rows if row["kept"])
        found += [
            (
                f"{results.unit} on what reports",
                f"{shown(_unsigned(results, kept['test_untouched']))} → {shown(_unsigned(results, kept['test_kept']))}",
                "untouched → kept",
            ),
            ("state that was kept", f"{kept['step']} of {results.rows[-1]['step']}", f"stopped by {kept['stop_reason']}"),
            (
                "drift of that state",
                shown(kept["drift"]),
                "no step was made"
                if kept["step"] == results.rows[-1]["step"] == 0
                else f"the first step moved {kept['moved_fraction']:.0%} of the weights",
            ),
        ]
    else:
        name, least = results.metric.removeprefix("eval_"), results.metric != "eval_accuracy"
        if results.evaluated:
            best = (min if least else max)(results.evaluated, key=lambda row: row[results.metric])
            value = shown(results.evaluated[-1][results.metric])
            aside = f"best {shown(best[results.metric])} at step {best['step']}"
            if results.baseline is not None:
                aside += f"; always the most frequent label {shown(results.baseline)}"
            found.append((f"evaluation {name}, last", value, aside))
            if "eval_f1" in results.evaluated[-1]:
                last = results.evaluated[-1]
                found.append(
                    ("evaluation F1, last", shown(last["eval_f1"]), f"Matthews' correlation {shown(last['eval_mcc'])}")
                )
        losses = [row["loss"] for row in results.rows if "loss" in row]
        if losses:
            found.append((f"training loss{results.loss_at}, last logged", shown(losses[-1]), f"first {shown(losses[0])}"))
    seen = results.last("sam/seen_over_intended")
    if seen is not None:
        cosine, skipped = results.last("sam/seen_cosine"), results.last("sam/skipped_steps")
        found.append(("SAM, applied / intended", shown(seen), f"cosine {shown(cosine)}, {shown(skipped)} steps skipped"))
    kl = results.last("r3f/symm_kl")
    if kl is not None:
        found.append(("R3F, symmetric KL", shown(kl), f"task loss {shown(results.last('r3f/task_loss'))}"))
    held = results.last("anchor/kl")
    if held is not None:
        found.append(("anchor, divergence", shown(held), f"task loss {shown(results.last('anchor/task_loss'))}"))
    if OURS in results.costs:
        ours, plain, theirs = (results.costs[name].seconds for name in (OURS, PLAIN, PUBLISHED))
        found.append(
            ("a step, fastpost", milliseconds(ours), f"{ours / plain:.2f} plain steps, published {theirs / plain:.2f}")
        )
    return found


def _unsigned(results: Results, score: float) -> float:
    """Nats per token are scored as their negative."""
    return -score if "nats" in results.unit else score


def _timing(results: Results) -> str:
    if not results.costs:
        why = f'<p class="soft">{_text(results.untimed)}</p>' if results.untimed else ""
        return f'<div class="card"><h2>Time of a step</h2>{why}</div>' if why else ""
    plain = results.costs[PLAIN].seconds
    rows = [
        (
            name,
            milliseconds(cost.seconds),
            f"{cost.seconds / plain:.2f}",
            "not measured" if cost.peak_mib is None else f"{cost.peak_mib:.0f}",
        )
        for name, cost in results.costs.items()
    ]
    if results.metric == "score":
        how = (
            "Whole runs of as many steps on the same text, sides in turns; per step. The plain step is Adam going down; the "
            "other two also copy the weights and go back."
        )
    else:
        how = (
            "Medians, sides in turns on copies of the model and the same batch, in plain loops around the same AdamW. In "
            f"the training run itself a step took {milliseconds(results.seconds / max(results.steps, 1))}, with the "
            "Trainer, loading data and evaluating."
        )
    memory = "Peak memory is resident memory above what the process held before that side was built."
    heads = ["side", "a step takes", "plain steps", "peak memory, MiB"]
    return (
        f'<div class="card"><h2>Time of a step</h2>{_table(heads, rows, "timing")}<p class="soft">{how} {memory}</p></div>'
    )


def _metrics(results: Results) -> str:
    columns = [name for name in results.columns() if name not in ("epoch", "learning_rate", "tokens", "kept", "stop_reason")]
    picked = results.evaluated or results.rows
    if len(picked) > MOST_ROWS:
        step = (len(picked) - 1) / (MOST_ROWS - 1)
        picked = [picked[round(k * step)] for k in range(MOST_ROWS)]
    if results.rows and results.rows[-1] not in picked:
        picked = [*picked, results.rows[-1]]
    columns = [name for name in columns if any(row.get(name, "") != "" for row in picked)]
    body = [[shown(row.get(name, "")) for name in columns] for row in picked]
    told = f"{len(picked)} of {len(results.rows)} rows of {CSV_NAME}."
    return _table(columns, body, "metrics") + f'<p class="soft">{told}</p>'


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]], name: str, words: bool = False) -> str:
    body = "".join("<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    head = "" if words else "<thead><tr>" + "".join(f"<th>{_broken(cell)}</th>" for cell in heads) + "</tr></thead>"
    return f'<table id="{name}"{" class=words" if words else ""}>{head}<tbody>{body}</tbody></table>'


def _broken(name: str) -> str:
    """A column's name that may go over several lines."""
    return _text(name).replace("/", "/<wbr>").replace("_", "_<wbr>")


def _text(value: str) -> str:
    return html.escape(value)
