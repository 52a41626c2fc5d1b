"""Which replica a request goes to: policies and their books, without Ray, threads or asyncio."""

from serving.routing.baselines import LeastRequests, PowerOfTwo, PrefixAffinity, RoundRobin
from serving.routing.costs import CostModel
from serving.routing.fleet import FleetFullError, UnknownReplicaError
from serving.routing.policy import LatencyPolicy, LatencyPolicySettings
from serving.routing.prefix_index import chain_hashes, text_chain_hashes
from serving.routing.requests import Decision, Overloaded, ReplicaStats, RequestKind, RoutedRequest
from serving.routing.router import Policy, Router

__all__ = [
    "CostModel",
    "Decision",
    "FleetFullError",
    "LatencyPolicy",
    "LatencyPolicySettings",
    "LeastRequests",
    "Overloaded",
    "Policy",
    "PowerOfTwo",
    "PrefixAffinity",
    "ReplicaStats",
    "RequestKind",
    "RoundRobin",
    "RoutedRequest",
    "Router",
    "UnknownReplicaError",
    "chain_hashes",
    "text_chain_hashes",
]
