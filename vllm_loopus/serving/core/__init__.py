"""The scheduler's side: which requests run, which blocks they hold, what passes cost."""
