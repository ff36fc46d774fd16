"""The command line: one file per command, put together in `root`. Commands read options, call, and print; they decide nothing."""
