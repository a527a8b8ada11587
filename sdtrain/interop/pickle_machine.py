"""A pickle interpreter that can only build plain data.

The standard unpickler calls whatever a file names. This one decodes opcodes with `pickletools` (which runs nothing) and
acts on them itself: containers, numbers and text become Python values; a global becomes a `Token` only if the caller's
table knows it, and is refused by name otherwise; calling a token means calling our own function from that table. There
is no import, no attribute access and no `__setstate__` anywhere, so nothing in a file can run.
"""

from __future__ import annotations

import io
import pickletools
import struct
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sdtrain.errors import WeightsError
from sdtrain.interop.budget import Budget, is_name, refuse

MAX_INTEGER_BITS = 512
# what reading a malformed file can raise inside this interpreter and its table of plain functions
MALFORMED = (
    ValueError,
    LookupError,
    TypeError,
    ArithmeticError,
    AttributeError,
    RuntimeError,
    MemoryError,
    struct.error,
)
KEY_TYPES = (str, bytes, int, float, bool, type(None))
MAX_KEY_BITS = 60  # larger integers can be chosen so that they all hash alike, which takes a dictionary for ever


@dataclass(frozen=True)
class Token:
    """An allowed global. `call` makes plain data of the arguments; None means it is a value and may not be called."""

    name: str
    call: Callable[..., Any] | None = None


@dataclass(eq=False, slots=True)
class Record:
    """An object that was pickled by class: its class name, constructor arguments and attributes, and no behaviour."""

    name: str
    args: tuple = ()
    attributes: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"Record({self.name})"


FindGlobal = Callable[[str], Token | None]
LoadPersistent = Callable[[Any], Any]


class Machine:
    """Reads one pickle. `find` maps 'module.name' to a Token or None, `persistent` resolves storage ids.

    The actions of opcodes raise WeightsError for what is refused and one of MALFORMED for what makes no sense; `load`
    turns these into WeightsError.
    """

    def __init__(self, budget: Budget, find: FindGlobal, persistent: LoadPersistent | None = None):
        self.budget, self.source, self.find, self.persistent = budget, budget.source, find, persistent
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.globals: set[str] = set()

    def load(self, stream: io.BytesIO) -> Any:
        """The next pickle's object; `stream` is left behind its STOP. Raises WeightsError for anything unexpected."""
        try:
            return self._run(stream)
        except WeightsError:
            raise
        except MALFORMED as error:
            raise refuse(self.source, f"is truncated or not a valid pickle ({error})") from error

    def _run(self, stream: io.BytesIO) -> Any:
        for opcode, arg, _ in pickletools.genops(stream):
            self.budget.items(1)
            if opcode.name == "STOP":
                return self._pop()
            self._act(opcode.name, arg)
        raise refuse(self.source, "is truncated")

    def _act(self, name: str, arg: Any) -> None:
        if name in IGNORED:
            return
        if name in LITERALS:
            self._push_literal(arg)
        elif name in CONSTANTS:
            self.stack.append(CONSTANTS[name]())
        elif name in ACTIONS:
            ACTIONS[name](self, arg)
        else:
            named = f" of {arg.replace(' ', '.')}" if isinstance(arg, str) and arg else ""
            raise refuse(self.source, f"uses pickle opcode {name}{named}, which is not allowed")

    def _push_literal(self, value: Any) -> None:
        if isinstance(value, int) and value.bit_length() > MAX_INTEGER_BITS:
            raise refuse(self.source, f"holds an integer of {value.bit_length()} bits")
        if isinstance(value, str):
            value.encode()  # half a surrogate pair is a ValueError here, and would be one wherever it is printed
        self.budget.text(sys.getsizeof(value))
        self.stack.append(value)

    def _pop(self) -> Any:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise ValueError("stack is empty")
        return self.stack.pop()

    def _top(self, kind: type) -> Any:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0) or type(self.stack[-1]) is not kind:
            raise ValueError(f"expected a {kind.__name__} to fill")
        return self.stack[-1]

    def _pop_mark(self) -> list[Any]:
        at = self.marks.pop()
        items = self.stack[at:]
        del self.stack[at:]
        return items

    def mark(self, _: Any) -> None:
        self.marks.append(len(self.stack))

    def dup(self, _: Any) -> None:
        self.stack.append(self.stack[-1])

    def tuple_of(self, count: int) -> None:
        items = [self._pop() for _ in range(count)]
        self.stack.append(tuple(reversed(items)))

    def fill_dict(self, target: dict, items: list[Any]) -> None:
        """Keys and values in turn into `target`. Raises ValueError for a key of a type that names nothing."""
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[checked_key(key)] = value

    def set_items(self, items: list[Any]) -> None:
        self.fill_dict(self._top(dict), items)

    def add_items(self, items: list[Any]) -> None:
        self._top(set).update(map(checked_key, items))

    def setitem(self, _: Any) -> None:
        value, key = self._pop(), self._pop()
        self.set_items([key, value])

    def append(self, _: Any) -> None:
        value = self._pop()
        self._top(list).append(value)

    def extend(self, _: Any) -> None:
        items = self._pop_mark()
        self._top(list).extend(items)

    def make_dict(self, _: Any) -> None:
        made: dict = {}
        self.fill_dict(made, self._pop_mark())
        self.stack.append(made)

    def put(self, index: int | None) -> None:
        self.memo[len(self.memo) if index is None else index] = self.stack[-1]

    def get(self, index: int) -> None:
        self.stack.append(self.memo[index])

    def push_global(self, name: str) -> None:
        """Push the token of 'module.name'. Raises WeightsError for one that is not known."""
        self.globals.add(name)
        token = self.find(name)
        if token is None or not is_name(name):
            raise refuse(self.source, f"wants the global {name!r}, which no known checkpoint needs")
        self.stack.append(token)

    def stack_global(self, _: Any) -> None:
        """Push the token of the two names on the stack. Raises ValueError where they are no text."""
        name, module = self._pop(), self._pop()
        if not (isinstance(name, str) and isinstance(module, str)):
            raise ValueError("a global without a name")
        self.push_global(f"{module}.{name}")

    def _call(self, target: Any, args: Any) -> None:
        if not isinstance(args, tuple):
            raise ValueError("arguments are not a tuple")
        if not isinstance(target, Token) or target.call is None:
            name = target.name if isinstance(target, Token) else type(target).__name__
            raise refuse(self.source, f"calls {name!r}, which is not allowed")
        self.budget.copies(args)
        self.stack.append(target.call(*args))

    def reduce(self, _: Any) -> None:
        args, target = self._pop(), self._pop()
        self._call(target, args)

    def new_with_keywords(self, _: Any) -> None:
        """Call a constructor. Raises ValueError for keyword arguments, which no known file has."""
        keywords, args, target = self._pop(), self._pop(), self._pop()
        if keywords:
            raise ValueError("keyword arguments for a constructor")
        self._call(target, args)

    def build(self, _: Any) -> None:
        """Attach a state to a record. A dictionary's own attributes (a state dict's version numbers) are dropped.

        Raises ValueError for a state of anything else.
        """
        state = self._pop()
        target = self.stack[-1]
        if isinstance(target, Record):
            target.attributes.update(attributes_of(self.budget, state))
        elif not isinstance(target, dict):
            raise ValueError(f"a state for a {type(target).__name__}")

    def persistent_id(self, _: Any) -> None:
        """Push what a storage id stands for. Raises WeightsError where the file may hold none."""
        if self.persistent is None:
            raise refuse(self.source, "refers to data outside the file")
        self.stack.append(self.persistent(self._pop()))


