"""Puts the page together: data from the ledger, scripts of its own, and nothing that it would have to fetch.

Texts from data are never part of the markup: they travel as JSON whose ``<``, ``>`` and ``&`` are escaped, and the page's script
sets them as text. A content security policy admits only the page's own scripts, by their hashes, and no network.
"""

import base64
import hashlib
import html
import json
from pathlib import Path
from string import Template
from typing import Any

from adam_ghost.ledger import layout
from adam_ghost.ledger.export import refuse_links
from adam_ghost.ledger.reader import VALUES, LedgerReader, open_ledger
from adam_ghost.report.gather import gather

_HERE = Path(__file__).parent


def write_report(
    ledger: "LedgerReader | str | Path",
    out: str | Path,
    *,
    value: str = "standardized",
    against: "LedgerReader | str | Path | None" = None,
    title: str | None = None,
) -> Path:
    """Writes the page of a ledger to ``out`` and returns that path; where there are several validation losses, it has them all.

    Args:
        ledger: or its folder.
        out: a plain file, or none yet; a symbolic link is not followed.
        value: by which samples are ranked, as in ``LedgerReader``.
        against: another run's ledger, or its folder, to set beside this one.
        title: of the page.

    Raises:
        FileNotFoundError: there is no ledger.
        ValueError: the ledger holds no scores; ``value`` is unknown; samples of the two ledgers cannot be matched; ``out`` is
            a link.
    """
    if not isinstance(ledger, LedgerReader):
        with open_ledger(ledger) as opened:
            return write_report(opened, out, value=value, against=against, title=title)
    if against is not None and not isinstance(against, LedgerReader):
        with open_ledger(against) as opened:
            return write_report(ledger, out, value=value, against=opened, title=title)
    if value not in VALUES:
        raise ValueError(f"value must be one of {', '.join(VALUES)}, got {value!r}")
    out = Path(out)
    refuse_links(out)
    page = _page(title or "Data attribution report", gather(ledger, value, against)).encode()
    layout.replace(out, lambda file: file.write(page))
    return out


def _page(title: str, data: dict[str, Any]) -> str:
    files = {p.name: p.read_text(encoding="utf-8") for p in _HERE.glob("page.*")}
    script = files["page.charts.js"] + files["page.js"]
    packed = json.dumps(data, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    for c in "<>&\u2028\u2029":
        packed = packed.replace(c, f"\\u{ord(c):04x}")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    first = data["targets"][0]["headline"]
    return Template(files["page.html"]).substitute(
        policy=f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data: blob:",
        title=html.escape(title),
        headline=html.escape(first["sentence"]),
        note=html.escape(first["note"]),
        style=files["page.css"],
        data=packed,
        script=script,
    )
