"""The tables of docs/studies.md: for each paper its claims, what was measured, and a verdict; then the numbers behind it.

A claim is confirmed or contradicted ("opposite") where the 95 % interval of the difference lies on one side of 0, over
runs and over examples alike; else it was not seen, with the number of runs and the error next to it. What no CSV file
holds was not run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from fastpost.bench.studies import analysis, lm, methods, records
from fastpost.bench.studies.analysis import NOT_RUN, Estimate
from fastpost.bench.studies.records import Row

Table = list[tuple[str, ...]]
NAMES = {
    "adamw": "AdamW", "sam": "SAM", "asam": "ASAM", "sam_lm": "SAM-LM",
    "r3f": "R3F", "r4f": "R4F", "rdrop": "R-Drop", "tram": "TRAM",
}  # fmt: skip
LANGUAGE_NAMES = NAMES | {
    "adamw_bf16": "AdamW, bfloat16 weights",
    "sam_bf16_nearest": "SAM, bfloat16 weights, rounded to nearest",
    "sam_bf16_stochastic": "SAM, bfloat16 weights, stochastic rounding",
    "sam_bf16_functional": "SAM, bfloat16 weights, functional",
    "sam_bf16_masters": "SAM, bfloat16 weights, float32 masters",
    "r3f_fused": "R3F, fused head", "neftune": "NEFTune",
}  # fmt: skip
SPLITS = {"dialogues": "dialogues (the domain)", "web": "web pages", "code": "code"}
TASKS = {"rte": "RTE", "mrpc": "MRPC", "cola": "CoLA"}
VERDICTS = ("claim", "measured", "difference", "n", "verdict")
FORGETTING = (("dialogue", "log-likelihood of dialogues", " nats per token"), ("pubmed", "PubMedQA, right answer", " nats"))
STUDIES = ("gap", "glue", "precision", "lm", "collapse", "forgetting")


def line(
    claim: str, measured: str, found: Estimate | None, unit: str = "", zero: float = 0.0, sign: int = 1
) -> tuple[str, ...]:
    """A row of a verdict table.

    Args:
        zero, sign: the claim is that sign * (difference - zero) > 0.
    """
    if found is None:
        return claim, measured, "", "", NOT_RUN
    turned = found if sign > 0 else Estimate(-found.mean, found.error, -found.high, -found.low, found.runs, found.examples)
    return claim, measured, shown(found, unit), found.n, turned.against(sign * zero)


def shown(found: Estimate | None, unit: str = "", signed: bool = True) -> str:
    """Mean and standard error."""
    if found is None:
        return ""
    digits = 2 if max(abs(found.mean), found.error) >= 0.1 else 4
    return f"{found.mean:{'+' if signed else ''}.{digits}f} ± {found.error:.{digits}f}{unit}"


def place_name(place: str) -> str:
    task, _, share = place.partition("/")
    return f"{TASKS.get(task, task)}, {share} % of the data"


def _glue(folder: Path, claims: Iterable[tuple[str, str, str]]) -> Table:
    """Of (claim, method, other method), a row per task and share."""
    rows = analysis.rows_of("glue", folder)
    found: Table = []
    for claim, method, other in claims:
        measured = f"{NAMES[method]} less {NAMES[other]}"
        lines = [
            line(claim, f"{measured}, {place_name(place)}", analysis.gain(rows, place, method, other), " points")
            for place in analysis.places(rows)
            if analysis.gain(rows, place, method, other)
        ]
        found += lines or [line(claim, f"{measured}, GLUE tasks", None)]
    return found


def sam(folder: Path = analysis.DATA) -> Table:
    rows, forgotten = analysis.rows_of("glue", folder), analysis.rows_of("forgetting", folder)
    beats = "Fine-tuning with SAM does better than without"
    return [
        VERDICTS,
        *_glue(folder, [(beats, "sam", methods.PLAIN), (f"{beats}; ascent on a quarter", "sam_lm", methods.PLAIN)]),
        line("The ascent on a quarter costs some 25 %, not 100 %", "time of a step over AdamW's, less than 1.5",
             analysis.price(rows, "sam_lm"), " times", 1.5, -1),
        *_few(rows),
        *_lm(folder, "Language models too gain from SAM (2310.03646)", "sam"),
        *(
            line("Less is forgotten after SAM (2605.02105)",
                 f"{what} after fine-tuning on code{' and rounding to 4 bits' if bits == 4 else ''}: SAM less AdamW",
                 analysis.retained(forgotten, score, bits), unit)
            for bits in (32, 4) for score, what, unit in FORGETTING
        ),
    ]  # fmt: skip


def _few(rows: list[Row]) -> Table:
    claim, measured = "The gain is largest where data are few", "SAM's gain at 5 % less that at 100 % of the data"
    tasks = dict.fromkeys(place.partition("/")[0] for place in analysis.places(rows))
    found = [(task, analysis.gain_where_few(rows, task, "sam")) for task in tasks]
    lines = [line(claim, f"{measured}, {TASKS.get(task, task)}", e, " points") for task, e in found if e is not None]
    return lines or [line(claim, measured, None)]


def _lm(folder: Path, claim: str, method: str) -> Table:
    rows = analysis.rows_of("lm", folder)
    name = NAMES.get(method, method)
    return [
        line(claim, f"SmolLM2's loss on {place} after fine-tuning on dialogues: AdamW less {name}",
             analysis.lower_loss(rows, split, method), " nats per token")
        for split, place in SPLITS.items()
    ]  # fmt: skip


def r3f(folder: Path = analysis.DATA) -> Table:
    rows, collapsed = analysis.rows_of("glue", folder), analysis.rows_of("collapse", folder)
    beats = "does better than standard fine-tuning"
    return [
        VERDICTS,
        *_glue(folder, [(f"R3F {beats}", "r3f", methods.PLAIN), (f"R4F {beats}", "r4f", methods.PLAIN)]),
        *_glue(folder, [("Noise on the embeddings adds to what dropout does", "r3f", "rdrop")]),
        line("A step costs 4/3 of a plain one", "time of a step over AdamW's, less than 1.5",
             analysis.price(rows, "r3f"), " times", 1.5, -1),
        *_lm(folder, "Noise regularises language models too (2310.03646)", "r3f"),
        *(_collapse(collapsed) or [line("Representations collapse less", "probes after a chain of tasks", None)]),
    ]  # fmt: skip


def _collapse(rows: list[Row]) -> Table:
    found: Table = []
    for task in analysis.probed_tasks(rows):
        for method in ("r3f", "r4f"):
            measured = f"probe of {TASKS.get(task, task)} after the chain: {NAMES[method]} less AdamW"
            told = line("Representations collapse less", measured, analysis.probed(rows, task, method), " points")
            found.append((*told[:-1], analysis.NO_SIGNAL) if analysis.sees_nothing(rows, task) else told)
    return found


def gap(folder: Path = analysis.DATA) -> Table:
    found = analysis.climbs(analysis.rows_of("gap", folder))
    last = max((max(climb.states) for climb in found), default=0)
    kept = "in the state that other examples chose, less the untouched model"
    at_end = f"state {last}"
    lines = [
        line("A few steps uphill on one text help in dialogue", f"log-likelihood of dialogues, {kept}",
             analysis.changed(found, "dialogue"), " nats per token"),
        line("same", f"F1 of generated answers, {kept}", analysis.f1_change(found)),
        line("They help in classification", f"PubMedQA accuracy, {kept}", analysis.changed(found, "pubmed_accuracy")),
        line("same", f"PubMedQA, log-probability of the right answer, {kept}", analysis.changed(found, "pubmed"), " nats"),
    ]  # fmt: skip
    for score, what in (("dialogue", "dialogues"), ("pubmed", "PubMedQA")):
        lines += [
            line("A fixed number of steps helps, nothing being chosen", f"{what}: state {state} less the untouched model",
                 analysis.changed(found, score, state), " nats")
            for state in ((1, last) if found else (0,))
        ]  # fmt: skip
        lines.append(
            line("Text unlike the training data (code) helps more, or hurts less",
                 f"{what}: GitHub's texts less Pile-CC's, {kept}",
                 analysis.between(found, "github", "pile-cc", score), " nats")
        )  # fmt: skip
        lines.append(
            line("same", f"{what}: GitHub's texts less Pile-CC's, {at_end}",
                 analysis.between(found, "github", "pile-cc", score, last), " nats")
        )  # fmt: skip
        for control, name in (("random", "a random direction of equal length"), ("mle", "as many steps downhill")):
            lines.append(
                line("It is the ascent that helps", f"{what}: {at_end} less {name}",
                     analysis.changed(found, score, last, control), " nats")
            )  # fmt: skip
    return [VERDICTS, *lines]


def glue_scores(folder: Path = analysis.DATA) -> Table:
    """Every method's score, what was chosen for it, and what a step costs."""
    rows = analysis.rows_of("glue", folder)
    places = analysis.places(rows)
    scored = [f"{place_name(place)}, score" for place in places] or ["score"]
    head = ("method", *scored, "time of a step, AdamW = 1")
    body: Table = []
    for method, name in NAMES.items():
        scores = [shown(analysis.mean_score(rows, place, method), signed=False) for place in places]
        if any(scores):
            body.append(
                (name, *scores, "1" if method == methods.PLAIN else shown(analysis.price(rows, method), signed=False))
            )
    if body:
        guesses = {row["block"].partition("/")[2]: row["scores"]["score"] for row in rows if row["method"] == "majority"}
        always = (f"{100 * guesses[place.partition('/')[0]]:.2f}" for place in places)
        body.append(("always the most frequent label", *always, ""))
    return [head, *(body or [("none", NOT_RUN, NOT_RUN)])]


