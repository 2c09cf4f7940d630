"""Models of any kind: where they come from, how they are run, and what follows their decoder."""

from .. import registration as registration
