"""Keeps a run alive and comfortable, and teaches nothing about fine-tuning.

It imports none of the seven modules; what it needs of them comes as arguments.
"""

import os

# huggingface_hub reads these when it is imported, and would take '' for the working directory
for name in list(os.environ):
    if name.startswith(("HF_", "PLAINTUNE_", "HOME", "XDG_")) and not os.environ[name]:
        del os.environ[name]
if os.path.expanduser("~") == "~":  # a user without a home: caches go to the working directory
    os.environ["HOME"] = os.getcwd()
