"""What keeps a run alive and comfortable, and teaches nothing about fine-tuning. It imports none of the seven modules."""
