"""`keepwarm plan`: what recorded requests would have cost under every caching scheme.

traffic    prompts as chains of blocks, with the places where a client could set a mark
schemes    a caching scheme replayed over traffic: tokens by class, turn by turn
cost       those tokens at a price sheet's prices
marks      which places for marks, or for an object, pay best
plan       every scheme and lifetime, as rows
prices     which prices each scheme is shown with
log        reads request logs and traces of block numbers
texts      reads traces of whole prompts as texts
bodies     request bodies as the prompts that the server would see
numbers    numbers for prefixes of tokens
plot       the rows as one HTML file

Reading and writing files is in `log`, `texts` and in the command; `bodies` and `texts` need the model's vocabulary. All else is pure: the
same traffic and prices give the same numbers.
"""


class PlanError(Exception):
    """The plan cannot be made; the message is one line that says what to do."""
