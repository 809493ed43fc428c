"""Attention over tiered keys and values: decode kernel, staged prefill, and what chooses."""
