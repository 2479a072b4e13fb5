"""Writes the tables of README.md and of pages under docs from the CSV files of `bench/data`; draws figures.

Run `python -m fastpost.bench.pages` in the root of the repository. A page holds a table between the lines
`<!-- table: NAME -->` and `<!-- end of table -->`, and a figure between `<!-- figure: NAME: CAPTION -->` and
`<!-- end of figure -->`; everything else in it is left alone.
"""

from __future__ import annotations

import csv
import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fastpost.bench import features, scaling_figure, table
from fastpost.bench import peers as bench_peers
from fastpost.bench.studies import figures, verdicts
from fastpost.bench.table import NOT_MEASURED

DATA = Path(__file__).parent / "data"
PAGES = ("README.md", "docs/benchmarks.md", "docs/studies.md", "docs/features.md", "docs/anchor.md")
TABLE = re.compile(r"(?P<head><!-- table: (?P<name>[\w-]+) -->\n).*?(?P<tail><!-- end of table -->)", re.S)
FIGURE = re.compile(
    r"(?P<head><!-- figure: (?P<name>[\w-]+): (?P<caption>[^>]*) -->\n).*?(?P<tail><!-- end of figure -->)", re.S
)

CPU, CPU_KEPT = "cpu-avx512.csv", "cpu-avx512-kept.csv"
HOST = "cpu-avx512-host.csv"
H200, H200_FIRST = "h200-2026-11-27-1153c8b.csv", "h200-2026-11-27.csv"  # the last run on a GPU, and the first


@dataclass(frozen=True)
class Row:
    """One line of a table.

    Attributes:
        work, against: its first two cells.
        case, goals: the bench case and the descriptions of its goals, or how they begin; several stand in one cell.
        shape: the shape to take where a case was measured at several.
    """

    work: str
    against: str
    case: str
    goals: tuple[str, ...]
    shape: str = ""

    def cell(self, file: str, dtype: str = "") -> str:
        """What a file says: its ratios, bold where the goal is missed. Empty where it was not measured."""
        found = [self._measured(file, goal, dtype) for goal in self.goals]
        return " / ".join(shown(row) for row in found if row is not None)

    def limit(self, file: str, dtype: str = "") -> str:
        """The goal, such as "<= 2x"; empty where there is none."""
        row = self._measured(file, self.goals[0], dtype)
        return "" if row is None or not row["limit"] else goal_of(row)

    def _measured(self, file: str, goal: str, dtype: str) -> dict[str, str] | None:
        wanted = {"case": self.case, "shape": self.shape, "dtype": dtype}
        rows = [row for row in measured(file) if all(row[key] == value for key, value in wanted.items() if value)]
        rows = [row for row in rows if row["goal"] == goal] or [row for row in rows if row["goal"].startswith(goal)]
        if len(rows) > 1:
            raise ValueError(f"{file} has {len(rows)} rows of {self.case!r} for {goal!r}; name the shape or the dtype")
        return rows[0] if rows else None


@functools.cache
def measured(file: str) -> tuple[dict[str, str], ...]:
    """The rows of a CSV file that hold a goal."""
    with (DATA / file).open() as lines:
        return tuple(row for row in csv.DictReader(lines) if row["goal"])


def shown(row: dict[str, str]) -> str:
    """The measured value, rounded so that it stays on its side of the goal; bold where that is missed."""
    if not row["ratio"]:
        return NOT_MEASURED
    value, missed = in_its_unit(row, float(row["ratio"])), row["result"] == "MISS"
    if is_share(row):
        return f"**{value:.1%}**" if missed else f"{value:.1%}"
    text = f"{value:#.3g}".rstrip(".") if value < 1000 else f"{value:.0f}"
    bound = re.match(r"([<>]=) ([\d.]+)", row["limit"])
    if bound is not None:
        limit = in_its_unit(row, float(bound[2]))
        is_kept = float(text) <= limit if bound[1] == "<=" else float(text) >= limit
        if is_kept == missed:
            text = f"{value:g}"
    text += unit(row["limit"])
    return f"**{text}**" if missed else text


