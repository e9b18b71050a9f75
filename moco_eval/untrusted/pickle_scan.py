"""What a pickle would do if it were unpickled, read off its opcodes; nothing of it is done.

A pickle is a program for a small machine with a stack and a memo. `scan` runs that program on descriptions of values:
strings, numbers and tuples stand for themselves, all else is a `Thing` of which only the kind and size are known.
"""

import pickletools
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from dataclasses import dataclass, field
from typing import Any, BinaryIO, cast

MOST = 5_000_000  # opcodes, and values that calls copy; a training checkpoint of 10,000 tensors has 200,000
MOST_NAMES = 1000  # globals; each costs a class
DEEPEST = 100  # levels of nesting; Python's own hash and repr recurse without a bound of their own
DAMAGED = "copy or download it again"  # two ways out, for the end of a message
DISTRUST = "nothing was executed: take the file from a source you trust"
SAVE = (
    "have the network's state_dict() saved where it was made, torch.save(model.state_dict(), 'encoder.pth'), and give "
    "that"
)


class Refused(ValueError):
    """Why a file is not read, in words that follow its path."""


class Name(str):
    """A global that a pickle names, such as `argparse.Namespace`."""

    __slots__ = ()


class Row(tuple):
    """A tuple and how deeply tuples are nested in it."""

    depth = 1


@dataclass(eq=False)
class Thing:
    """A value known by its kind ('list', 'bytes', or 'NAME()' for what a call of NAME returns) and its size alone."""

    kind: str
    size: int = 0

    def __len__(self) -> int:
        return self.size


@dataclass
class Scan:
    """What a pickle would do.

    Attributes:
        names: the globals it names, in order, Python 2's under Python 3's names.
        calls: each global that it calls and the kinds of the first arguments.
        built: the kinds of what it hands a state.
        filled: the kinds of what it puts items into, each with 'dict' or 'list'.
        storages: the persistent identities it asks for, torch's tensor data.
        protocol: of the pickle format.
        end: the position after it.
    """

    names: dict[str, None] = field(default_factory=dict)
    calls: set[tuple[str, tuple[str, ...]]] = field(default_factory=set)
    built: set[str] = field(default_factory=set)
    filled: dict[str, str] = field(default_factory=dict)
    storages: set[Row] = field(default_factory=set)
    protocol: int = 0
    end: int = 0


def scan(file: BinaryIO, size: int) -> Scan:
    """Follow the pickle that starts at the file's position; the file is left behind it.

    Args:
        size: of the whole file in bytes: no length inside may point beyond it.
    Raises:
        Refused: damaged, endless, or built to exhaust memory or stack.
    """
    machine = _Machine(size)
    try:
        for opcode, argument, position in pickletools.genops(cast(BinaryIO, _Bounded(file, size))):
            machine.step(opcode, argument, position or 0)
    except Refused:
        raise
    except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
        raise Refused(f"is a truncated or damaged pickle ({shown(error)}): {DAMAGED}") from None
    machine.effects.end = file.tell()
    return machine.effects


def shown(text: object, most: int = 90) -> str:
    """Text from a file, fit for one line of a terminal."""
    line = " ".join("".join(c if c.isprintable() else " " for c in str(text)[: 4 * most]).split())
    return line if len(line) <= most else f"{line[: most - 3]}..."


def python_3(module: str, name: str) -> str:
    """A global's full name, as Python 3 has it."""
    return ".".join(NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name)))


class _Bounded:
    """A file whose reader cannot be made to ask for more than is there."""

    LONGEST_LINE = 1 << 24

    def __init__(self, file: BinaryIO, size: int):
        self.file, self.size, self.tell = file, size, file.tell

    def read(self, count: int) -> bytes:
        left = self.size - self.tell() if count > 4096 else count
        if count > left:
            raise ValueError(f"{count} bytes announced, {left} left")
        return self.file.read(count)

    def readline(self) -> bytes:
        return self.file.readline(self.LONGEST_LINE)


