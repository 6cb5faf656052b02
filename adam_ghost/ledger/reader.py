"""The reading side: tables, and aggregations that DuckDB streams over the parts, whatever fits in memory."""

import tempfile
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from adam_ghost.extras import how_to_install
from adam_ghost.ledger import layout
from adam_ghost.ledger.check import Checker, read_settings
from adam_ghost.ledger.ids import check_count
from adam_ghost.ledger.layout import pa, pq
from adam_ghost.ledger.resampling import middle, resample

import pyarrow.dataset  # isort: skip  (after layout, which says what to install where pyarrow is missing)

try:
    import duckdb
except ImportError as error:
    raise ImportError(f"adam_ghost: reading a ledger needs duckdb: {how_to_install('ledger')}") from error

_Z = "CASE WHEN p.spread > 0 THEN (s.score - p.mean) / p.spread ELSE 0 END"
# how one score enters a value, and how many make one; s: a row of scores, p: its step's mean and standard deviation
EACH = {"standardized": _Z, "total": "s.score"}
VALUES = {"standardized": f"avg({_Z})", "total": "sum(s.score)"}
MEMORY = "450MB"
BLOCKS = 1000  # stretches of steps that are resampled; fewer steps are resampled one by one


class _Key(NamedTuple):
    """What scores ``s`` are grouped by: an expression in SQL, and the join that it needs."""

    sql: str
    join: str = ""


_SAMPLE = _Key("s.sample")
_DESCRIBED = _Key("coalesce(d.\"group\", '(none)')", "LEFT JOIN samples d ON d.sample = s.sample")
_GIVEN = _Key("coalesce(g.\"group\", '(none)')", "LEFT JOIN given g ON g.sample = s.sample")


def open_ledger(folder: str | Path, *, check: bool = True) -> "LedgerReader":
    """Opens a ledger for reading; its run may still be writing.

    Args:
        folder: of the ledger.
        check: refuse a ledger of which a part is missing, damaged or another run's; otherwise read what can be read.

    Raises:
        FileNotFoundError: the folder is not there, or holds no ledger.
        ValueError: it is of another format.
        DamagedLedger: naming the part that is wrong.
    """
    return LedgerReader(folder, check=check)


