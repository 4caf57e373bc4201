"""The router: a budget of KV pages over all groups, and who may use it when.

Pure Python, no Ray, no torch. Time is an argument everywhere, so the very same
code runs in production, in the simulator and under property tests.
"""
