"""A user's own data as a task; every bad row is reported with its file and row before step 0.

    tasks.mine = dict(
        # jsonl | json | csv | parquet | folder | org/name[:config][@split]
        train="data/train.jsonl",
        # the same, or 0.1: a tenth of train, always the same tenth
        test="data/test.jsonl",
        # also videos, messages, target, id
        columns=dict(prompt="question", images="image", answer="label"),
        # builds the prompt from columns, where the data has no placeholders
        prompt="<image>{question}",
        # folder of relative image paths; "" = the folder of the data file. Images elsewhere are
        # refused, unless data.outside_images names their folder
        image_root="",
        scorer="exact", reward="my.py:reward", template="direct", limit=None)

A row has a prompt with one <image> or <video> per image or video, or chat `messages`. A video is a
file or a list of frames.
"""

import dataclasses
import functools
import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cptjax.common import files
from cptjax.tasks.bad_rows import BadRow
from cptjax.tasks.task import Task, did_you_mean, limit_rows
from cptjax.tasks.user_data.readers import DataTable, read_tables
from cptjax.tasks.user_data.rows import (
    UserRow,
    UserTaskSpec,
    build_user_example,
    real_folders,
)
from cptjax.types import Example

COLUMN_ROLES = ("prompt", "images", "videos", "answer", "messages", "target", "id")
# Names to try if the data has no column of the default name and the task names none.
COLUMN_ALIASES = {
    "prompt": ("question", "problem"),
    "images": ("image", "file_name"),
    "videos": ("video",),
    "messages": ("conversations",),
}
USER_SPLITS = ("train", "validation", "test")
ROW_SETTINGS = ("prompt", "image_root", "limit")


def make_user_task(name: str, outside_images: tuple[str, ...] = (), /, **settings: Any) -> Task:
    """Build a task from the settings in the module's docstring.

    All other settings are fields of Task.
    """
    sources = {
        split: settings.pop(split) for split in USER_SPLITS if settings.get(split) not in (None, "")
    }
    columns = settings.pop("columns", None) or {}
    row_settings = {key: settings.pop(key) for key in ROW_SETTINGS if key in settings}
    _check_user_settings(name, sources, columns, settings)
    _check_row_settings(name, **row_settings)
    reward = settings.get("reward", "")
    needs_answer = not (callable(reward) or ".py:" in reward) or "answer" in columns
    spec = UserTaskSpec(
        name,
        tuple(sources.items()),
        tuple(columns.items()),
        needs_answer=needs_answer,
        outside_images=outside_images,
        scorer=settings.setdefault("scorer", "exact"),
        **row_settings,
    )
    return Task(name, functools.partial(load_user_split, spec), **settings)


def _check_user_settings(name: str, sources: Mapping, columns: Mapping, fields: Mapping) -> None:
    task_fields = {field.name for field in dataclasses.fields(Task)} - {"name", "load"}
    known = task_fields | {*USER_SPLITS, *ROW_SETTINGS, "columns"}
    for key in fields:
        if key not in task_fields:
            raise ValueError(
                f"tasks.{name}: unknown setting {key!r}{did_you_mean(key, known)}; "
                f"there are {', '.join(sorted(known))}"
            )
    is_mapping = isinstance(columns, Mapping)
    if not is_mapping or not all(isinstance(column, str) for column in columns.values()):
        raise ValueError(
            f"tasks.{name}.columns: expected a dict of names of columns, got {columns!r:.200}"
        )
    for key in columns:
        if key not in COLUMN_ROLES:
            raise ValueError(
                f"tasks.{name}.columns: unknown role {key!r}{did_you_mean(key, COLUMN_ROLES)}; "
                f"there are {', '.join(COLUMN_ROLES)}"
            )
    if not sources:
        raise ValueError(
            f"tasks.{name}: give train, test or both: a data file, a folder or a hub id"
        )
    for split, source in sources.items():
        is_share = split != "train" and "train" in sources
        is_number = is_share and isinstance(source, float)
        if not isinstance(source, str) and not (is_number and 0 < source < 1):
            raise ValueError(
                f"tasks.{name}.{split}: expected a file, folder or hub id, or a share of train "
                f"between 0 and 1; got {source!r}"
            )


def _check_row_settings(
    name: str, prompt: Any = "", image_root: Any = "", limit: Any = None
) -> None:
    if not isinstance(prompt, str):
        raise ValueError(f"tasks.{name}.prompt: expected a text, got {prompt!r:.200}")
    if not isinstance(image_root, str) or (image_root and not Path(image_root).is_dir()):
        raise ValueError(f"tasks.{name}.image_root: expected a folder, got {image_root!r:.200}")
    if limit is not None and (type(limit) is not int or limit < 1):
        raise ValueError(f"tasks.{name}.limit: expected rows >= 1 or None, got {limit!r:.200}")


