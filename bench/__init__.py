"""Benchmarks: what fastpost's operations cost beside their floors and beside the published formulas."""
