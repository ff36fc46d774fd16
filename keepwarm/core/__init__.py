"""The values that pass between layers: requests, prompts, plans, events, errors. Pure: no I/O, no clock, no threads."""
