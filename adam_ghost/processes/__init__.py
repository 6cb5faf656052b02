"""A model that several processes train together: what each process has of a step, and what has to be joined."""
