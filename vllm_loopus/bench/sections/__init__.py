"""Sections of a run: each measures one thing and returns it as JSON."""
