"""A registry: entries by name, in the order in which they were added."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Generic, Protocol, TypeVar


class _Named(Protocol):
    @property
    def name(self) -> str: ...


Entry = TypeVar("Entry", bound=_Named)


class Registry(Generic[Entry]):
    """Entries by name.

    Attributes:
      kind: The kind of the entries, for errors.
    """

    def __init__(self, kind: str, *entries: Entry):
        self.kind = kind
        self._entries: dict[str, Entry] = {}
        for entry in entries:
            self.add(entry)

    def add(self, entry: Entry) -> Entry:
        """Adds an entry, and returns it.

        Raises:
          ValueError: The name is taken.
        """
        if entry.name in self._entries:
            raise ValueError(f"There is a {self.kind} called {entry.name} already; names must differ.")
        self._entries[entry.name] = entry
        return entry

    def __getitem__(self, name: str) -> Entry:
        if name not in self._entries:
            raise KeyError(f"There is no {self.kind} called {name}; there are {', '.join(self._entries)}.")
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def values(self) -> list[Entry]:
        """The entries, in the order in which they were added."""
        return list(self._entries.values())
