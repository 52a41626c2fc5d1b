"""Tenants: whose key a request brings, what that tenant may have, and what it used.

`ledger` is the arithmetic, plain and without a clock of its own; `server` and `deployment` run one of it for
all replicas, `link` asks it, `gate` stands in the way of a replica's requests.
"""
