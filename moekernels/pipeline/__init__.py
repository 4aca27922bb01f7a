"""Pipeline parallelism: a schedule is data; it is checked, simulated, executed and drawn. Knows nothing of the model."""
