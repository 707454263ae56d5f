"""
`larpo run`: the loop over iterations, its stages, and the folder in which they leave their results.

May import: the modules at the top of the package, training, generation, rewards, report. Never: commands, recall, cli.
"""
