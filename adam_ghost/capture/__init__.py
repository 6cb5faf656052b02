"""Who belongs to which row: layer calls are recorded, and the batch is followed between them. Knows no optimizer."""
