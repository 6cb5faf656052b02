"""``python -m adam_ghost``."""

from adam_ghost.cli import app

if __name__ == "__main__":
    app(prog_name="adam-ghost")