def unit(limit: str) -> str:
    """ "x" for a ratio, else what stands behind the number of a goal: of milliseconds and more, ms."""
    behind = limit.split()[2:]
    if behind == ["us"] and float(limit.split()[1]) >= 1000:
        return " ms"
    return " " + " ".join(behind) if behind else "x"


def in_its_unit(row: dict[str, str], value: float) -> float:
    return value / 1000 if unit(row["limit"]) == " ms" else value


def goal_of(row: dict[str, str]) -> str:
    sign, number = row["limit"].split()[:2]
    value = in_its_unit(row, float(number))
    return f"{sign} {value:.0%}" if is_share(row) else f"{sign} {value:.4g}{unit(row['limit'])}"


def is_share(row: dict[str, str]) -> bool:
    """Whether the value is a share of a bandwidth, shown in percent."""
    return row["goal"].startswith("bandwidth of")


KL = "symmetric_kl forward + backward, streams 1 apart"
STEP = "a step of GPT-2"
LINEAR = "linear_r3f_loss, forward + backward"
PERTURB = "SAM norm + perturb + restore"
UPHILL = "15 steps uphill on one text of {} tokens, and back"
GAP_GOAL = ("fastpost.GAP faster than loss * -1, Adam, deep-copied state",)
NOISE = tuple(f"fastpost {kind} faster than torch.distributions {kind} + add" for kind in ("uniform", "normal"))
DELTA = tuple(f"Delta.{name}_ over torch.add, two reads and one write" for name in ("scale", "lines"))

CPU_ROWS = (
    Row("`symmetric_kl`, forward + backward, 512 x 50,257, in place", "fairseq's formula, times as fast", KL,
        ("fastpost, in place faster than fairseq formula",)),
    Row("same, new gradient buffers on huge pages", "fairseq's formula, times as fast", KL,
        ("fastpost, fresh gradients faster than fairseq formula",)),
    Row("same, in place", "time of copying both inputs", KL, ("fastpost, in place over copy of both inputs",)),
    Row("`linear_r3f_loss`, forward + backward, 2,048 rows x 768 x 50,257", "time of its three products alone", LINEAR,
        ("linear_r3f_loss over its three products alone",)),
    Row("same", "`hidden @ W.T`, then fairseq's formula, times as fast", LINEAR,
        ("linear_r3f_loss faster than fairseq formula on whole logits",)),
    Row("same, 4,096 rows under a budget of 128 MB", "peak memory, gradients included",
        "linear_r3f_loss under 128 MB, forward + backward", ("peak memory of 4,096 rows",)),
    Row("`add_noise`, 64 x 512 x 1024, uniform / normal", "`torch.distributions` and add, times as fast",
        "add_noise", NOISE),
    Row("a step of R3F, two passes, six-layer encoder", "time of a plain step", "a step of R3F on an encoder",
        ("R3F, two_pass over plain fine-tuning",)),
    Row("SAM norm + perturb + restore, GPT-2's 148 tensors", "time of copying the parameters", PERTURB,
        ("fastpost, list over copy of the parameters",)),
    Row("same", "time of torch's `_foreach_` operations", PERTURB, ("fastpost, list over torch._foreach_ recipe",)),
    Row("same", "time for the flattened model", PERTURB, ("fastpost, list over fastpost, flattened",)),
    Row("same", "time of the popular wrapper's loop", PERTURB, ("fastpost, list over popular wrapper's loop",)),
    Row("SAM perturb + restore, 1,000 tensors of 256 B to 4 KB", "time of the popular wrapper's loop",
        "SAM perturb + restore, small tensors", ("fastpost over popular wrapper's loop",)),
    Row("a step of SAM on GPT-2, 4 micro-batches", "time of AdamW after two passes",
        STEP, ("SAM over AdamW after two passes",)),
    Row("same, ascent on a quarter (SAM-LM)", "time of AdamW", STEP, ("SAM, ascent on a quarter over AdamW",)),
    Row("`SAM(fused_restore=True)`: restore + AdamW in one pass", "time of restore, then torch's fused AdamW",
        "SAM's restore + AdamW", ("fused_restore over restore, then torch's fused AdamW",)),
    Row("a step of `SAMTrainer`", "time of the Trainer with two passes", "a step in the Trainer",
        ("SAMTrainer over Trainer, two passes",)),
    Row("15 steps of `GAP` on 192 tokens, 24M parameters, and back", "loss * -1, torch's Adam, a deep copy, times as fast",
        UPHILL.format(192), GAP_GOAL),
    Row("same, 64 tokens", "the same", UPHILL.format(64), GAP_GOAL),
    Row("roll-back", "time of copying the weights",
        "going back to the untouched weights", ("GapResult.rollback over copy",)),
    Row("a delta scaled, or faded out with depth (LiNeS)", "time of two reads and one write",
        "scaling a delta in place", DELTA),
)  # fmt: skip

