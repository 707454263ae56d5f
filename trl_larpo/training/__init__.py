"""
Training on candidate lists: the trainer, its options, and everything between a dataset row and the loss.

May import: the modules at the top of the package. Never: generation, rewards, report, run.
"""