class _Machine:
    def __init__(self, size: int):
        self.effects = Scan()
        self.size = size
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # the stacks under the marks
        self.memo: dict[int, Any] = {}
        self.steps = 0
        self.copied = 0

    def step(self, opcode: pickletools.OpcodeInfo, argument: Any, position: int) -> None:
        self.steps += 1
        if self.steps > MOST:
            raise Refused(f"has a pickle of more than {MOST:,} steps, as no checkpoint has: save its state_dict alone")
        name = opcode.name
        if name == "MARK":
            self.below.append(self.stack)
            self.stack = []
        elif name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self._remember(len(self.memo) if argument is None else argument, position)
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            self.stack.append(self.memo[argument])
        elif name == "PROTO":
            self.effects.protocol = argument
        elif name == "FRAME":
            if position + argument > self.size:
                raise ValueError(f"a frame of {argument} bytes announced")
        elif name == "POP" and not self.stack:
            self.stack = self.below.pop()
        elif name == "DUP":
            self.stack.append(self.stack[-1])
        else:
            taken = self._take(opcode)
            if opcode.stack_after:
                self.stack.append(self._result(name, argument, taken))

    def _remember(self, index: int, position: int) -> None:
        if index > position:  # Python's unpickler would make a memo of that size
            raise Refused(f"has a pickle that asks for a memo of {index:,} entries; {DISTRUST}")
        self.memo[index] = self.stack[-1]

    def _take(self, opcode: pickletools.OpcodeInfo) -> list[Any]:
        """What an opcode takes off the stack, lowest first, without the mark."""
        before, items = len(opcode.stack_before), []
        if pickletools.markobject in opcode.stack_before:
            items, self.stack = self.stack, self.below.pop()
            before = opcode.stack_before.index(pickletools.markobject)
        first = len(self.stack) - before
        if first < 0:
            raise ValueError("the stack is empty")
        taken = self.stack[first:] + items
        del self.stack[first:]
        return taken

    def _result(self, name: str, argument: Any, taken: list[Any]) -> Any:
        """What an opcode leaves on the stack."""
        if name in ("GLOBAL", "INST"):
            named = self._named(*argument.split(" ", 1))
            return named if name == "GLOBAL" else self._called(named, Row(taken))
        if name == "STACK_GLOBAL":
            return self._named(*taken)
        if name in ("REDUCE", "NEWOBJ", "NEWOBJ_EX"):
            return self._called(taken[0], taken[1])
        if name == "OBJ":
            return self._called(taken[0], Row(taken[1:]))
        if name == "BUILD":
            return self._built(*taken)
        if name in ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS"):
            return self._filled(taken[0], len(taken) - 1, "dict" if name.startswith("SET") else "list")
        if "TUPLE" in name:
            return self._row(taken)
        if name in ("PERSID", "BINPERSID"):
            self.effects.storages.add(_storage(taken[0] if taken else argument))
            return Thing("storage")
        if name.startswith("EXT"):
            raise Refused(f"has a pickle that calls code by number (copyreg's extensions); {DISTRUST}")
        if isinstance(argument, (str, int, float)) or name == "NONE":
            return argument
        return Thing(_made(name), len(argument) if isinstance(argument, (bytes, bytearray)) else len(taken))

    def _named(self, module: str, name: str) -> Name:
        if not isinstance(module, str) or not isinstance(name, str):
            raise Refused(f"has a pickle that hides the name of the code it wants to run; {DISTRUST}")
        full_name = Name(python_3(module, name))
        self.effects.names[full_name] = None
        if len(self.effects.names) > MOST_NAMES:
            raise Refused(f"has a pickle that names more than {MOST_NAMES} classes, as no checkpoint does; {DISTRUST}")
        return full_name

    def _called(self, function: Any, arguments: Any) -> Thing:
        if not isinstance(function, Name) or not isinstance(arguments, Row):
            raise Refused(f"has a pickle that calls what it has made itself; {DISTRUST}")
        self.effects.calls.add((str(function), tuple(_kind(argument) for argument in arguments[:8])))
        return Thing(f"{function}()", self._copy(arguments))

    def _built(self, target: Any, state: Any) -> Any:
        if not isinstance(target, Thing):
            raise Refused(f"has a pickle that hands a state to what has none; {DISTRUST}")
        self.effects.built.add(_kind(target))
        self._copy(state if isinstance(state, Row) else (state,))
        return target

    def _filled(self, target: Any, items: int, how: str) -> Any:
        if not isinstance(target, Thing):
            raise Refused(f"has a pickle that puts items into what holds none; {DISTRUST}")
        target.size += items
        self.effects.filled[target.kind] = how
        return target

    def _copy(self, values: tuple) -> int:
        """How much a call may copy; a value named a thousand times from the memo counts a thousand times."""
        size = len(values) + sum(len(value) for value in values if isinstance(value, (str, tuple, Thing)))
        self.copied += size
        if self.copied > 4 * self.size + MOST:  # numpy's arrays in protocol 2 are copied twice: as text, as bytes
            raise Refused(f"has a pickle that copies the same values over and over; {DISTRUST}")
        return size

    def _row(self, taken: list[Any]) -> Row:
        row = Row(taken)
        row.depth = 1 + max((item.depth for item in taken if isinstance(item, Row)), default=0)
        if row.depth > DEEPEST:
            raise Refused(f"has a pickle that nests tuples more than {DEEPEST} deep; {DISTRUST}")
        return row


def _storage(identity: Any) -> Row:
    if isinstance(identity, Row):
        if identity[:1] == ("module",):
            raise Refused(f"holds a whole network, whose code we do not run: {SAVE}")
        if len(identity) < 10 and identity.depth < 3 and not any(isinstance(part, Thing) for part in identity):
            return identity
    raise Refused(f"has a pickle that asks for something stored outside of it, no tensor's data; {DISTRUST}")


def _made(opcode: str) -> str:
    """The kind of value that an opcode makes, after the opcode's name."""
    kinds = ("list", "dict", "frozenset", "set", "bytes", "bytearray")
    return next((kind for kind in kinds if kind.upper() in opcode), "value")


def _kind(value: Any) -> str:
    if isinstance(value, Name):
        return f"global {value}"
    if isinstance(value, str):
        return "latin1" if value in ("latin1", "latin-1") else "str"
    return value.kind if isinstance(value, Thing) else "tuple" if isinstance(value, Row) else type(value).__name__
