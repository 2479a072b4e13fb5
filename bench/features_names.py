"""Which losses a library has by name: its source is read for classes and functions, and nothing of it is run."""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path

from fastpost.bench.features import Finding

REGULARISERS = {
    "R3F": r"r3f",
    "R4F": r"r4f",
    "R-Drop": r"(?-i:RDrop(?!out|Path))|(?:^|_)r_drop(?:_|$)",
    "SMART": r"(?-i:SMART)",
    "FreeLB": r"freelb",
    "NEFTune": r"neftune",
    "SymNoise": r"sym_?noise",
    "HyPe": r"(?-i:HyPe(?!r))",
}
UNLEARNING = {
    "gradient ascent": r"(?:grad(?:ient)?_?)ascent|^ascent_loss",
    "GradDiff": r"grad_?diff_?(?:loss)?$",
    "NPO": r"(?:^|_)npo",
    "SimNPO": r"sim_?npo",
    "RMU": r"(?:^|_)rmu",
    "WGA (weighted ascent)": r"wga$|weighted_ascent",
    "SatImp": r"satimp",
    "UNDIAL": r"undial",
}
# fastpost has one window for all three; a GRU elsewhere is a recurrent layer.
SURGERY = {
    "PCGrad": r"pc_?grad|surgery_?window",
    "GRU (rectified gradients)": r"gru_?(?:unlearn|rectif|project)|surgery_?window",
    "SAGO": r"(?:^|_)sago|(?-i:SAGO)|surgery_?window",
}
FAMILIES = {
    "regularisers": (REGULARISERS, ("fastpost", "trl", "transformers", "liger_kernel", "pytorch_optimizer", "smart_pytorch",
                                    "fairseq")),
    "unlearning": (UNLEARNING, ("fastpost", "trl", "transformers", "open_unlearning")),
    "gradient surgery": (SURGERY, ("fastpost", "pytorch_optimizer", "trl", "transformers", "open_unlearning")),
}  # fmt: skip


def findings(library: str) -> list[Finding]:
    asked = {family: patterns for family, (patterns, libraries) in FAMILIES.items() if library in libraries}
    if not asked:
        return []
    names = defined(library)
    found = []
    for family, patterns in asked.items():
        for feature, pattern in patterns.items():
            hits = [f"{name} in {where}" for name, where in names if re.search(pattern, name, re.IGNORECASE)]
            found.append(
                Finding(family, feature, "yes" if hits else "no", "; ".join(hits[:3]) or f"{len(names):,} names read")
            )
    return found


def defined(library: str) -> list[tuple[str, str]]:
    """Names of the classes and functions of a package, private ones left out, and the file of each within it."""
    spec = importlib.util.find_spec(library)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"{library} cannot be found")
    root = Path(next(iter(spec.submodule_search_locations)))
    names = []
    for path in sorted(root.rglob("*.py")):
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        kinds = (ast.ClassDef, ast.FunctionDef)
        names += [
            (node.name, str(path.relative_to(root)))
            for node in ast.walk(tree)
            if isinstance(node, kinds) and not node.name.startswith("_")
        ]
    return names
