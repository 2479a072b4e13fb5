"""Studies: whether the methods help, on real models and real data.

    python -m fastpost.bench.studies NAME --data DIR [--device cuda] [--output CSV]

A study is a list of blocks; a block makes rows, and every row is on disk before the next one is begun (`records.py`).
Running and analysing are apart: `analysis.py` and `verdicts.py` read the CSV files alone.

`compare`, `probe`, `gap-sweep` and `demo` are programs with options, tables and pictures of their own (`results.py`).
"""
