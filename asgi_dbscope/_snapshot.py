"""The ASGI scope of a request that may be served again: a copy of it for each further attempt."""

from __future__ import annotations

from copy import copy
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from asgi_dbscope._asgi import Scope

Container = dict[Any, Any] | list[Any]


class ScopeSnapshot:
    """An ASGI scope as it was at the beginning, and that of the attempt that is being made.

    Attributes:
        current: The current attempt's: the very one that the server made, or a copy of it as it was
            at the beginning.
    """

    __slots__ = (
        "_bring_back",
        "_containers",
        "_handed",
        "_own",
        "_pristine",
        "_scope",
        "current",
    )

    def __init__(self, scope: Scope) -> None:
        self.current = self._scope = scope
        self._containers: dict[str, Container] = {
            name: value for name, value in scope.items() if isinstance(value, (dict, list))
        }
        self._pristine = _copied(scope)
        self._own: dict[str, Any] = {}
        self._handed: dict[str, tuple[Any, list[Any]]] | None = None
        self._bring_back: Callable[[], None] | None = None
        if "litestar_app" in scope:  # around us
            from asgi_dbscope.integrations.litestar import remember_request

            self._bring_back = remember_request(scope)

    def renew(self) -> None:
        """Another attempt begins.

        What the values of ``scope["state"]`` share with the whole app they go on sharing.
        """
        self.current = _copied(self._pristine)
        self._own = {name: self.current[name] for name in self._containers}
        if self._bring_back is not None:
            self._bring_back()

    def hand_back(self) -> None:
        """Let the server's scope be as the current attempt has it.

        For those around us who look at what the app put there: when the head goes out (a session's
        cookie is made then), and when the app has returned. They may have kept what they found
        there before, such as the dictionary behind Starlette's ``request.state``, so that is filled
        anew; and what they put there after the head stays.
        """
        scope, current, before = self._scope, self.current, self._handed
        if current is scope:
            return
        for name in (scope if before is None else before).keys() - current.keys():
            scope.pop(name, None)
        self._handed = {}
        for name, value in current.items():
            state = self._handed[name] = (value, _parts(value))
            if before is not None and name in before and _is_same(before[name], state):
                continue
            original = self._containers.get(name)
            if original is not None and value is self._own[name]:
                _fill(original, value)
                scope[name] = original
            else:
                scope[name] = value


def _copied(scope: Scope) -> Scope:
    """A copy of *scope* in which an app can put things without the other copies' having them."""
    return {
        name: _twin(cast("Any", value)) if isinstance(value, (dict, list)) else value
        for name, value in scope.items()
    }


def _twin(container: Any) -> Any:
    """A copy of *container*.

    One that notes what is done to it (Starlette's session, for its cookie) must not take this for
    the app's doing.
    """
    notes = _notes_of(container)
    twin = copy(container)
    _set_notes((container, twin), notes)
    return twin


def _fill(container: Any, twin: Any) -> None:
    """Let *container* hold what *twin* does."""
    notes = _notes_of(twin)
    container.clear()
    put: Any = getattr(container, "extend", None) or container.update
    put(twin)
    _set_notes((container, twin), notes)


def _notes_of(container: Any) -> dict[str, Any]:
    return dict(getattr(container, "__dict__", {}))


def _set_notes(containers: Iterable[Any], notes: dict[str, Any]) -> None:
    for each in containers:
        if hasattr(each, "__dict__"):
            each.__dict__.clear()
            each.__dict__.update(notes)


def _parts(value: Any) -> list[Any]:
    """What is in *value*, as far as the copies of an ASGI scope go."""
    container: Any = value  # what it holds is nobody's business
    if isinstance(value, dict):
        return [*container.keys(), *container.values()]
    return list(container) if isinstance(value, list) else []


def _is_same(one: tuple[Any, list[Any]], other: tuple[Any, list[Any]]) -> bool:
    """Whether nothing has changed; nobody's ``==`` is asked."""
    return (
        one[0] is other[0]
        and len(one[1]) == len(other[1])
        and all(a is b for a, b in zip(one[1], other[1], strict=True))
    )
