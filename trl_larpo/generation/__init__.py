"""
Sampling completions, in this process or from servers.

May import: the modules at the top of the package. Never: training, rewards, report, run.
"""
