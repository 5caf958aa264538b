"""Benchmarks: each prints the machine, the date and the commit beside its figures."""
