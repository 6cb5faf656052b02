"""From recorded calls and a direction to scores; a kind of layer is a file. Knows no optimizer."""