def language_models(folder: Path = analysis.DATA) -> Table:
    """Of the `lm` study: what was chosen for every method, its perplexities, and by how much its loss exceeds AdamW's."""
    rows = analysis.rows_of("lm", folder)
    reported = [row for row in rows if row["block"] == f"report/{lm.PLACE}"]
    head = (
        "method", "chosen", "runs",
        *(f"perplexity, {place}" for place in SPLITS.values()),
        *(f"loss less AdamW's, nats per token, {place}" for place in SPLITS.values()),
    )  # fmt: skip
    body: Table = []
    for method, name in LANGUAGE_NAMES.items():
        of = [row for row in reported if row["method"] == method]
        if not of:
            continue
        chosen = ", ".join(f"{key} {value:g}" for key, value in of[0]["hyper"].items())
        means = [shown(analysis.estimate([row["scores"][split] for row in of]), signed=False) for split in SPLITS]
        more = [analysis.lower_loss(rows, split, methods.PLAIN, method) for split in SPLITS]
        body.append((name, chosen, str(len(of)), *means, *("" if method == methods.PLAIN else shown(e) for e in more)))
    return [head, *(body or [("none", *[""] * 7, NOT_RUN)])]


def zero_shot(folder: Path = analysis.DATA) -> Table:
    """Of the `forgetting` study: the scores of the untouched model, and of what AdamW and SAM make of it."""
    rows = analysis.rows_of("forgetting", folder)
    head = ("model", "weights", "runs", *(f"{what},{unit}" for _, what, unit in FORGETTING), "PubMedQA, accuracy")
    scores = (*(score for score, _, _ in FORGETTING), "pubmed_accuracy")
    names = {"untouched": "untouched"} | {key: f"fine-tuned on code with {NAMES[key]}" for key in (methods.PLAIN, "sam")}
    body: Table = []
    for bits, (method, name) in ((bits, item) for bits in (32, 4) for item in names.items()):
        of = [row for row in rows if row["method"] == method and row["hyper"]["bits"] == bits]
        if of:
            body.append(
                (name, f"{bits} bits", str(len(of)), *(_mean_of([r["scores"][score] for r in of]) for score in scores))
            )
    return [head, *(body or [("none", *[""] * 4, NOT_RUN)])]