COPY = "one small `copy_` of torch"
BY_HAND = "time of a loop written by hand"
SMALL_STEP = "host time of a step of SAM"
HOST_ROWS = (
    *(Row(f"`{name}`, one tensor of 256 bytes", COPY, "host time of list operations", (f"{name} over torch copy_",))
      for name in ("squared_norm", "sam_perturb_", "sam_restore_")),
    Row("`symmetric_kl`, 8 x 128, no gradient", COPY, "host time of symmetric_kl",
        ("symmetric_kl, no gradient over torch copy_",)),
    Row("same, forward + backward", "time of `F.kl_div` in one direction, forward + backward", "host time of symmetric_kl",
        ("symmetric_kl, forward + backward over F.kl_div",)),
    Row("SAM's first step and back, 150 tensors of 1 KB", "time of torch's `_foreach_` operations",
        "host time of SAM's first step", ("SAM.first_step + restore_ over torch._foreach_ recipe",)),
    Row("same, 1,000 tensors of 256 B to 4 KB", "time of the popular wrapper's loop", "host time of SAM on small tensors",
        ("SAM.first_step + restore_ over popular wrapper's loop",)),
    *(Row(f"a step of SAM, three layers of 64, batch 32: {way}", BY_HAND, SMALL_STEP, (f"{way} over loop written by hand",))
      for way in ("two calls", "closure", "window")),
    *(Row(f"15 steps of `GAP` on 64 tokens, 24M parameters, and back: {pages}", "time of the plain loop",
          f"host time of 15 steps of GAP, {pages}", ("fastpost.GAP over loss * -1",))
      for pages in ("fresh pages", "kept heap")),
    *(Row(f"{what} after `import torch`", "", "time until a method has been used once", (f"host time of {what}",))
      for what in ("first use of SAM around an SGD", "first use of R3F", "first use of symmetric_kl")),
)  # fmt: skip

