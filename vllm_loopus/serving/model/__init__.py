"""The models as vLLM runs them, and where their K/V and states live in paged memory."""
