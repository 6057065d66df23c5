"""A user's own data as a task: rows are checked before step 0, and what is wrong is told with its file and row.

    tasks.mine = dict(
        train="data/train.jsonl",           # jsonl | json | csv | parquet | folder | org/name[:config][@split]
        test="data/test.jsonl",             # the same, or 0.1: a tenth of train, always the same tenth
        columns=dict(prompt="question", images="image", answer="label"),  # also videos, messages, target, id
        prompt="<image>{question}",         # builds the prompt from columns, where the data has no placeholders
        image_root="",                      # folder of relative image paths; "" = beside the data file
        scorer="exact", reward="my.py:reward", template="direct", limit=None)

A row is a prompt with one <image> or <video> per image or video, or chat `messages`. A video is a file, or a list of frames.
"""

import dataclasses
import functools
import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cptjax.common.images import open_image
from cptjax.tasks.bad_rows import BadRow
from cptjax.tasks.task import Task, did_you_mean, limit_rows
from cptjax.tasks.user_data.readers import DataTable, read_tables
from cptjax.tasks.user_data.rows import (
    RenamedRows,
    UserTaskSpec,
    build_user_example,
    locate_image,
    row_id,
)
from cptjax.types import Example

COLUMN_ROLES = ("prompt", "images", "videos", "answer", "messages", "target", "id")
COLUMN_ALIASES = {  # names that are tried where a column of the default name is missing and none was given
    "prompt": ("question", "problem"),
    "images": ("image", "file_name"),
    "videos": ("video",),
    "messages": ("conversations",),
}
USER_SPLITS = ("train", "validation", "test")


def make_user_task(name: str, **settings: Any) -> Task:
    """Makes a task of the settings in the module's docstring; the rest are fields of Task."""
    sources = {
        split: settings.pop(split) for split in USER_SPLITS if settings.get(split) not in (None, "")
    }
    columns = dict(settings.pop("columns", None) or {})
    own = {key: settings.pop(key) for key in ("prompt", "image_root", "limit") if key in settings}
    _check_user_settings(name, sources, columns, settings)
    reward = settings.get("reward", "")
    needs_answer = not (callable(reward) or ".py:" in reward) or "answer" in columns
    spec = UserTaskSpec(
        name, tuple(sources.items()), tuple(columns.items()), needs_answer=needs_answer, **own
    )
    return Task(name, functools.partial(load_user_split, spec), **{"scorer": "exact", **settings})


def _check_user_settings(name: str, sources: Mapping, columns: Mapping, fields: Mapping) -> None:
    known = {field.name for field in dataclasses.fields(Task)} - {"name", "load"}
    everything = known | {*USER_SPLITS, "columns", "prompt", "image_root", "limit"}
    for key in fields:
        if key not in known:
            raise ValueError(
                f"tasks.{name}: unknown setting {key!r}{did_you_mean(key, everything)}; there are {', '.join(sorted(everything))}"
            )
    for key in columns:
        if key not in COLUMN_ROLES:
            raise ValueError(
                f"tasks.{name}.columns: unknown role {key!r}{did_you_mean(key, COLUMN_ROLES)}; there are {', '.join(COLUMN_ROLES)}"
            )
    if not sources:
        raise ValueError(
            f"tasks.{name}: give train, test or both: a data file, a folder or a hub id"
        )
    for split, source in sources.items():
        if not isinstance(source, str) and not (
            split != "train" and "train" in sources and 0 < source < 1
        ):
            expected = "a file, folder or hub id is expected, or a share of train between 0 and 1"
            raise ValueError(f"tasks.{name}.{split}: {expected}; {source!r} came")


class UserExamples(Sequence[Example]):
    """The good rows of a split as examples, images decoded on access; `bad` lists the others."""

    def __init__(
        self,
        spec: UserTaskSpec,
        split: str,
        tables: list[DataTable],
        places: list[tuple[int, int]],
        bad: list[BadRow],
    ):
        self.spec, self.split, self.tables, self.places, self.bad = spec, split, tables, places, bad

    def __len__(self) -> int:
        return len(self.places)

    def where(self, index: int) -> tuple[str, int]:
        """Returns the file and row of an example."""
        table, row = self.places[index]
        return self.tables[table].file, self.tables[table].numbers[row]

    def __getitem__(self, index: int) -> Example:
        table, row = self.places[index]
        try:
            return build_user_example(self.spec, self.tables[table], row, open_image)
        except ValueError as error:
            file, number = self.where(index)
            raise ValueError(f"{file}:{number}: {error}") from error


