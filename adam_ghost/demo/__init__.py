"""The demo: a small GPT learns English and Python from this machine's own files, attributed while it trains."""
