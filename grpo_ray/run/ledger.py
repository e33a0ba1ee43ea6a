"""Ledger of every prompt's fate: one row a group, in SQLite, readable while the run goes on.

    dispatched -> sampled -> trained (at which step) | dropped (at which step, why)

A second table has the options that `resume` has changed, and after which step.

A group that is `trained` was in a batch. Where nothing was learned from it, `drop_reason` says why: `not_applicable`,
`no_signal` (its rewards are all equal), `truncated` and `empty` (what differs is out of the loss), `no_gradient`.

The ledger and the checkpoint agree: `roll_back(step)` forgets everything after a checkpoint, so a resumed run ends with
the same rows as one that was never stopped.

The state `sampled` is written later, for several groups at once: after a crash they are sampled again in any case.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from grpo_ray.errors import CheckpointError
from grpo_ray.types import Group, Score

_SCHEMA = """
CREATE TABLE IF NOT EXISTS groups (
    prompt_id          TEXT PRIMARY KEY,
    dispatch_order     INTEGER NOT NULL UNIQUE,
    state              TEXT NOT NULL CHECK (state IN ('dispatched', 'sampled', 'trained', 'dropped')),
    dispatched_version INTEGER NOT NULL,
    min_version        INTEGER,
    step               INTEGER,
    num_samples        INTEGER,
    num_tokens         INTEGER,
    num_failed_scores  INTEGER,
    mean_reward        REAL,
    drop_reason        TEXT,
    dispatched_at      REAL NOT NULL,
    finished_at        REAL,
    num_sampled        INTEGER
);
CREATE INDEX IF NOT EXISTS groups_by_step ON groups (step);
CREATE TABLE IF NOT EXISTS changes (
    step      INTEGER NOT NULL,
    option    TEXT NOT NULL,
    before    TEXT NOT NULL,
    after     TEXT NOT NULL,
    at        REAL NOT NULL
);
"""


SAMPLED_AT_ONCE = 64
"""The number of sampled groups in one transaction."""


@dataclass(frozen=True)
class LedgerSummary:
    trained: int
    dropped: int
    in_flight: int
    steps: int
    """The number of steps that trained at least one group."""
    drop_reasons: dict[str, int]
    nothing_learned: dict[str, int]
    """The number of trained groups from which nothing was learned, by reason."""


@dataclass(frozen=True)
class LedgerRow:
    """One group, column by column."""

    prompt_id: str
    dispatch_order: int
    state: str
    dispatched_version: int
    min_version: int | None
    step: int | None
    num_samples: int | None
    num_tokens: int | None
    num_failed_scores: int | None
    mean_reward: float | None
    drop_reason: str | None
    dispatched_at: float
    finished_at: float | None
    num_sampled: int | None = None
    """The number of tokens that a policy sampled; the others are the environment's. None in rows of earlier versions."""


_COLUMNS = tuple(column.name for column in fields(LedgerRow))


