"""A jitted function of a run with abstract arguments, ready to be compiled ahead of time."""

import dataclasses
from typing import Any

import jax
from jax.sharding import Mesh


@dataclasses.dataclass(frozen=True)
class Output:
    """An argument that is the result of an earlier program."""

    program: str


@dataclasses.dataclass(frozen=True)
class Program:
    """A jitted function of a run with the shapes and shardings of its arguments."""

    name: str
    function: Any  # jitted
    args: tuple[Any, ...]  # trees of jax.ShapeDtypeStruct or `Output`, and static values
    calls: float  # in one training step
    flops: float  # of the model in one call, by formula
    # Earlier programs whose results stay in memory during a call; a repeated name is two results.
    kept: tuple[str, ...] = ()
    not_loaded: tuple[str, ...] = ()  # models of the stage that are not in memory yet
    loop_trips: float = 1.0  # of loops whose end depends on data
    others: tuple[Any, ...] = ()  # further arrays in memory during a call
    mesh: Mesh | None = None  # under which it runs; None = that of training

    @property
    def needs(self) -> tuple[str, ...]:
        """The earlier programs whose results are arguments."""
        leaves = jax.tree.leaves(self.args, is_leaf=_is_output)
        return tuple(dict.fromkeys(x.program for x in leaves if _is_output(x)))

    def lower(self, outputs: dict[str, Any]) -> Any:
        """Lower the function for its arguments.

        `outputs` has the abstract results of earlier programs by name.
        """
        return self.function.lower(
            *jax.tree.map(
                lambda x: outputs[x.program] if _is_output(x) else x, self.args, is_leaf=_is_output
            )
        )


def _is_output(x: Any) -> bool:
    return isinstance(x, Output)
