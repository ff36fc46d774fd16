"""`keepwarm bench`: how fast a server of our own is, through HTTP as clients reach it, beside raw llama.cpp.

stats      medians and percentiles (pure)
prose      texts of given lengths from our own documentation (pure)
sse        server-sent events and the timings comment, read back (pure)
report     the JSON of a run, its ratios against targets, the tables
machine    what a run was measured on
client     a lean HTTP/1.1 client that notes when things arrive
service    the server process as the benches use it
raw        the baseline's own process: direct llama.cpp calls, no scheduler, no store
baseline   the other end of that process's pipe
prompts    prompts as the server builds them, so that raw evaluates the same token ids in the same ubatches
ttft       time to first token, decoding, several users; what it comes to: ttft_report
gateway    the gateway's own cost, with the scripted engine; what it comes to: gateway_report
store      restarts, restoring from disk, durability, no reuse, the index; what it comes to: store_report; its parts:
           store_servers, store_restore, store_disk, store_index
agent      a coding agent's session, caching on and off; what it comes to: agent_report; what is asked: agent_session; read
           back by messages
pinning    the gateway alone on a core
"""


class BenchError(Exception):
    """The bench cannot go on; the message is one line that says what to do."""
