"""What a user may set: options of an engine, knobs of a request, and their names."""
