"""
Rewards: functions, reward models, rankers and rules that score completions.

May import: the modules at the top of the package. Never: training, generation, report, run.
"""