def load_user_split(
    spec: UserTaskSpec, split: str, root: str = "", limit: int | None = None, seed: int = 0
) -> UserExamples:
    """Reads a split and checks every row, all but the pixels of its images; `validate` opens those too."""
    sources = dict(spec.sources)
    if split not in sources:
        raise ValueError(f"task {spec.name}: no {split} data; it has {', '.join(sources)}")
    shares = {name: source for name, source in sources.items() if not isinstance(source, str)}
    source = sources["train"] if split in shares else sources[split]
    tables, unread = read_tables(source, "train" if split in shares else split, root)
    tables = [resolve_columns(spec, table) for table in tables]
    good, bad, seen = [], [], set()
    for place in select_split_rows(spec, tables, shares, split):
        problem = _find_problem(spec, tables[place[0]], place[1], seen)
        bad.append(problem) if problem else good.append(place)
    if not good and not bad and not unread:
        raise ValueError(f"task {spec.name}: no rows for {split} in {source}")
    limits = [number for number in (limit, spec.limit) if number is not None]
    kept = [good[i] for i in limit_rows(range(len(good)), min(limits, default=None), seed)]
    return UserExamples(spec, split, tables, kept, (unread if split not in shares else []) + bad)


def select_split_rows(
    spec: UserTaskSpec, tables: list[DataTable], shares: dict[str, float], split: str
) -> list[tuple[int, int]]:
    """Returns a split's rows; a held-out share is the rows whose ids hash lowest, whatever the seed and the order."""
    places = [(t, row) for t, table in enumerate(tables) for row in range(len(table.rows))]
    if not shares or (split not in shares and split != "train"):
        return places
    ranked = sorted(
        places,
        key=lambda place: hashlib.blake2b(
            row_id(tables[place[0]], place[1]).encode(), digest_size=8
        ).digest(),
    )
    start = 0
    for name, share in shares.items():
        stop = start + max(1, round(share * len(places)))
        if name == split:
            return sorted(ranked[start:stop])
        start = stop
    return sorted(ranked[start:])


def resolve_columns(spec: UserTaskSpec, table: DataTable) -> DataTable:
    """Renames the table's columns to the roles they play, or says which column is missing."""
    given, roles = dict(spec.columns), {}
    for role in COLUMN_ROLES:
        names = (given[role],) if role in given else (role, *COLUMN_ALIASES.get(role, ()))
        found = next((name for name in names if name in table.columns), None)
        if found is not None:
            roles[role] = found
        elif role in given:
            _refuse_missing_column(table, names[0], f"columns.{role}")
    for name in re.findall(r"\{(\w+)\}", spec.prompt):
        if name not in table.columns:
            _refuse_missing_column(table, name, "prompt")
    if len(table.rows) and not (spec.prompt or "prompt" in roles or "messages" in roles):
        _refuse_missing_column(
            table,
            "prompt",
            f"columns, which names the prompt's column, or tasks.{spec.name}.prompt, which builds one",
        )
    base = Path(spec.image_root) if spec.image_root else table.base
    return dataclasses.replace(table, base=base, rows=RenamedRows(table.rows, roles))


def _refuse_missing_column(table: DataTable, name: str, setting: str) -> None:
    if len(table.rows):
        columns = ", ".join(table.columns)
        raise ValueError(
            f"{table.file}: no column {name!r}{did_you_mean(name, table.columns)}; it has {columns}; set {setting}"
        )


def _find_problem(spec: UserTaskSpec, table: DataTable, row: int, seen: set[str]) -> BadRow | None:
    """Returns what is wrong with a row as far as it shows without decoding images."""
    try:
        example = build_user_example(spec, table, row, locate_image)
        if example.id in seen:
            raise ValueError(f"the id {example.id!r} is already in use by an earlier row")
    except ValueError as error:
        return BadRow(table.file, table.numbers[row], str(error))
    seen.add(example.id)
    return None
