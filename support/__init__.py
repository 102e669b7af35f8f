"""Keeps a run alive and comfortable, and teaches nothing about fine-tuning.

It imports none of the seven modules; what it needs of them comes as arguments.
"""

import os

VERSION = "0.1.0"  # what --version prints

# huggingface_hub reads these when it is imported, and would take '' for the working directory
PREFIXES = "HF_", "PLAINTUNE_", "HOME", "XDG_"
for name, value in list(os.environ.items()):
    if value == "" and name.startswith(PREFIXES):
        del os.environ[name]
if os.path.expanduser("~") == "~":  # a user without a home: caches go to the working directory
    os.environ["HOME"] = os.getcwd()
