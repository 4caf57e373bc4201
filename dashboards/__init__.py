"""What operators look at: Grafana dashboards, alerts and docs/metrics.md, made from the table of
metrics. `make dashboards` writes them."""
