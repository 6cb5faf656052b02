"""Inside a training loop: when the direction is formed, and what becomes of the numbers."""