class UserExamples(Sequence[Example]):
    """The good rows of a split as examples with unopened images; `bad` lists the other rows."""

    def __init__(
        self,
        spec: UserTaskSpec,
        rows: Sequence[UserRow],
        examples: Sequence[Example | None],
        bad: Sequence[BadRow],
    ):
        self.spec, self.rows, self.bad = spec, rows, bad
        self.examples = examples  # None = built on access, so that images stay in Arrow files

    def __len__(self) -> int:
        return len(self.rows)

    def where(self, index: int) -> tuple[str, int]:
        """Return the file and row of an example."""
        return self.rows[index].file, self.rows[index].number

    def __getitem__(self, index: int) -> Example:
        row, example = self.rows[index], self.examples[index]
        if example is not None:
            return example
        try:
            return build_user_example(self.spec, row)
        except ValueError as error:
            raise ValueError(f"{row.file}:{row.number}: {error}") from error


def load_user_split(
    spec: UserTaskSpec, split: str, root: str = "", limit: int | None = None, seed: int = 0
) -> UserExamples:
    """Read a split and check everything in every row but the pixels of its images."""
    sources = dict(spec.sources)
    if split not in sources:
        raise ValueError(f"task {spec.name}: no {split} data; it has {', '.join(sources)}")
    shares = {name: source for name, source in sources.items() if not isinstance(source, str)}
    origin = "train" if split in shares else split
    tables = [resolve_columns(spec, table) for table in read_tables(sources[origin], origin, root)]
    unread = [bad_row for table in tables for bad_row in table.bad]
    rows = [UserRow(table, index) for table in tables for index in range(len(table.rows))]
    good: list[tuple[UserRow, Example | None]] = []
    bad: list[BadRow] = []
    ids: set[str] = set()
    for row in select_split_rows(rows, shares, split):
        try:
            example = build_user_example(spec, row)
            if example.id in ids:
                raise ValueError(f"the id {example.id!r} is already in use by an earlier row")
        except ValueError as error:
            bad.append(BadRow(row.file, row.number, str(error)))
        except Exception as error:  # a row is a user's: whatever it causes is reported with it
            bad.append(BadRow(row.file, row.number, files.describe_error(error)))
        else:
            ids.add(example.id)
            good.append((row, example if isinstance(row.table.rows, list) else None))
    if not good and not bad and not unread:
        raise ValueError(f"task {spec.name}: no rows for {split} in {sources[origin]}")
    limits = [number for number in (limit, spec.limit) if number is not None]
    chosen = limit_rows(range(len(good)), min(limits, default=None), seed)
    # Lines that cannot be read have no id that assigns them to a split; report them with train.
    bad = bad if split in shares else unread + bad
    return UserExamples(spec, [good[i][0] for i in chosen], [good[i][1] for i in chosen], bad)


def select_split_rows(
    rows: list[UserRow], shares: Mapping[str, float], split: str
) -> list[UserRow]:
    """Return a split's rows; a held-out share takes the rows whose ids have the lowest hashes."""
    if not shares or (split not in shares and split != "train"):
        return rows
    hashes = [hashlib.blake2b(row.read_id().encode(), digest_size=8).digest() for row in rows]
    ranked = sorted(range(len(rows)), key=hashes.__getitem__)
    start = 0
    for name, share in shares.items():
        stop = start + max(1, round(share * len(rows)))
        if name == split:
            return [rows[i] for i in sorted(ranked[start:stop])]
        start = stop
    return [rows[i] for i in sorted(ranked[start:])]


def resolve_columns(spec: UserTaskSpec, table: DataTable) -> DataTable:
    """Return the table with the column of each role and the task's image folder."""
    if not len(table.rows):
        return table
    given, roles = dict(spec.columns), {}
    for role in COLUMN_ROLES:
        names = (given[role],) if role in given else (role, *COLUMN_ALIASES.get(role, ()))
        column = next((name for name in names if name in table.columns), None)
        if column is not None:
            roles[role] = column
        elif role in given:
            raise _missing_column(table, given[role], f"columns.{role}")
    for name in re.findall(r"\{(\w+)\}", spec.prompt):
        if name not in table.columns:
            raise _missing_column(table, name, "prompt")
    if not (spec.prompt or "prompt" in roles or "messages" in roles):
        hint = f"columns.prompt to its name, or tasks.{spec.name}.prompt to build a prompt"
        raise _missing_column(table, "prompt", hint)
    folder = Path(spec.image_root) if spec.image_root else table.folder
    allowed = real_folders((folder, table.folder, *table.image_folders, *spec.outside_images))
    return dataclasses.replace(table, folder=folder, roles=roles, image_folders=allowed)


def _missing_column(table: DataTable, name: str, setting: str) -> ValueError:
    hint = did_you_mean(name, table.columns)
    return ValueError(
        f"{table.file}: no column {name!r}{hint}; it has {', '.join(table.columns)}; set {setting}"
    )
