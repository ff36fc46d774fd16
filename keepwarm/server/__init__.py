"""The HTTP edge: bytes and connections on one side, dialects and the gateway's services on the other.

    connection.py  what uvicorn's HTTP parser may take in: header bytes, time, number of connections
    exchange.py    one request and its answer: bounded body, whole replies, event streams, disconnects
    endpoints.py   what each call does: parse → gateway → render
    routes.py      the table of routes under their mounts; the Starlette application made from it
    page.py        /docs, from the OpenAPI document

Every answer carries `x-request-id` (the turn id) and every error is in the words of its mount's dialect.
"""