class Ledger:
    """The ledger of one run, with one writer (the controller) and any number of readers."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._db = sqlite3.connect(path, isolation_level=None)
        try:
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=NORMAL")
            self._db.executescript(_SCHEMA)
            self._add_columns()
        except sqlite3.DatabaseError as e:
            self._db.close()
            if isinstance(e, sqlite3.OperationalError):
                raise
            raise CheckpointError(f"{path} is no ledger ({e}); put it back from a copy, or take it away") from None
        self._sampled: list[tuple[object, ...]] = []
        """Rows of sampled groups that are not written yet."""

    def _add_columns(self) -> None:
        """Add what a ledger of an earlier version has no column for."""
        there = {row[1] for row in self._db.execute("PRAGMA table_info(groups)")}
        for column in ("num_sampled",):
            if column not in there:
                self._db.execute(f"ALTER TABLE groups ADD COLUMN {column} INTEGER")

    def changed(self, step: int, options: Mapping[str, tuple[object, object]]) -> None:
        """Record that `resume` continues after this step with other values of these options: dotted key -> (before, after)."""
        now = time.time()
        with self._transaction():
            self._db.executemany(
                "INSERT INTO changes (step, option, before, after, at) VALUES (?, ?, ?, ?, ?)",
                [(step, option, repr(before), repr(after), now) for option, (before, after) in options.items()],
            )

    def dispatched(self, groups: Iterable[Group]) -> None:
        """Record dispatched groups. Raises sqlite3.IntegrityError when a prompt is dispatched twice: the invariant that the
        ledger is for."""
        now = time.time()
        with self._transaction():
            self._db.executemany(
                "INSERT INTO groups (prompt_id, dispatch_order, state, dispatched_version, dispatched_at) "
                "VALUES (?, ?, 'dispatched', ?, ?)",
                [(g.prompt.id, g.order, g.dispatched_version, now) for g in groups],
            )

    def sampled(self, group: Group) -> None:
        """Record a sampled group. It is written with others, or by `flush`, which every method that reads rows calls."""
        values = [s.value for s in group.scores if not s.status.failed and s.value == s.value]
        self._sampled.append(
            (
                group.min_version,
                len(group.samples),
                sum([s.num_tokens for s in group.samples]),
                sum([s.num_sampled for s in group.samples]),
                _num_failed(group.scores),
                sum(values) / len(values) if values else None,
                time.time(),
                group.prompt.id,
            )
        )
        if len(self._sampled) >= SAMPLED_AT_ONCE:
            self.flush()

    def flush(self) -> None:
        """Write the rows that are not written yet."""
        if self._sampled:
            rows, self._sampled = self._sampled, []
            self._update(
                "UPDATE groups SET state = 'sampled', min_version = ?, num_samples = ?, num_tokens = ?, num_sampled = ?, "
                "num_failed_scores = ?, mean_reward = ?, finished_at = ? WHERE prompt_id = ? AND state = 'dispatched'",
                rows,
            )

    def dropped(self, group: Group, step: int, reason: str) -> None:
        self.flush()
        self._update(
            "UPDATE groups SET state = 'dropped', step = ?, drop_reason = ? "
            "WHERE prompt_id = ? AND state IN ('dispatched', 'sampled')",
            [(step, reason, group.prompt.id)],
        )

    def trained(self, groups: Iterable[Group], step: int, untrained: Mapping[str, str] | None = None) -> None:
        """Record the trained groups of a step, all or none.

        Args:
            untrained: prompt id -> the reason why nothing was learned from its group in the batch.
        """
        self.flush()
        why = untrained or {}
        self._update(
            "UPDATE groups SET state = 'trained', step = ?, drop_reason = ? WHERE prompt_id = ? AND state = 'sampled'",
            [(step, why.get(group.prompt.id), group.prompt.id) for group in groups],
        )

    def roll_back(self, step: int, order: int) -> int:
        """Remove what happened after `step` was trained, and every group from `order` on. Returns the number of removed groups."""
        self.flush()
        where = "step IS NULL OR step > ? OR dispatch_order >= ?"
        return self._db.execute(f"DELETE FROM groups WHERE {where}", (step, order)).rowcount

    def dropped_from(self, order: int) -> list[LedgerRow]:
        """The dropped groups from `order` on."""
        where = "state = 'dropped' AND dispatch_order >= ? ORDER BY dispatch_order"
        return self._rows_where(where, order)

    def after(self, step: int) -> list[LedgerRow]:
        """The groups trained or dropped after `step`, which `roll_back` removes."""
        self.flush()
        return self._rows_where("step > ? ORDER BY dispatch_order", step)

    def _rows_where(self, where: str, value: int) -> list[LedgerRow]:
        found = self._db.execute(f"SELECT {', '.join(_COLUMNS)} FROM groups WHERE {where}", (value,))
        return [LedgerRow(*row) for row in found]

    def put_back(self, rows: Iterable[LedgerRow]) -> None:
        """Restore rows that `roll_back` has removed."""
        with self._transaction():
            places = ", ".join("?" * len(_COLUMNS))
            self._db.executemany(
                f"INSERT INTO groups ({', '.join(_COLUMNS)}) VALUES ({places})", [astuple(row) for row in rows]
            )

    def last_lengths(self, groups: Iterable[Group]) -> dict[str, float]:
        """The mean number of sampled tokens of a sample of the same row in the epoch before, by prompt id, where it is known."""
        self.flush()
        out = {}
        for group in groups:
            data_set, epoch, row = group.prompt.id.rsplit("/", 2)
            found = self._db.execute(
                "SELECT 1.0 * COALESCE(num_sampled, num_tokens) / num_samples FROM groups WHERE prompt_id = ? AND num_samples > 0",
                (f"{data_set}/{int(epoch) - 1}/{row}",),
            ).fetchone()
            if found is not None:
                out[group.prompt.id] = float(found[0])
        return out

    def summary(self) -> LedgerSummary:
        self.flush()
        counts = dict(self._db.execute("SELECT state, COUNT(*) FROM groups GROUP BY state"))
        (steps,) = self._db.execute("SELECT COUNT(DISTINCT step) FROM groups WHERE state = 'trained'").fetchone()
        reasons, in_vain = (
            dict(
                self._db.execute(
                    "SELECT drop_reason, COUNT(*) FROM groups WHERE state = ? AND drop_reason IS NOT NULL GROUP BY drop_reason",
                    (state,),
                )
            )
            for state in ("dropped", "trained")
        )
        return LedgerSummary(
            trained=counts.get("trained", 0),
            dropped=counts.get("dropped", 0),
            in_flight=counts.get("dispatched", 0) + counts.get("sampled", 0),
            steps=steps,
            drop_reasons=reasons,
            nothing_learned=in_vain,
        )

    def rows(self) -> list[tuple[str, int, str, int | None, str | None]]:
        """Rows (prompt id, dispatch order, state, step, why it was dropped or nothing was learned from it), in dispatch order: what
        two equal runs have in common.
        """
        self.flush()
        return list(
            self._db.execute(
                "SELECT prompt_id, dispatch_order, state, step, drop_reason FROM groups ORDER BY dispatch_order"
            )
        )

    def close(self) -> None:
        self.flush()
        self._db.close()

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """A transaction, applied as a whole or not at all."""
        self._db.execute("BEGIN")
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    def _update(self, sql: str, rows: Sequence[tuple[object, ...]]) -> None:
        """Apply a transition to some groups, or to none; the last of a row's values names its prompt."""
        with self._transaction():
            for row in rows:
                changed = self._db.execute(sql, row).rowcount
                if changed != 1:
                    raise AssertionError(
                        f"ledger: {changed} rows instead of one took the transition of {row[-1]!r}: {sql.split(' WHERE ')[0]}"
                    )


def last_trained(path: Path) -> int:
    """The latest step at which something was trained; 0 for none. Read-only: the files of a killed run stay unchanged."""
    # Without a write-ahead log beside the file, SQLite would create one, and leave it.
    how = "mode=ro" if path.with_name(f"{path.name}-wal").exists() else "immutable=1"
    db = sqlite3.connect(f"{path.resolve().as_uri()}?{how}", uri=True)
    try:
        (step,) = db.execute("SELECT MAX(step) FROM groups WHERE state = 'trained'").fetchone()
    except sqlite3.OperationalError:  # The run was killed before the ledger had a table.
        return 0
    except (sqlite3.DatabaseError, OverflowError) as e:
        raise CheckpointError(f"{path} is no ledger ({e}); put it back from a copy, or take it away") from None
    finally:
        db.close()
    return int(step or 0)


def _num_failed(scores: Iterable[Score]) -> int:
    return sum([s.status.failed for s in scores])
