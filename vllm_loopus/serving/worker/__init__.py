"""The worker's side: computes steps over paged memory, independent of the model runner."""
