"""The worker's side: the computing of a step over paged memory. It knows no model runner."""
