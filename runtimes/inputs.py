"""The optional protocol of runtimes that run models with several inputs."""

from typing import ClassVar, Protocol, runtime_checkable


@runtime_checkable
class TakesInputs(Protocol):
    """A runtime whose engines take further inputs after the images. Others refuse models with several inputs."""

    several_inputs: ClassVar[bool]