class LedgerReader:
    """A ledger's tables and aggregates. Results are Arrow tables: ``.to_pandas()``, ``polars.from_arrow(...)``.

    Values, for samples and groups:

    * ``standardized``: mean of the scores standardised within their steps (early steps do not outweigh late ones): for finding
      bad samples.
    * ``total``: sum of the scores over steps, in the validation loss's unit; positive = helped.

    ``target`` is which of the validation losses, where ``val_loss`` returned several; ValueError if the ledger has no such.
    ``steps`` are the first and the last, both included.
    """

    def __init__(self, folder: str | Path, *, check: bool = True):
        self.folder = Path(folder).absolute()
        if not self.folder.is_dir():
            raise FileNotFoundError(f"there is no ledger at {folder}")
        if not (self.folder / "run.json").exists() and not layout.parts(self.folder, "steps"):
            raise FileNotFoundError(f"{folder} holds no ledger (run.json and scores/*.parquet)")
        written = self.run.get("format") if check else layout.FORMAT
        if written not in (None, layout.FORMAT):
            raise ValueError(
                f"the ledger at {folder} is of format {written}, and this version of adam_ghost reads format {layout.FORMAT}:"
                " read it with the version that wrote it"
            )
        self._checker = Checker(self.folder) if check else None
        self._duck = duckdb.connect(":memory:")
        # many cores share the memory: above this the aggregation spills to the disk
        self._duck.execute(f"SET memory_limit='{MEMORY}'; SET preserve_insertion_order=false; SET enable_progress_bar=false")
        self._duck.execute(f"SET temp_directory={_quote(tempfile.gettempdir())}")
        self.refresh()

    def refresh(self) -> None:
        """Takes notice of parts written since.

        Raises:
            DamagedLedger: naming the part that is wrong.
        """
        # books first: a part that is written meanwhile has no books yet, and its scores do not count as missing
        found = {table: layout.parts(self.folder, table) for table in ("steps", "scores", "tokens", "samples")}
        if self._checker is not None:
            self._checker.check(found)
        ids = pq.read_schema(found["scores"][0]).field("sample").type if found["scores"] else pa.int64()
        self._integer_ids = ids == pa.int64()
        schemas = {"scores": layout.scores_schema(ids), "tokens": layout.tokens_schema(ids)}
        schemas |= {"steps": layout.steps_schema(), "samples": layout.samples_schema(ids)}
        for table, schema in schemas.items():
            # Arrow takes paths as they are; DuckDB would read patterns and partitions into a folder's name
            self._duck.register(f"all_{table}", _dataset(found[table], schema))
            self._duck.execute(f"CREATE OR REPLACE VIEW {table} AS SELECT * FROM all_{table}")
        # resumed runs describe again
        self._duck.execute("CREATE OR REPLACE VIEW samples AS SELECT DISTINCT ON (sample) * FROM all_samples ORDER BY sample")

    @property
    def run(self) -> dict[str, Any]:
        """The run's id, settings and versions."""
        path = self.folder / "run.json"
        return read_settings(path) if path.exists() else layout.settings_of(layout.parts(self.folder, "steps")[0])

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
        """The books: a row per step, target and rank. Numbers are those of the whole step, but ``samples`` and ``seconds``."""
        return self.sql(f"SELECT * FROM steps s {_where(None, steps)} ORDER BY step, target, rank")

    def tokens(self, samples: Sequence[Hashable] | None = None, *, target: int = 0) -> pa.Table:
        """Scores of single tokens: ``sample``, ``step``, ``scores`` (a list, in the order of the sample's tokens in the batch).

        ``samples``: of these alone. Empty where the run had no ``tokens=``, or did not choose them. A sample's add up to its
        score in that step.
        """
        only = ""
        if samples is not None:
            self._want(samples)
            only = " AND s.sample IN (SELECT sample FROM wanted)"
        return self.sql(
            f"SELECT s.sample, s.step, s.scores FROM tokens s {_where(self._checked(target), None)}{only} ORDER BY s.sample, s.step"
        )

    def samples(self) -> pa.Table:
        """What samples are, as far as they were described."""
        return self.sql("SELECT * FROM samples")

    def sql(self, query: str, parameters: Iterable[Any] = ()) -> pa.Table:
        """Any question, in DuckDB's SQL, over the views ``scores``, ``tokens``, ``steps`` and ``samples``."""
        return self._duck.sql(query, params=list(parameters)).to_arrow_table()

    @property
    def targets(self) -> list[int]:
        """Which validation losses the run has booked."""
        return self.sql("SELECT DISTINCT target FROM steps ORDER BY target")["target"].to_pylist()

    # aggregates

    def totals(self, *, target: int = 0, steps: tuple[int, int] | None = None, value: str = "total") -> pa.Table:
        """Per sample: ``sample``, ``value``, and ``n``, how many scores went into it."""
        return self.sql(self._aggregate(_SAMPLE, "sample", target, steps, value))

    def values(self, *, target: int = 0, steps: tuple[int, int] | None = None) -> pa.Table:
        """Per sample: ``sample``, ``standardized``, ``total``, and ``n``, how many scores went into them."""
        query = self._aggregate(_SAMPLE, "sample", target, steps, "standardized", also="sum(s.score) AS total")
        return self.sql(f"SELECT sample, value AS standardized, total, n FROM ({query})")

    def draws(self, scores: pa.Table, samples: int, *, target: int = 0, bootstrap: int = 200) -> dict[str, np.ndarray]:
        """Both values of the ``samples`` in ``bootstrap`` resamplings of the run's steps, each ``[bootstrap, samples]``.

        ``scores`` are those that ``scores_of`` found. The resamplings are the same for all samples: sums over some of them are
        resampled sums.
        """
        blocks = self._blocks(target, None)
        at = np.searchsorted(blocks, scores["step"].to_numpy(), side="right") - 1
        place, sizes = scores["place"].to_numpy(), (len(blocks), samples, bootstrap)
        return {
            "total": resample(at, place, scores["score"].to_numpy(), None, *sizes),
            "standardized": resample(at, place, scores["standardized"].to_numpy(), np.ones(len(at)), *sizes),
        }

    def scores_of(self, samples: Sequence[Hashable], *, target: int = 0) -> pa.Table:
        """Every score of ``samples``: ``place`` (in ``samples``), ``step``, ``score``, ``standardized``, in the order of steps."""
        self._want(samples)
        return self.sql(
            f"SELECT w.place, s.step, s.score, {_Z} AS standardized FROM scores s JOIN wanted w ON w.sample = s.sample"
            f" {_statistics('standardized', target, None)} {_where(self._checked(target), None)} ORDER BY s.step"
        )

    def described(self, samples: Sequence[Hashable]) -> dict[Any, dict[str, Any]]:
        """What ``samples`` are, by id, as far as they were described."""
        self._want(samples)
        query = "SELECT DISTINCT ON (sample) * FROM all_samples WHERE sample IN (SELECT sample FROM wanted) ORDER BY sample"
        return {row["sample"]: row for row in self.sql(query).to_pylist()}

    def top(
        self,
        k: int = 10,
        *,
        harmful: bool = False,
        target: int = 0,
        steps: tuple[int, int] | None = None,
        value: str = "standardized",
        bootstrap: int = 0,
    ) -> pa.Table:
        """The ``k`` most helpful (or harmful) samples by ``value``: ``sample``, ``value``, ``n``, ``total`` and its description.

        ``low`` and ``high``, for ``bootstrap > 0``, as in ``groups``.
        """
        check_count(k)
        order = "ASC" if harmful else "DESC"
        query = self._aggregate(_SAMPLE, "sample", target, steps, value, also="sum(s.score) AS total")
        found = self.sql(
            f'SELECT t.*, d."group", d.text, d.path FROM (SELECT * FROM ({query}) ORDER BY value {order}, sample LIMIT {int(k)}) t'
            f" LEFT JOIN samples d USING (sample) ORDER BY t.value {order}, sample"
        )
        if bootstrap:
            self._want(found["sample"].to_pylist())
            return self._with_intervals(found, "sample", _SAMPLE, target, steps, value, bootstrap)
        return found

    def groups(
        self,
        groups: Mapping[Any, str] | None = None,
        *,
        target: int = 0,
        steps: tuple[int, int] | None = None,
        value: str = "total",
        bootstrap: int = 200,
    ) -> pa.Table:
        """Per group: ``group``, ``value``, ``n`` scores, ``samples``, ``mean`` (value per sample; per score, if standardised).

        ``low`` and ``high`` hold the middle 95% of ``value`` over ``bootstrap`` resamplings of the run's steps
        (of a thousand stretches of them, where there are more); ``stretches`` says in how many of these the group occurs.

        Args:
            groups: id -> group; the ``group`` that samples were described with, if None. Other samples are in ``(none)``.
        """
        key = self._group_key(groups)
        # samples first: a million of them join their groups sooner than ten million scores
        each = self._aggregate(_SAMPLE, "sample", target, steps, value)
        whole = "sum(s.value * s.n) / sum(s.n)" if value == "standardized" else "sum(s.value)"
        mean = "value" if value == "standardized" else "value / samples"
        found = self.sql(
            f'SELECT *, {mean} AS mean FROM (SELECT {key.sql} AS "group", {whole} AS value, sum(s.n)::BIGINT AS n,'
            f" count(*) AS samples FROM ({each}) s {key.join} GROUP BY {key.sql}) ORDER BY value DESC"
        )
        return self._with_intervals(found, "group", key, target, steps, value, bootstrap) if bootstrap else found

    def by_step(self, groups: Mapping[Any, str] | None = None, *, target: int = 0, bins: int = 200) -> pa.Table:
        """Sums of scores by group over at most ``bins`` stretches of steps: ``step`` (the stretch's last), ``group``, ``value``."""
        key = self._group_key(groups)
        last = self._first_and_last()[1]
        return self.sql(
            f'SELECT least({last}, {self._stretch("step", bins, "last")})::BIGINT AS step, "group", sum(score) AS value'
            f' FROM (SELECT s.step, s.score, {key.sql} AS "group" FROM scores s {key.join}'
            f" {_where(self._checked(target), None)}) GROUP BY ALL ORDER BY step"
        )

    def group_sizes(self, samples: Sequence[Hashable] | pa.ChunkedArray) -> dict[str, int]:
        """How many of ``samples`` were described as of each group."""
        self._want(samples)
        found = self.sql(f'SELECT {_DESCRIBED.sql} AS "group", count(*) AS n FROM wanted s {_DESCRIBED.join} GROUP BY 1')
        return dict(zip(found["group"].to_pylist(), found["n"].to_pylist(), strict=True))

    def show(self, sample: Hashable, target: int = 0) -> dict[str, Any]:
        """Everything about one sample: ``description``, ``steps`` (its scores) and the values.

        Raises:
            KeyError: the ledger has no score of it.
        """
        sample = self._as_id(sample)
        query = "SELECT * FROM scores WHERE sample = ? AND target = ? ORDER BY step"
        found = self.sql(query, [sample, self._checked(target)])
        if not found.num_rows:
            raise KeyError(f"the ledger has no score of sample {sample!r} for target {target}")
        description = self.sql("SELECT * FROM samples WHERE sample = ?", [sample]).to_pylist()
        where = f"s.sample = {sample if self._integer_ids else _quote(str(sample))}"
        values = {v: self.sql(self._aggregate(_SAMPLE, "sample", target, None, v, where=where))["value"][0].as_py() for v in VALUES}
        return {"sample": sample, "description": description[0] if description else {}, "steps": found, **values}

    def gaps(self, target: int = 0) -> pa.Table:
        """How far each step's scores are from adding up to its gradient: ``step``, ``gap``, ``coverage``.

        ``gap`` is ``|score_sum - total|`` as a share of the larger of ``|total|`` and the norm of the step's scores.
        """
        where = _where(self._checked(target), None)
        return self.sql(
            f"""SELECT b.step, b.coverage,
                   abs(b.score_sum - b.total) / nullif(greatest(abs(b.total), coalesce(n.norm, 0)), 0) AS gap
            FROM (SELECT step, avg(score_sum) AS score_sum, avg(total) AS total, min(coverage) AS coverage
                  FROM steps s {where} AND NOT skipped GROUP BY step) b
            LEFT JOIN (SELECT step, sqrt(sum(score * score)) AS norm FROM scores s {where} GROUP BY step) n USING (step)
            ORDER BY b.step"""
        )

    # SQL

    def _aggregate(
        self, key: _Key, name: str, target: int, steps: tuple[int, int] | None, value: str, where: str = "", also: str = ""
    ) -> str:
        if value not in VALUES:
            raise ValueError(f"value must be one of {', '.join(VALUES)}, got {value!r}")
        condition = _where(self._checked(target), steps) + (f" AND {where}" if where else "")
        columns = f'{key.sql} AS "{name}", {VALUES[value]} AS value, count(*) AS n' + (also and f", {also}")
        joins = f"{key.join} {_statistics(value, target, steps)}"
        return f"SELECT {columns} FROM scores s {joins} {condition} GROUP BY {key.sql}"

    def _checked(self, target: int) -> int:
        known = self.targets
        if known and target not in known:
            raise ValueError(f"target must be one of {', '.join(map(str, known))}, got {target}")
        return target

    def _want(self, samples: Sequence[Hashable] | pa.ChunkedArray) -> None:
        """Makes ``samples`` the table ``wanted``; a column of ids is taken as it is."""
        ids: Any = samples
        if not isinstance(samples, pa.ChunkedArray):
            ids = pa.array([self._as_id(i) for i in samples], pa.int64() if self._integer_ids else pa.string())
        self._duck.register("wanted", pa.table({"sample": ids, "place": pa.array(range(len(ids)), pa.int64())}))

    def _first_and_last(self) -> tuple[int, int]:
        ((first, last),) = self._duck.sql("SELECT min(step), max(step) FROM steps").fetchall()
        return (0, 0) if first is None else (first, last)

    def _group_key(self, groups: Mapping[Any, str] | None) -> _Key:
        if groups is None:
            return _DESCRIBED
        ids = [self._as_id(i) for i in groups]
        table = {"sample": pa.array(ids, pa.int64() if self._integer_ids else pa.string())}
        self._duck.register("given", pa.table(table | {"group": pa.array([str(g) for g in groups.values()])}))
        return _GIVEN

    def _as_id(self, sample: Any) -> int | str:
        """An id as the ledger holds it; the command line has only strings."""
        try:
            return int(sample) if self._integer_ids else str(sample)
        except ValueError:
            raise KeyError(f"this ledger's samples have integer ids, got {sample!r}") from None

    # uncertainty

    def _with_intervals(
        self, found: pa.Table, name: str, key: _Key, target: int, steps: tuple[int, int] | None, value: str, draws: int
    ) -> pa.Table:
        """Adds the middle 95% of each row's value over resamplings of the steps."""
        only = " AND s.sample IN (SELECT sample FROM wanted)" if name == "sample" else ""
        block = self._stretch("s.step", BLOCKS)
        rows = self.sql(
            f"SELECT {block} AS block, {key.sql} AS k, sum({EACH[value]}) AS x, count(*) AS n FROM scores s {key.join}"
            f" {_statistics(value, target, steps)} {_where(target, steps)}{only} GROUP BY ALL"
        )
        # a part that is written meanwhile may have its scores before its books
        blocks = np.union1d(self._blocks(target, steps), rows["block"].to_numpy())
        keys = found[name].to_pylist()
        place = {k: i for i, k in enumerate(keys)}
        column = np.array([place[k] for k in rows["k"].to_pylist()], dtype=np.int64)
        n = rows["n"].to_numpy() if value == "standardized" else None
        at = np.searchsorted(blocks, rows["block"].to_numpy())
        low, high = middle(resample(at, column, rows["x"].to_numpy(), n, len(blocks), len(keys), draws))
        met = np.bincount(column, minlength=len(keys))  # a row for each stretch in which a key occurs
        return (
            found.append_column("low", pa.array(low))
            .append_column("high", pa.array(high))
            .append_column("stretches", pa.array(met))
        )

    def _stretch(self, step: str, count: int, end: str = "first") -> str:
        """In SQL: the first, or last, step of the stretch that ``step`` lies in, of at most ``count`` in the run."""
        first, last = self._first_and_last()
        width = max(1, -(-(last - first + 1) // count))
        return f"({first} + ({step} - {first}) // {width} * {width}" + (f" + {width - 1})" if end == "last" else ")")

    def _blocks(self, target: int, steps: tuple[int, int] | None) -> np.ndarray:
        """The first steps of the stretches that have scores, in their order: what is resampled."""
        query = f"SELECT DISTINCT {self._stretch('s.step', BLOCKS)} AS block FROM steps s {_where(target, steps)}"
        return np.sort(self.sql(query + " AND NOT s.skipped AND s.samples > 0")["block"].to_numpy())


def _where(target: int | None, steps: tuple[int, int] | None) -> str:
    terms = [] if target is None else [f"s.target = {int(target)}"]
    if steps is not None:
        terms.append(f"s.step BETWEEN {int(steps[0])} AND {int(steps[1])}")
    return f"WHERE {' AND '.join(terms)}" if terms else ""


def _statistics(value: str, target: int, steps: tuple[int, int] | None) -> str:
    if value == "standardized":
        inner = f"SELECT step, avg(score) AS mean, stddev_pop(score) AS spread FROM scores s {_where(target, steps)} GROUP BY step"
        return f"JOIN ({inner}) p ON p.step = s.step"
    return ""


def _dataset(parts: list[Path], schema: pa.Schema) -> Any:
    if not parts:
        return schema.empty_table()
    reading = pyarrow.dataset.ParquetFragmentScanOptions(page_checksum_verification=True)
    parquet = pyarrow.dataset.ParquetFileFormat(default_fragment_scan_options=reading)
    return pyarrow.dataset.dataset(list(map(str, parts)), schema=schema, format=parquet, partitioning=None)


def _quote(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
