"""Give one object a class of its own: Python looks up `__call__` and properties on the class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_PLAIN = "_vramplan_plain_class"
_NAMES = "_vramplan_names"


def plain_class(thing: Any) -> type:
    """The object's class without any of its own."""
    return getattr(type(thing), _PLAIN, type(thing))


def give_class(thing: Any, names: Mapping[str, Any]) -> None:
    """Give the object these attributes of a class, beside those it was given before. Copies have the plain class.

    Classes of other objects are not changed.
    """
    plain = plain_class(thing)
    given = {**getattr(type(thing), _NAMES, {}), **names}

    def reduce(self: Any, protocol: Any) -> Any:
        made = plain.__reduce_ex__(self, protocol)  # type: ignore[call-arg]
        if not isinstance(made, tuple):
            return made
        _, _, *rest = made  # pickle's own function would want the class of the object
        return (new_of, (plain,), *rest)

    own = {"__module__": plain.__module__, "__qualname__": plain.__qualname__, "__doc__": plain.__doc__}
    names = {**own, "__reduce_ex__": reduce, _PLAIN: plain, _NAMES: given, **given}
    thing.__class__ = _equal_to(plain)(plain.__name__, (plain,), names)


def _equal_to(plain: type) -> type:
    """A metaclass whose classes equal this one: libraries look types up in tuples (diffusers 0.42, `from_pipe`)."""

    def equal(cls: type, other: object) -> bool:
        return other is cls or other is plain

    return type("Own", (type(plain),), {"__eq__": equal, "__hash__": lambda cls: hash(plain)})


def take_class(thing: Any) -> None:
    """Take the object's own class away."""
    if type(thing) is not plain_class(thing):
        thing.__class__ = plain_class(thing)


def new_of(cls: Any) -> Any:
    """A new object of a class, for pickle and `deepcopy`, which fill it."""
    return cls.__new__(cls)
