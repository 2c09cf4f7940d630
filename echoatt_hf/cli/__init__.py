"""The command line, `echoatt`."""
