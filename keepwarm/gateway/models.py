"""Which model a name means. One model is served, under its own name and its aliases; with `dev` under any name.

Cache objects and requests meet here: both are resolved to the served name before they are compared, so an object made
for a family ("moonshot-v1") serves every name of that family.
"""

from keepwarm.config import ModelConfig
from keepwarm.core.errors import ApiError, ErrorKind


class ServedModels:
    """Resolves the names clients use."""

    def __init__(self, config: ModelConfig, *, any_name: bool) -> None:
        self.served = config.name
        self.names = (config.name, *(alias for alias in config.aliases if alias != config.name))
        self._known = frozenset(self.names)
        self._any_name = any_name

    def resolve(self, name: str) -> str:
        """The served model's own name. Raises ApiError(UNKNOWN_MODEL)."""
        if self.means(name, self.served):
            return self.served
        known = ", ".join(self.names)
        raise ApiError(ErrorKind.UNKNOWN_MODEL, f"no model {name[:100]!r} here; known are: {known}", param="model")

    def means(self, name: str, served: str) -> bool:
        """Whether `name` is one of the served model's names."""
        return served == self.served and (name in self._known or (self._any_name and name != ""))
