"""Benchmarks of dak_inductor: numbers come with the ceilings and the peers of the same run."""
