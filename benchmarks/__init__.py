"""Benchmarks: each file answers one question, beside a baseline in the same run."""
