"""The names of decoding plans. Nothing heavy is imported here: a command refuses a wrong name before it loads torch."""

from typing import Literal, NamedTuple

from tidar_megatron.errors import UserError

Mode = Literal["auto", "tidar", "linear", "ar", "lookup"]


class Plan(NamedTuple):
    """The first options of a :class:`~tidar_megatron.inference.request.DecodeOptions`: mode, draft length, branches."""

    mode: Mode
    draft_length: int | None = None
    branches: int | Literal["all"] = "all"


def plan_named(name: str) -> Plan:
    """Return the plan of a name: ``auto``, ``ar``, ``linear:K``, ``lookup:K``, ``all:K``, or ``N:K`` with N branches.

    Raises:
        UserError: the name is not a plan.
    """
    kind, _, length = name.partition(":")
    if name in ("auto", "ar"):
        return Plan("auto" if name == "auto" else "ar")
    if length.isdecimal() and kind in ("linear", "lookup"):
        return Plan("linear" if kind == "linear" else "lookup", int(length))
    if length.isdecimal() and (kind == "all" or kind.isdecimal()):
        return Plan("tidar", int(length), "all" if kind == "all" else int(kind))
    raise UserError(f"plan {name!r}: use auto, ar, linear:8, lookup:8, all:8 or 2:8 (two branches of 8)")
