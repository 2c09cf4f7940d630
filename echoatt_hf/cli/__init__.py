"""The command line, `echoatt`."""

from .app import main as main
