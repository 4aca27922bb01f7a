"""Pipeline parallelism: a schedule is data, to be checked, simulated, executed and drawn.

Knows nothing of the model: a stage is any callable.
"""
