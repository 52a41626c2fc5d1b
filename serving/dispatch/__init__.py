"""The request router as a service: what it asks and hears, around the policy of `serving.routing`.

The proxy asks it for a replica before it forwards a request; replicas tell it of arrivals, first tokens and
ends over a connection of their own. No request or token passes through it.
"""
