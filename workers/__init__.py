"""The data plane: engine, scheduler, pages, model and parallelism."""
