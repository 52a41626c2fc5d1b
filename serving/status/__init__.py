"""The status page: what runs and how it does, of all replicas, for those without Grafana."""