KL_H200, LINEAR_H200 = "symmetric_kl, forward + backward", "linear_r3f_loss, forward + backward"
LLAMA = "norm + perturb + restore, Llama-like"
KL_READ = ("bandwidth of symmetric_kl, share of read (torch.sum) or copy",)
H200_ROWS = (
    Row("`symmetric_kl`, forward + backward, 2,092 x 128,256, in place", "fairseq's formula, times as fast", KL_H200,
        ("in place faster than fairseq formula",), "2,092 x 128,256"),
    Row("same", "time of moving its 24 (12) bytes a pair at the rate of a copy", KL_H200,
        ("in place over the floor of",), "2,092 x 128,256"),
    Row("`symmetric_kl`, forward alone, 2,092 x 128,256", "share of the rate of a read", "symmetric_kl, forward", KL_READ,
        "2,092 x 128,256"),
    Row("`linear_r3f_loss`, forward + backward, 4,096 rows x 768 x 50,257", "time of its three products alone", LINEAR_H200,
        ("linear_r3f_loss over its three products alone",), "4,096 x 768 x 50,257"),
    Row("same, 4,096 rows x 4,096 x 128,256", "time of its three products alone", LINEAR_H200,
        ("linear_r3f_loss over its three products alone",), "4,096 x 4,096 x 128,256"),
    Row("SAM norm + perturb + restore, 290 tensors, 974M parameters", "time of torch's `_foreach_` operations", LLAMA,
        ("list over _foreach_ recipe",)),
    Row("same", "time of the popular wrapper's loop", LLAMA, ("list over popular wrapper",)),
    Row("`sam_perturb_`, one flat tensor of 1 GB", "share of the rate of a copy", "perturb, flat",
        ("bandwidth of sam_perturb_, share of copy",)),
    Row("restore + AdamW in one pass, 256M parameters", "time of restore, then torch's fused AdamW", "restore + AdamW",
        ("fused restore + AdamW over restore, then torch's fused AdamW",)),
    Row("norm + perturb + restore, 1,000 tensors of 1 to 64 KB", "torch's `_foreach_` operations, times as fast",
        "norm + perturb + restore, small tensors", ("list faster than _foreach_ recipe",)),
    Row("`embedding_noise`, 65,536 rows of 4,096", "share of the rate of a copy", "embedding, clean and noised",
        ("bandwidth of embedding_noise, share of copy",)),
)  # fmt: skip

STEPS_H200 = (
    Row("a step of SAM, 987M parameters in bfloat16, 4 x 1,024 tokens", "time of two passes and AdamW", "a step of SAM",
        ("SAM over two passes + AdamW",)),
    Row("a step of R3F, 928M parameters in bfloat16, 4 x 1,024 tokens, 128,256 classes, fused head", "time of a plain step",
        "a step of R3F", ("R3F, fused_linear over plain",)),
    Row("same", "the published formulas, times as fast", "a step of R3F",
        ("R3F, fused_linear faster than published formulas",)),
    Row("same", "peak memory, beyond model and optimizer", "a step of R3F", ("peak memory of R3F, fused_linear",)),
    Row("same, through logits", "time of a plain step", "a step of R3F", ("R3F, logits over plain",)),
    Row("15 steps of `GAP`, 355M parameters in float32, 256 tokens, and back", "the plain loop, times as fast",
        "15 steps uphill, and back", GAP_GOAL),
)  # fmt: skip

# README's table: its two first cells, and the rows of the machines.
HEADLINES: tuple[tuple[str, str, Row, Row | None], ...] = (
    ("symmetric KL, forward + backward", "fairseq's formula, times as fast", CPU_ROWS[0], H200_ROWS[0]),
    ("same", "time of the memory traffic alone", CPU_ROWS[2], H200_ROWS[1]),
    ("R3F's loss with the output head fused", "time of its matrix products alone", CPU_ROWS[3], H200_ROWS[4]),
    ("SAM norm + perturb + restore", "time of torch's `_foreach_` operations", CPU_ROWS[9], H200_ROWS[5]),
    ("a whole step of SAM", "time of two passes and AdamW", CPU_ROWS[13], STEPS_H200[0]),
    ("a step of SAM on three layers of 64, host time", BY_HAND, HOST_ROWS[7], None),
    ("a whole step of R3F", "time of a plain step", CPU_ROWS[7], STEPS_H200[1]),
    ("15 steps of GAP on 64 tokens (GPU: 256), and back", "the plain loop, times as fast", CPU_ROWS[18], STEPS_H200[5]),
)


