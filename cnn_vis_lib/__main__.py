"""Starts the program, as the installed command or from the script. This is no room of the house: it
is the only file here that imports the script."""

import os
import signal
import sys

from .install import PROGRAM, missing_package


def start():
    """Runs the program; returns the exit status. Until main(), Ctrl-C ends it without a traceback;
    in the background of a script that stays ignored."""
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        from cnn_vis import main
    except ModuleNotFoundError as error:
        print(f"{PROGRAM}: error: {missing_package(error)}", file=sys.stderr)
        return 2
    complete()
    return main()


def complete():
    """Completes a command line if a shell asks for it, by argcomplete."""
    if "_ARGCOMPLETE" in os.environ:
        import argcomplete

        from .options import PARSER

        argcomplete.autocomplete(PARSER)


if __name__ == "__main__":
    sys.exit(start())
