"""`keepwarm demo`: a client of the server like any other, which starts one of its own and measures what caching does.

corpus    the knowledge base: our own documentation, cut to a length
client    questions through the openai SDK, with the time to the first token
report    what it cost and saved, as a table (pure)
story     the order of events; the server process is launch's
"""


class DemoError(Exception):
    """The demo cannot go on; the message is one line that says what to do."""
