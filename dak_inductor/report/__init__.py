"""Benchmark records, plans and explanations as one self-contained HTML page."""
