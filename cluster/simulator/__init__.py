"""A discrete-event simulation of a fleet: the router's own code against modelled groups."""
