"""One step, checked and put together: its gradients, its direction, what its scores explain."""