def cpu() -> list[tuple[str, ...]]:
    head = ("work", "against", "goal", "default allocator", "heap kept")
    return [head, *((r.work, r.against, r.limit(CPU), r.cell(CPU), r.cell(CPU_KEPT)) for r in CPU_ROWS)]


def host() -> list[tuple[str, ...]]:
    return [("work", "against", "goal", "measured"), *((r.work, r.against, r.limit(HOST), r.cell(HOST)) for r in HOST_ROWS)]


def h200() -> list[tuple[str, ...]]:
    head = ("work", "against", "goal", "float32", "bfloat16", "first run: float32", "bfloat16")
    files = ((H200, "float32"), (H200, "bfloat16"), (H200_FIRST, "float32"), (H200_FIRST, "bfloat16"))

    def goals(row: Row) -> str:
        return " / ".join(dict.fromkeys(filter(None, (row.limit(*of) for of in files[:2]))))

    return [head, *((r.work, r.against, goals(r), *(r.cell(*of) for of in files)) for r in H200_ROWS)]


def h200_steps() -> list[tuple[str, ...]]:
    return [("work", "against", "goal", "measured"), *((r.work, r.against, r.limit(H200), r.cell(H200)) for r in STEPS_H200)]


DISTILLATION = "cpu-distillation.csv"
OF_DISTILLATION = "linear_distillation_loss, forward + backward"
OF_TOP_K = "linear_top_k_distillation_loss, forward + backward"
OF_RELATIVES = "linear_r_drop_loss and linear_js_divergence, forward + backward"
SMALL = "forward KL under 128 MB"
DISTILLATION_ROWS = (
    *(Row(name, "time of its four products alone", OF_DISTILLATION, (f"{name} over its four products alone",))
      for name in ("forward KL", SMALL, "reverse KL", "Jensen-Shannon", "total variation", "forward KL + cross-entropy")),
    Row("forward KL", "whole logits and `F.kl_div`, times as fast", OF_DISTILLATION,
        ("forward KL faster than F.kl_div on whole logits",)),
    Row(SMALL, "whole logits and `F.kl_div`, times as fast", OF_DISTILLATION, (f"{SMALL} faster than",)),
    Row(SMALL, "peak memory of whole logits and `F.kl_div`", OF_DISTILLATION, (f"peak memory of {SMALL}",)),
    Row("a teacher's 64 most probable classes, under 128 MB", "time of its three products alone", OF_TOP_K,
        ("64 classes, forward KL over its three products alone",)),
    Row("same", "gathered from whole logits, times as fast", OF_TOP_K, ("64 classes, forward KL faster than",)),
    Row("same", "peak memory of whole logits", OF_TOP_K, ("peak memory of",)),
    *(Row(name, "time of its three products alone", OF_RELATIVES, (f"{name} over its three products alone",))
      for name in ("linear_r_drop_loss", "linear_js_divergence")),
    Row("linear_r_drop_loss", "R-Drop's formula on whole logits, times as fast", OF_RELATIVES,
        ("linear_r_drop_loss faster",)),
    *(Row(f"forward KL under 128 MB, {rows} rows", "peak memory, gradients included",
          "linear_distillation_loss under 128 MB, forward + backward", (f"peak memory of {rows} rows",))
      for rows in ("1,024", "4,096")),
)  # fmt: skip


def distillation() -> list[tuple[str, ...]]:
    """What was measured of it, goals and verdicts; a row that no run has is left out."""
    rows = [(r.work, r.against, r.limit(DISTILLATION), r.cell(DISTILLATION)) for r in DISTILLATION_ROWS]
    return [("work", "against", "goal", "measured"), *(row for row in rows if row[3])]