def _mean_of(values: list[float]) -> str:
    """With the standard error where there are several."""
    found = analysis.estimate(values)
    if found is None:
        return f"{values[0]:.3f}"
    return f"{found.mean:.3f} ± {found.error:.3f}"


def gap_states(folder: Path = analysis.DATA) -> Table:
    """Per text: the states that were kept, and what became of each score."""
    found = analysis.climbs(analysis.rows_of("gap", folder))
    head = (
        "text", "kept for dialogue / PubMedQA", "dialogue, nats per token", "PubMedQA, nats", "PubMedQA, accuracy",
        "last state: dialogue", "last state: PubMedQA", "drift",
    )  # fmt: skip
    body: Table = []
    for climb in found:
        last = max(climb.states)
        cells = [f"{_mean(climb.change(score)):+.4f}" for score in ("dialogue", "pubmed", "pubmed_accuracy")]
        ends = [f"{_mean(climb.change(score, last)):+.4f}" for score in ("dialogue", "pubmed")]
        states = f"{climb.kept('dialogue')} / {climb.kept('pubmed')}"
        body.append((climb.text, states, *cells, *ends, f"{climb.last['examples']['drift'][-1]:.2f}"))
    return [head, *(body or [("none", NOT_RUN, NOT_RUN)])]


def perturbations(folder: Path = analysis.DATA) -> Table:
    """What became of SAM's perturbation, by radius and way: means over batches."""
    rows = [row for row in analysis.rows_of("precision", folder) if row["block"] == "sam"]
    head = (
        "rho", "weights, perturbation", "seen: norm / rho", "cosine with e", "gain", "gain by layer",
        "loss rise / true", "cosine of g(w + e) with float32's", "of g(w + e) - g(w)", "batches",
    )  # fmt: skip
    body: Table = []
    radii = sorted({row["hyper"]["rho"] for row in rows})
    for rho, kind in ((rho, kind) for rho in radii for kind in dict.fromkeys(row["method"] for row in rows)):
        of = [row for row in rows if row["method"] == kind and row["hyper"]["rho"] == rho]
        if not of:
            continue
        scores = {name: _mean([row["scores"][name] for row in of]) for name in of[0]["scores"]}
        ratio = _mean([row["scores"]["rise"] / row["scores"]["true_rise"] for row in of])
        gains = [found["gain"] for row in of for part, found in row["examples"].items() if part not in ("norm", "embedding")]
        spread = "" if "functional" in kind else f"{min(gains):.2f} to {max(gains):.2f}"
        cells = [f"{scores[name]:.2f}" for name in ("norm", "cosine", "gain")]
        cosines = [f"{scores[name]:.3f}" for name in ("second_cosine", "change_cosine")]
        body.append((f"{rho:g}", kind, *cells, spread, f"{ratio:.2f}", *cosines, str(len(of))))
    return [head, *(body or [("", "", NOT_RUN)])]


