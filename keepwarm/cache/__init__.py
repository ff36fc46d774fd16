"""The logical side of caching: prompts from messages, named objects with a lifetime, and the plan for one turn."""
