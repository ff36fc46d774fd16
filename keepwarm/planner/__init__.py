"""`keepwarm plan`: what recorded requests would have cost under every caching scheme.

traffic    prompts as chains of blocks, with the places where a client could set a mark
schemes    a caching scheme replayed over traffic: tokens by class, turn by turn
cost       those tokens at a price sheet's prices
marks      which places for marks, or for an object, pay best
plan       every scheme and lifetime, as rows
prices     which prices each scheme is shown with
log        reads request logs and traces
bodies     request bodies as the prompts that the server would see
plot       the rows as one HTML file

Reading and writing files is in `log` and in the command; `bodies` needs the model's vocabulary. All else is pure: the
same traffic and prices give the same numbers.
"""


class PlanError(Exception):
    """The plan cannot be made; the message is one line that says what to do."""
