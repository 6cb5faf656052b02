"""Texts that a spreadsheet would run."""

# what begins a formula, the wide forms included, or is dropped before one is looked for
BEGINNINGS = "=+-@\t\r\n\uff1d\uff0b\uff0d\uff20"


def neutral(text: str) -> str:
    """``text``, with an apostrophe before what a spreadsheet would run."""
    return f"'{text}" if text[:1] and text[0] in BEGINNINGS else text