def checked_key(key: Any) -> Any:
    """A key of a dictionary or member of a set, which must hash quickly. Raises ValueError for anything else."""
    if not isinstance(key, KEY_TYPES) or (isinstance(key, int) and key.bit_length() > MAX_KEY_BITS):
        raise ValueError(f"a {type(key).__name__} as key, which would be slow to find")
    return key


def attributes_of(budget: Budget, state: Any) -> dict[str, Any]:
    """The attribute dict of a pickled object state: a dict, a (dict, slots) pair, or anything else under 'state'.

    Raises ValueError for an attribute that is not named by text, WeightsError where the budget ends.
    """
    parts = state if isinstance(state, tuple) and len(state) == 2 else (state,)
    if not all(isinstance(part, (dict, type(None))) for part in parts) or state is None:
        return {"state": state}
    found: dict[str, Any] = {}
    for part in parts:
        budget.items(len(part or ()))
        found.update(part or {})
    if not all(isinstance(name, str) for name in found):
        raise ValueError("an attribute without a name")
    return found


IGNORED = frozenset(("PROTO", "FRAME"))
LITERALS = frozenset(
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 STRING BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES BINBYTES8 "
    "UNICODE SHORT_BINUNICODE BINUNICODE BINUNICODE8 FLOAT BINFLOAT".split()
)
CONSTANTS: Mapping[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_DICT": dict,
    "EMPTY_SET": set,
}
ACTIONS: Mapping[str, Callable[[Machine, Any], object]] = {
    "MARK": Machine.mark,
    "POP": lambda m, _: m._pop() if len(m.stack) > (m.marks[-1] if m.marks else 0) else m.marks.pop(),
    "POP_MARK": lambda m, _: m._pop_mark(),
    "DUP": Machine.dup,
    "LIST": lambda m, _: m.stack.append(m._pop_mark()),
    "TUPLE": lambda m, _: m.stack.append(tuple(m._pop_mark())),
    "DICT": Machine.make_dict,
    "FROZENSET": lambda m, _: m.stack.append(frozenset(map(checked_key, m._pop_mark()))),
    "TUPLE1": lambda m, _: m.tuple_of(1),
    "TUPLE2": lambda m, _: m.tuple_of(2),
    "TUPLE3": lambda m, _: m.tuple_of(3),
    "APPEND": Machine.append,
    "APPENDS": Machine.extend,
    "SETITEM": Machine.setitem,
    "SETITEMS": lambda m, _: m.set_items(m._pop_mark()),
    "ADDITEMS": lambda m, _: m.add_items(m._pop_mark()),
    "PUT": Machine.put,
    "BINPUT": Machine.put,
    "LONG_BINPUT": Machine.put,
    "MEMOIZE": Machine.put,
    "GET": Machine.get,
    "BINGET": Machine.get,
    "LONG_BINGET": Machine.get,
    "GLOBAL": lambda m, arg: m.push_global(arg.replace(" ", ".", 1)),
    "STACK_GLOBAL": Machine.stack_global,
    "REDUCE": Machine.reduce,
    "NEWOBJ": Machine.reduce,
    "NEWOBJ_EX": Machine.new_with_keywords,
    "BUILD": Machine.build,
    "BINPERSID": Machine.persistent_id,
}
