"""The planner: which layout fits a cluster, how fast it is, and which claims cannot all be true.

    memory   what a rank holds, counted
    cost     what an action takes, from a roofline
    search   the strategies, each one's step played on its own schedule
    claims   what a specification says, against what can be
    report   a screen, JSON, HTML, a trace, the launch line
    measure, calibrate   the roofline's constants on this machine, and predictions beside a run

A plan needs no kernel and runs no model; only `measure` does.
"""