ANCHOR = "cpu-anchor.csv"
OF_ANCHOR = "gradients of an anchored step"
ANCHOR_ROWS = (
    Row("anchored by KL to the reference", "time of a plain step", OF_ANCHOR, ("anchored over plain",)),
    Row("same", "time of a plain step and the reference's layers", OF_ANCHOR, ("anchored over plain, and",)),
    Row("same", "whole logits and `F.kl_div`, times as fast", OF_ANCHOR, ("anchored faster than whole logits",)),
    Row("same", "peak memory of whole logits and `F.kl_div`", OF_ANCHOR, ("peak memory of anchored",)),
    Row("taught from a context", "time of a plain step", OF_ANCHOR, ("taught from a context over plain",)),
)


def anchor() -> list[tuple[str, ...]]:
    return [("work", "against", "measured"), *((r.work, r.against, r.cell(ANCHOR)) for r in ANCHOR_ROWS)]


VARIANTS = "cpu-variants.csv"
OF_VARIANTS = "five steps of SAM's variants"


def variants() -> list[tuple[str, ...]]:
    names = [row["goal"].partition(" over ")[0] for row in measured(VARIANTS)]
    rows = [Row(name, "time of two passes and AdamW", OF_VARIANTS, (f"{name} over",)) for name in names]
    return [("variant", "against", "measured"), *((row.work, row.against, row.cell(VARIANTS)) for row in rows)]


PEERS = "cpu-peers.csv"
PEER_CASES = ("a step of SAM less the model, beside libraries", "a whole step of SAM, beside libraries")


def peers() -> list[tuple[str, ...]]:
    """Libraries by row; times of a step in those of two passes and the optimizer, or why there is none."""
    head = ("library", "GPT-2's 148 tensors, the model left out", "three layers of 64, batch 32, one thread")
    rows = list(table.read(DATA / PEERS))
    names = dict.fromkeys(row["contender"] for row in rows if row["contender"])

    def cell(name: str, case: str) -> str:
        of = [row for row in rows if row["case"] == case]
        why = [row["result"] for row in of if row["contender"] == name and row["result"]]
        ratio = [row["ratio"] for row in of if row["goal"] == f"{name} over {bench_peers.PLAIN}"]
        return why[0] if why else f"{float(ratio[0]):.3g}x" if ratio else "1x"

    return [head, *((name, *(cell(name, case) for case in PEER_CASES)) for name in names)]


def headlines() -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [("work", "against", "CPU", "GPU")]
    for work, against, ours, theirs in HEADLINES:
        on_gpu = (theirs.cell(H200, "bfloat16") or theirs.cell(H200)) if theirs is not None else "not measured"
        rows.append((work, against, ours.cell(CPU) or ours.cell(HOST), on_gpu))
    return rows


FIGURES = {**figures.FIGURES, **scaling_figure.FIGURES}

TABLES: dict[str, Callable[[], list[tuple[str, ...]]]] = {
    "headlines": headlines,
    "cpu": cpu,
    "host": host,
    "h200": h200,
    "h200-steps": h200_steps,
    "variants": variants,
    "peers": peers,
    "distillation": distillation,
    "anchor": anchor,
    **features.TABLES,
    **verdicts.TABLES,
}


def markdown(rows: list[tuple[str, ...]]) -> str:
    head, *body = rows
    lines = [head, ("---",) * len(head), *body]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def rebuilt(text: str) -> str:
    """A page's text with its tables made anew, and a link to each figure whose study was run."""

    def figure(match: re.Match[str]) -> str:
        is_drawn = FIGURES[match["name"]][1]()
        shown = f"![{match['caption']}]({match['name']}.png)" if is_drawn else "Not run: there is no figure yet."
        return f"{match['head']}{shown}\n{match['tail']}"

    text = TABLE.sub(lambda match: match["head"] + markdown(TABLES[match["name"]]()) + match["tail"], text)
    return FIGURE.sub(figure, text)


def main() -> None:
    for name in PAGES:
        page = Path(name)
        page.write_text(rebuilt(page.read_text(encoding="utf-8")), encoding="utf-8")
    figures.draw(Path("docs"), which=FIGURES)


if __name__ == "__main__":
    main()
