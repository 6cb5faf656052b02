"""The reading side: tables, and aggregations that DuckDB streams over the parts, whatever fits in memory."""

import json
import tempfile
from collections.abc import Callable, Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any

import duckdb
import numpy as np

from adam_ghost.ledger import layout
from adam_ghost.ledger.layout import pa, pq
from adam_ghost.ledger.lock import Lock
from adam_ghost.ledger.writer import clean_description

# how one score enters an aggregate; s: a row of scores, p: its step's statistics, b: its step's books
VALUES = {
    "total": "sum(s.score)",
    "standardized": "avg(CASE WHEN p.spread > 0 THEN (s.score - p.mean) / p.spread ELSE 0 END)",
    "share": "sum(s.score / b.total)",
}
MEMORY = "450MB"
BLOCKS = 1000  # stretches of steps that are resampled; fewer steps are resampled one by one


def open_ledger(folder: str | Path) -> "LedgerReader":
    """Opens a ledger for reading; its run may still be writing.

    Raises:
        FileNotFoundError: the folder is not there, or holds no ledger.
    """
    return LedgerReader(folder)


class LedgerReader:
    """A ledger's tables and aggregates. Results are Arrow tables: ``.to_pandas()``, ``polars.from_arrow(...)``.

    Values, for samples and groups:

    * ``total``: sum of the scores over steps, in the validation loss's unit; positive = helped.
    * ``standardized``: mean of the scores standardised within their steps (early steps do not outweigh late ones): for finding
      bad samples.
    * ``share``: sum of the scores divided by their step's loss drop ``< P,g(B) >``. Steps that hardly moved the loss weigh much.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise FileNotFoundError(f"there is no ledger at {self.folder}")
        if not (self.folder / "run.json").exists() and not layout.parts(self.folder, "steps"):
            raise FileNotFoundError(f"{self.folder} holds no ledger (run.json and scores/*.parquet)")
        self._duck = duckdb.connect(":memory:")
        # many cores share the memory: above this the aggregation spills to the disk
        self._duck.execute(f"SET memory_limit='{MEMORY}'; SET preserve_insertion_order=false; SET enable_progress_bar=false")
        self._duck.execute(f"SET temp_directory={_quote(tempfile.gettempdir())}")
        self.refresh()

    def refresh(self) -> None:
        """Takes notice of parts written since."""
        some = layout.parts(self.folder, "scores")
        ids = pq.read_schema(some[0]).field("sample").type if some else pa.int64()
        self._integer_ids = ids == pa.int64()
        schemas = {"scores": layout.scores_schema(ids), "steps": layout.steps_schema(), "samples": layout.samples_schema(ids)}
        for table, schema in schemas.items():
            found = layout.parts(self.folder, table)
            if found:
                source = f"read_parquet({_quote(str(self.folder / table / 'r*-*.parquet'))})"
                if table == "samples":
                    # resumed runs describe again
                    source = f"(SELECT DISTINCT ON (sample) * FROM {source} ORDER BY sample)"
                self._duck.execute(f"CREATE OR REPLACE VIEW {table} AS SELECT * FROM {source}")
            else:
                self._duck.execute(f"DROP VIEW IF EXISTS {table}")
                self._duck.register(f"empty_{table}", schema.empty_table())
                self._duck.execute(f"CREATE VIEW {table} AS SELECT * FROM empty_{table}")

    @property
    def run(self) -> dict[str, Any]:
        """The run's id, settings and versions."""
        path = self.folder / "run.json"
        if path.exists():
            return json.loads(path.read_text(encoding="utf-8"))
        return json.loads(pq.read_schema(layout.parts(self.folder, "steps")[0]).metadata[layout.METADATA])

    def close(self) -> None:
        """Lets go of DuckDB's memory."""
        self._duck.close()

    def __enter__(self) -> "LedgerReader":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # tables

    def scores(self, steps: tuple[int, int] | None = None) -> pa.Table:
        """All scores of ``steps`` (first and last, both included)."""
        return self.sql(f"SELECT * FROM scores s {_where(None, steps)} ORDER BY step, rank")

    def steps(self, steps: tuple[int, int] | None = None) -> pa.Table:
        """The books: a row per step, target and rank."""
        return self.sql(f"SELECT * FROM steps s {_where(None, steps)} ORDER BY step, target, rank")

    def samples(self) -> pa.Table:
        """What samples are, as far as they were described."""
        return self.sql("SELECT * FROM samples")

    def sql(self, query: str, parameters: Iterable[Any] = ()) -> pa.Table:
        """Any question, in DuckDB's SQL, over the views ``scores``, ``steps`` and ``samples``."""
        return self._duck.sql(query, params=list(parameters)).to_arrow_table()

    # aggregates

    def totals(self, *, target: int = 0, steps: tuple[int, int] | None = None, value: str = "total") -> pa.Table:
        """Per sample: ``sample``, ``value``, and ``n``, how many scores went into it."""
        return self.sql(self._aggregate("s.sample", "sample", target, steps, value))

    def top(
        self,
        k: int = 10,
        *,
        harmful: bool = False,
        target: int = 0,
        steps: tuple[int, int] | None = None,
        value: str = "total",
        bootstrap: int = 0,
    ) -> pa.Table:
        """The ``k`` most helpful (or harmful) samples, with their description; ``low`` and ``high`` as in ``groups``."""
        order = "ASC" if harmful else "DESC"
        query = self._aggregate("s.sample", "sample", target, steps, value)
        found = self.sql(
            f'SELECT t.*, d."group", d.text, d.path FROM (SELECT * FROM ({query}) ORDER BY value {order}, sample LIMIT {int(k)}) t'
            f" LEFT JOIN samples d USING (sample) ORDER BY t.value {order}, sample"
        )
        if bootstrap:
            self._duck.register("wanted", found.select(["sample"]))
            return self._with_intervals(found, "sample", "s.sample", target, steps, value, bootstrap)
        return found

    def groups(
        self,
        groups: Mapping[Hashable, str] | None = None,
        *,
        target: int = 0,
        steps: tuple[int, int] | None = None,
        value: str = "total",
        bootstrap: int = 200,
    ) -> pa.Table:
        """Per group: ``group``, ``value``, ``n`` scores, ``samples``, ``mean`` (value per sample; per score, if standardised).

        ``low`` and ``high`` hold the middle 95% of ``value`` over ``bootstrap`` resamplings of the run's steps
        (of a thousand stretches of them, where there are more).

        Args:
            groups: id -> group; the ``group`` that samples were described with, if None. Other samples are in ``(none)``.
        """
        key = self._group_key(groups)
        # samples first: a million of them join their groups sooner than ten million scores
        each = self._aggregate("s.sample", "sample", target, steps, value)
        whole = "sum(s.value * s.n) / sum(s.n)" if value == "standardized" else "sum(s.value)"
        mean = "value" if value == "standardized" else "value / samples"
        found = self.sql(
            f'SELECT *, {mean} AS mean FROM (SELECT {key} AS "group", {whole} AS value, sum(s.n)::BIGINT AS n, count(*) AS samples'
            f" FROM ({each}) s {self._join(key)} GROUP BY {key}) ORDER BY value DESC"
        )
        return self._with_intervals(found, "group", key, target, steps, value, bootstrap) if bootstrap else found

    def by_step(self, groups: Mapping[Hashable, str] | None = None, *, target: int = 0, bins: int = 200) -> pa.Table:
        """Sums of scores by group over at most ``bins`` stretches of steps: ``step`` (the stretch's last), ``group``, ``value``."""
        ((first, last),) = self._duck.sql("SELECT min(step), max(step) FROM steps").fetchall()
        if first is None:
            first = last = 0
        width = max(1, -(-(last - first + 1) // bins))
        query = f'SELECT least({last}, {first} + (step - {first}) // {width} * {width} + {width - 1})::BIGINT AS step, "group"'
        query += f', sum(score) AS value FROM (SELECT s.step, s.score, {self._group_key(groups)} AS "group" FROM scores s'
        return self.sql(query + f" {self._join(groups)} {_where(target, None)}) GROUP BY ALL ORDER BY step")

    def show(self, sample: Hashable, target: int = 0) -> dict[str, Any]:
        """Everything about one sample: ``description``, ``steps`` (its scores) and the three values.

        Raises:
            KeyError: the ledger has no score of it.
        """
        sample = self._as_id(sample)
        found = self.sql("SELECT * FROM scores WHERE sample = ? AND target = ? ORDER BY step", [sample, target])
        if not found.num_rows:
            raise KeyError(f"the ledger has no score of sample {sample!r} for target {target}")
        description = self.sql("SELECT * FROM samples WHERE sample = ?", [sample]).to_pylist()
        where = f"s.sample = {sample if self._integer_ids else _quote(sample)}"
        asked = {v: self.sql(self._aggregate("s.sample", "sample", target, None, v, where=where)) for v in VALUES}
        # a step that did nothing has no shares
        values = {v: t["value"][0].as_py() if t.num_rows else None for v, t in asked.items()}
        return {"sample": sample, "description": description[0] if description else {}, "steps": found, **values}

    def describe(self, what: Mapping[Hashable, Any] | Callable[[Hashable], Mapping[str, Any] | None]) -> None:
        """Says what samples are (``group``, ``text``, ``path``, ``image``: see ``LedgerWriter``), replacing what was said before.

        Raises:
            Locked: the run is still writing.
        """
        ids = self.sql("SELECT DISTINCT sample FROM scores ORDER BY sample")["sample"].to_pylist()
        say = what if callable(what) else what.get
        rows = [clean_description(i, say(i)) for i in ids]
        lock = Lock(self.folder / "r0.lock")
        try:
            schema = layout.samples_schema(pa.int64() if self._integer_ids else pa.string())
            made = self.folder / "samples" / "r0-00000000.parquet"
            layout.write_part(pa.Table.from_pylist(rows, schema=schema), made)
            for part in layout.parts(self.folder, "samples"):
                if part != made:
                    part.unlink()
        finally:
            lock.release()
        self.refresh()

    # SQL

    def _aggregate(self, key: str, name: str, target: int, steps: Any, value: str, where: str = "") -> str:
        if value not in VALUES:
            raise ValueError(f"value must be one of {', '.join(VALUES)}, got {value!r}")
        joins = self._join(key) + _statistics(value, target, steps)
        condition = _where(target, steps) + (f" AND {where}" if where else "")
        columns = f'{key} AS "{name}", {VALUES[value]} AS value, count(*) AS n'
        return f"SELECT {columns} FROM scores s {joins} {condition} GROUP BY {key}"

    def _group_key(self, groups: Mapping[Hashable, str] | None) -> str:
        if groups is not None:
            ids = [self._as_id(i) for i in groups]
            table = {"sample": pa.array(ids, pa.int64() if self._integer_ids else pa.string())}
            self._duck.register("given", pa.table(table | {"group": pa.array([str(g) for g in groups.values()])}))
            return "coalesce(g.\"group\", '(none)')"
        return "coalesce(d.\"group\", '(none)')"

    @staticmethod
    def _join(key: Any) -> str:
        if (isinstance(key, str) and key.startswith("coalesce(g")) or isinstance(key, Mapping):
            return "LEFT JOIN given g ON g.sample = s.sample "
        if key is None or key.startswith("coalesce(d"):
            return "LEFT JOIN samples d ON d.sample = s.sample "
        return ""

    def _as_id(self, sample: Hashable) -> Hashable:
        """An id as the ledger holds it; the command line has only strings."""
        try:
            return int(sample) if self._integer_ids else str(sample)
        except ValueError:
            raise KeyError(f"this ledger's samples have integer ids, got {sample!r}") from None

    # uncertainty

    def _with_intervals(self, found: pa.Table, name: str, key: str, target: int, steps: Any, value: str, draws: int) -> pa.Table:
        """Adds the middle 95% of each row's value over resamplings of the steps."""
        each = {"total": "s.score", "share": "s.score / b.total"}.get(value)
        each = each or "CASE WHEN p.spread > 0 THEN (s.score - p.mean) / p.spread ELSE 0 END"
        only = " AND s.sample IN (SELECT sample FROM wanted)" if name == "sample" else ""
        ((first, last),) = self._duck.sql("SELECT min(step), max(step) FROM steps").fetchall()
        block = f"s.step // {max(1, -(-(last - first + 1) // BLOCKS)) if found.num_rows else 1}"
        rows = self.sql(
            f"SELECT {block} AS step, {key} AS k, sum({each}) AS x, count(*) AS n FROM scores s {self._join(key)}"
            f"{_statistics(value, target, steps)} {_where(target, steps)}{only} GROUP BY ALL"
        )
        all_steps = self.sql(f"SELECT DISTINCT {block} AS step FROM scores s {_where(target, steps)}")["step"].to_numpy()
        keys = found[name].to_pylist()
        place = {k: i for i, k in enumerate(keys)}
        step = np.searchsorted(np.sort(all_steps), rows["step"].to_numpy())
        column = np.array([place[k] for k in rows["k"].to_pylist()], dtype=np.int64)
        x, n = rows["x"].to_numpy(), rows["n"].to_numpy()
        generator = np.random.default_rng(0)
        drawn = np.empty((draws, len(keys)))
        for i in range(draws):
            weight = np.bincount(generator.integers(len(all_steps), size=len(all_steps)), minlength=len(all_steps))[step]
            drawn[i] = np.bincount(column, weight * x, len(keys))
            if value == "standardized":
                drawn[i] /= np.maximum(np.bincount(column, weight * n, len(keys)), 1)
        low, high = np.quantile(drawn, [0.025, 0.975], axis=0) if len(keys) else (np.empty(0), np.empty(0))
        return found.append_column("low", pa.array(low)).append_column("high", pa.array(high))


def _where(target: int | None, steps: tuple[int, int] | None) -> str:
    terms = [] if target is None else [f"s.target = {int(target)}"]
    if steps is not None:
        terms.append(f"s.step BETWEEN {int(steps[0])} AND {int(steps[1])}")
    return f"WHERE {' AND '.join(terms)}" if terms else ""


def _statistics(value: str, target: int, steps: Any) -> str:
    if value == "standardized":
        inner = f"SELECT step, avg(score) AS mean, stddev_pop(score) AS spread FROM scores s {_where(target, steps)} GROUP BY step"
        return f"JOIN ({inner}) p ON p.step = s.step"
    if value == "share":
        # of all ranks together; a step that did nothing has no shares
        inner = f"SELECT step, sum(total) AS total FROM steps s {_where(target, steps)} GROUP BY step HAVING sum(total) <> 0"
        return f"JOIN ({inner}) b ON b.step = s.step"
    return ""


def _quote(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
