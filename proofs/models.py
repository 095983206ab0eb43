"""The two models that the explorer visits: the lease protocol, and the protocol across a failover.

A configuration says which of them it belongs to.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeAlias

import deletes
import failover
import protocol
import states

AnyConfiguration: TypeAlias = states.Configuration | failover.Failover


class Model(NamedTuple):
    """The pure functions that say what there is at first, and what may happen next."""

    first_world: Callable[[Any], Any]
    first_members: Callable[[Any], tuple[Any, ...]]
    view: Callable[[Any, Any], Any]
    member_steps: Callable[[Any, Any, Any], Iterator[Any]]
    world_steps: Callable[[Any, Any], Iterator[Any]]
    apply_effect: Callable[[Any, states.Effect, Any], Any]


LEASES = Model(
    states.first_world,
    states.first_members,
    states.view,
    protocol.member_steps,
    deletes.world_steps,
    deletes.apply_effect,
)
FAILOVER = Model(
    failover.first_world,
    failover.first_members,
    failover.view,
    failover.member_steps,
    failover.world_steps,
    failover.apply_effect,
)


def model_of(c: AnyConfiguration) -> Model:
    """The model that a configuration belongs to."""
    return FAILOVER if isinstance(c, failover.Failover) else LEASES
