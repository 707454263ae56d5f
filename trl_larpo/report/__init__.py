"""
The page of a run, and its pictures.

May import: the modules at the top of the package. Never: training, generation, rewards, run.
"""
