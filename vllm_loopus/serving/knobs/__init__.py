"""What a user can set: options of an engine, knobs of a request, and their names."""
