"""The front end: the OpenAI server, its answers, statistics of requests, metrics."""
