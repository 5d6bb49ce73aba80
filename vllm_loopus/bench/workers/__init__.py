"""Engines under test, each in a process of its own, driven by JSON lines."""
