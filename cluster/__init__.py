"""The control plane: ingress, router, engines as a Ray Serve application, and the command line."""
