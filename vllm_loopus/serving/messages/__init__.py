"""Messages between scheduler and worker, and from both to the front end."""
