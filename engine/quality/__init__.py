"""Quality of a model against its reference: held-out text, divergence, probes."""
