"""What a method and a model say of themselves before torch is imported: one declaration at the end of an options file.

    sdtrain/methods/NAME/options.py: METHOD = MethodDeclaration(options=Options, players=("G", "D"), ...)
    sdtrain/models/KIND/options.py:  MODEL = ModelDeclaration(generator=GeneratorOptions, ...)

`NAME` and `KIND` are folder names; `method:` and `model.*.kind` of a configuration choose among the folders that exist.
"""

from __future__ import annotations

import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from sdtrain.data.read.dataset import Dataset

Role = Literal["generator", "discriminator"]
ROLES: tuple[Role, ...] = ("generator", "discriminator")


@cache
def field_types(cls: type) -> dict[str, Any]:
    """The types of a dataclass's fields, by name; annotations that are text are resolved."""
    return typing.get_type_hints(cls, include_extras=True)


@dataclass(frozen=True, kw_only=True)
class MethodDeclaration:
    """A method's keys and the checks that need no tensors. `config` is the whole loaded configuration."""

    options: type
    """Its fields become top-level keys; one named like a common key replaces it."""
    players: tuple[str, ...] = ("G", "D")
    """The keys of `optimizer`, one section a player."""
    decisive: tuple[str, ...] = ()
    """Keys that elsewhere may change on resume, but decide weights here."""
    teacher_keys: tuple[str, ...] = ()
    """Keys that take the folder of a run whose teacher is the network that `model` describes."""
    needs_teacher: Callable[[Any], bool] = lambda config: True
    """Whether this configuration has a use for `teacher_keys`."""
    problems: Callable[[Any], Iterable[tuple[str, str]]] = lambda config: ()
    """(key, sentence) for each combination of keys that cannot work."""
    data_problems: Callable[[Any, Dataset], Iterable[str]] = lambda config, dataset: ()
    """Sentences about what the opened training data cannot do."""
    weights_needed: Callable[[Any], Mapping[str, str]] = lambda config: {}
    """Frozen networks in use: name in `sdtrain.weights` -> key of `weights`."""


@dataclass(frozen=True, kw_only=True)
class ModelDeclaration:
    """A model's option classes, whose fields are the keys of `model.generator` or `model.discriminator`."""

    generator: type | None = None
    """Options of `networks.Generator`; None = there is none."""
    discriminator: type | None = None
    """Options of `networks.Discriminator`; None = there is none."""
    scaled: Callable[..., Any] | None = None
    """(options, C, growth=, style=) -> options of a student with the share C of the channels; None = there is none.

    It takes the keywords it knows and leaves those of other models aside.
    """
    deepened: Callable[[Any], Any] | None = None
    """Options of a generator -> those of a deeper one of the same width; None = there is none."""
    feature_weights: Callable[[Any], str] | None = None
    """Options -> name in `sdtrain.weights` of a frozen network of the discriminator, its argument `feature_weights`."""
    blocks: Mapping[Role, tuple[str, ...]] = field(default_factory=dict)
    """Parts of a network that `checkpoint_activations` computes again, by their names (`*`: any word between dots)."""

    def options(self, role: Role) -> type | None:
        return self.generator if role == "generator" else self.discriminator
