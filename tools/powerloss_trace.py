"""Runs a command under strace and returns every change that it made below a directory, with the data.

Knows strace's output (``-f -y -xx``: strings and paths in hexadecimal, descriptors with their paths). A call that
changes files in a way that is not known here is an error, so nothing goes unseen.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tools.powerloss_disk import ROOT, Change, Data, Made, Names, Size, Sync

_CALLS = (
    "openat,open,creat,write,pwrite64,writev,pwritev,pwritev2,ftruncate,truncate,rename,renameat,renameat2,link,linkat,"
    "symlink,symlinkat,unlink,unlinkat,mkdir,mkdirat,rmdir,fsync,fdatasync,sync_file_range,fallocate,copy_file_range,"
    "sendfile,splice,lseek,mmap,dup,dup2,dup3,fcntl,clone,clone3,sync,syncfs,io_uring_setup"
)
_LINE = re.compile(r"(\w+)\((.*)\)\s+= (-?\d+|\?|0x[0-9a-f]+)(.*)", re.DOTALL)
_TEXT = re.compile(r'"((?:\\x[0-9a-f]{2})*)"(\.\.\.)?')
_DESCRIPTOR = re.compile(r"(\d+|AT_FDCWD)<((?:\\x[0-9a-f]{2})*)>")
_PATHS = re.compile(f"{_DESCRIPTOR.pattern}|{_TEXT.pattern}")
_UNKNOWN = ("pwritev2", "sync_file_range", "fallocate", "copy_file_range", "sendfile", "splice", "symlink", "symlinkat")
_OF_NAMES = frozenset(
    (
        "rename", "renameat", "renameat2", "link", "linkat", "unlink", "unlinkat", "mkdir", "mkdirat", "rmdir",
        "truncate", "symlink", "symlinkat",
    )
)  # fmt: skip


def usable() -> bool:
    """Return whether strace is here and may trace."""
    if shutil.which("strace") is None:
        return False
    return subprocess.run(["strace", "-o", os.devnull, "true"], capture_output=True).returncode == 0


def record(command: list[str], root: Path, trace: Path, cwd: Path | None = None) -> tuple[int, str, list[Change]]:
    """Run ``command``, during which the empty directory ``root`` is filled; return its exit code, what it wrote to
    standard error, and the changes.

    Args:
        trace: where strace writes to.
    """
    words = ["strace", "-f", "-y", "-xx", "-s", str(1 << 28), "-e", f"trace={_CALLS}", "-o", str(trace), "--"]
    done = subprocess.run([*words, *command], check=False, cwd=cwd, stderr=subprocess.PIPE, text=True)
    recorder = Recorder(root)
    for read in (recorder.read_threads, recorder.read):
        with trace.open("r", encoding="ascii") as lines:
            read(lines)
    return done.returncode, done.stderr, recorder.changes


@dataclass
class _Open:
    node: int
    offset: int
    appends: bool


@dataclass
class Recorder:
    """Makes changes of the lines of a trace. ``root``: the directory, empty when the trace began."""

    root: Path
    changes: list[Change] = field(default_factory=list)
    _nodes: dict[str, int] = field(default_factory=dict)  # absolute path -> node
    _sizes: dict[int, int] = field(default_factory=dict)
    _folders: set[int] = field(default_factory=lambda: {ROOT})
    _open: dict[tuple[int, int], _Open] = field(default_factory=dict)  # (process, descriptor)
    _process_of: dict[int, int] = field(default_factory=dict)  # thread -> process

    def __post_init__(self) -> None:
        self._prefix = str(self.root.resolve())
        self._nodes[self._prefix] = ROOT

    def read_threads(self, lines: Iterable[str]) -> None:
        """Learn which threads there are: a new one may be seen at work before the call that made it returns."""
        begun: dict[int, int] = {}
        for thread, call, told, result in self._calls(lines):
            if call in ("clone", "clone3") and "CLONE_THREAD" in told:
                begun[result] = thread
            elif call == "io_uring_setup":
                raise RuntimeError("io_uring is used: what is written through it cannot be seen")
        for thread in begun:
            process = thread
            while process in begun:
                process = begun[process]
            self._process_of[thread] = process

    def read(self, lines: Iterable[str]) -> None:
        """Take in the changes."""
        for thread, call, told, result in self._calls(lines):
            self._take(self._process_of.get(thread, thread), call, told, result)

    @staticmethod
    def _calls(lines: Iterable[str]) -> Iterator[tuple[int, str, str, int]]:
        """Yield thread, name, arguments and result of every call that succeeded, in the order in which they ended."""
        waiting: dict[int, str] = {}
        for line in lines:
            number, _, text = line.rstrip("\n").partition(" ")
            thread, text = int(number), text.strip()
            if text.endswith("<unfinished ...>"):
                waiting[thread] = text.removesuffix("<unfinished ...>")
                continue
            if text.startswith("<... "):
                text = waiting.pop(thread) + text.partition("resumed>")[2]
            match = _LINE.fullmatch(text)
            if match is not None and match[3] not in ("?", "-1"):  # not: a signal, an exit, a call that failed
                yield thread, match[1], match[2], int(match[3], 0)

    def _take(self, process: int, call: str, told: str, result: int) -> None:
        if call in _OF_NAMES:
            self._change_names(call, told)
        elif call in ("openat", "open", "creat"):
            self._opened(process, call, told, result)
        elif call == "sync":
            self._sync(set(self._nodes.values()))
        else:
            inside = [
                (int(name), path)
                for name, coded in _DESCRIPTOR.findall(told)
                if name.isdigit() and self._inside(path := _decode(coded))
            ]
            if inside:
                self._use(process, call, told, result, *inside[0])

    def _opened(self, process: int, call: str, told: str, result: int) -> None:
        path = self._paths(told)[0]
        if not self._inside(path):
            return
        if path not in self._nodes:
            self._name(path, self._new())
        node = self._nodes[path]
        if ("O_TRUNC" in told or call == "creat") and self._sizes.get(node):
            self._resize(node, 0)
        self._open[process, result] = _Open(node, 0, "O_APPEND" in told)

    def _use(self, process: int, call: str, told: str, result: int, descriptor: int, path: str) -> None:
        if call == "mmap":
            # SQLite makes its shared memory anew after a crash; nobody else may write unseen.
            if "MAP_SHARED" in told and "PROT_WRITE" in told and not path.endswith("-shm"):
                raise RuntimeError(f"{path} is mapped for writing: what is written cannot be seen")
            return
        if call in _UNKNOWN:
            raise RuntimeError(f"{call} on {path}: it is not known here what that changes")
        if call == "fcntl" and "F_DUPFD" not in told:
            return
        at = self._open.get((process, descriptor))
        if at is None:
            raise RuntimeError(f"{call} on {path}: its opening was not seen")
        if call in ("dup", "dup2", "dup3", "fcntl"):
            self._open[process, result] = at
        elif call == "lseek":
            at.offset = result
        elif call == "syncfs":
            self._sync(set(self._nodes.values()))
        elif call in ("fsync", "fdatasync"):
            self._sync({at.node})
        elif call == "ftruncate":
            self._resize(at.node, int(told.rpartition(",")[2], 0))
        else:
            assert call in ("write", "pwrite64", "writev", "pwritev"), call
            content = b"".join(_bytes(text) for text in _TEXT.finditer(told))[:result]
            positioned = call in ("pwrite64", "pwritev")
            end = self._sizes[at.node] if at.appends else at.offset
            self._write(at, int(told.rpartition(",")[2], 0) if positioned else end, content, moves=not positioned)

    def _write(self, at: _Open, offset: int, content: bytes, *, moves: bool) -> None:
        self.changes.append(Data(at.node, offset, content))
        end = offset + len(content)
        self._sizes[at.node] = max(self._sizes[at.node], end)
        if moves:
            at.offset = end

    def _change_names(self, call: str, told: str) -> None:
        paths = self._paths(told)
        inside = [self._inside(path) for path in paths]
        if not any(inside):
            return
        if not all(inside) or call in _UNKNOWN or "RENAME_EXCHANGE" in told:
            raise RuntimeError(f"{call} of {paths}: it is not known here what that changes")
        if call == "truncate":
            self._resize(self._nodes[paths[0]], int(told.rpartition(",")[2], 0))
        elif call in ("mkdir", "mkdirat"):
            node = self._new()
            self._folders.add(node)
            self.changes.append(Made(node))
            self._name(paths[0], node)
        elif call in ("unlink", "unlinkat", "rmdir"):
            self.changes.append(Names((self._entry(paths[0], None),)))
            del self._nodes[paths[0]]
        else:
            node = self._nodes[paths[0]]
            if node in self._folders:
                raise RuntimeError(f"{call} of the directory {paths[0]}: that is not known here")
            gone = (self._entry(paths[0], None),) if call.startswith("rename") else ()
            self.changes.append(Names((*gone, self._entry(paths[1], node))))
            if gone:
                del self._nodes[paths[0]]
            self._nodes[paths[1]] = node

    def _new(self) -> int:
        node = len(self._sizes) + 1
        self._sizes[node] = 0
        return node

    def _name(self, path: str, node: int) -> None:
        self.changes.append(Names((self._entry(path, node),)))
        self._nodes[path] = node

    def _entry(self, path: str, node: int | None) -> tuple[int, str, int | None]:
        return self._nodes[os.path.dirname(path)], os.path.basename(path), node

    def _resize(self, node: int, size: int) -> None:
        self._sizes[node] = size
        self.changes.append(Size(node, size))

    def _sync(self, nodes: set[int]) -> None:
        self.changes += [Sync(node) for node in sorted(nodes)]

    def _inside(self, path: str) -> bool:
        return path == self._prefix or path.startswith(self._prefix + "/")

    @staticmethod
    def _paths(told: str) -> list[str]:
        """Return the absolute paths among the arguments; each may follow the descriptor that it is relative to."""
        found, base = [], "/"
        for match in _PATHS.finditer(told):
            if match[1] is not None:
                base = _decode(match[2])
            else:
                found.append(os.path.normpath(os.path.join(base, _decode(match[3]))))
        return found


def _bytes(match: re.Match[str]) -> bytes:
    if match[2]:
        raise RuntimeError("strace cut what was written short")
    return bytes.fromhex(match[1].replace("\\x", ""))


def _decode(text: str) -> str:
    return os.fsdecode(bytes.fromhex(text.replace("\\x", "")))
