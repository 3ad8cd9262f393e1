"""One turn: request, plan, catch-up, prefill, decode, finish."""
