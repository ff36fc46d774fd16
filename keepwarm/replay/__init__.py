"""`keepwarm replay`: what an eviction policy would have been worth on recorded traffic.

trace      recorded requests as chains of block numbers, from the formats we know
simulate   a prefix store without bytes under one policy: tokens read
belady     the most that any policy could have read, knowing the future
plot       hit rate against capacity as one HTML file

Everything but reading and writing files is pure; the same trace, policy and capacity give the same numbers.
"""


class ReplayError(Exception):
    """The replay cannot go on; the message is one line that says what to do."""
