"""Keeps a run alive and comfortable, and teaches nothing about fine-tuning.

It imports none of the seven modules; what it needs of them comes as arguments.
"""