def noise(folder: Path = analysis.DATA) -> Table:
    """What is left of R3F's noise in the embeddings: its cosine with what was drawn, by dtype."""
    rows = [row for row in analysis.rows_of("precision", folder) if row["block"] == "noise"]
    kinds = list(dict.fromkeys(row["method"] for row in rows))
    body: Table = []
    for eps in sorted({row["hyper"]["eps"] for row in rows}):
        of = {kind: [r["scores"] for r in rows if r["method"] == kind and r["hyper"]["eps"] == eps] for kind in kinds}
        cells = [f"{_mean([s['cosine'] for s in of[k]]):.3f} ({_mean([s['norm'] for s in of[k]]):.2f})" for k in kinds]
        body.append((f"{eps:g}", str(len(of[kinds[0]])), *cells))
    return [("eps", "batches", *kinds), *body] if body else [("eps", "batches", "cosine"), ("", "", NOT_RUN)]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def runs(folder: Path = analysis.DATA) -> Table:
    """Every study: how many rows, where and by what they were made."""
    body: Table = []
    for study in STUDIES:
        files = analysis.files_of(study, folder)
        if not files:
            body.append((study, "0", NOT_RUN, "", "", "", ""))
        for path in files:
            rows = records.read(path)
            # The last row of a climb holds the time of its states as well, which have rows of their own.
            minutes = sum(row["cpu_seconds"] for row in rows if not row["hyper"].get("last")) / 60
            each = [", ".join(dict.fromkeys(str(row[name]) for row in rows)) for name in ("machine", "commit", "date")]
            body.append((study, str(len(rows)), f"{minutes:.0f}", *each, f"[CSV](../bench/data/{path.name})"))
    return [("study", "rows", "processor minutes", "machine", "commit", "date", "file"), *body]


TABLES: dict[str, Callable[[], Table]] = {
    "studies-runs": runs,
    "studies-sam": sam,
    "studies-r3f": r3f,
    "studies-gap": gap,
    "studies-gap-texts": gap_states,
    "studies-glue": glue_scores,
    "studies-precision": perturbations,
    "studies-noise": noise,
    "studies-lm": language_models,
    "studies-forgetting": zero_shot,
}
