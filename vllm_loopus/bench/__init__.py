"""Benchmarks: engines side by side on one machine, as ratios with their spread."""
