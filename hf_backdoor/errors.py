"""How a command ends that can't go on."""

import sys
from collections.abc import Callable


# What a shell says of a command that Ctrl-C has ended.
INTERRUPTED = 130


def in_one_line(work: Callable[[], int]) -> int:
    """The exit status of some work. What the user, or the system (a full disk, a folder that can't be written), has made fail
    or interrupted ends in one line; all else is a defect of this package, and keeps its traceback."""
    try:
        return work()
    except KeyboardInterrupt:
        sys.stderr.write("hf-backdoor: interrupted: a run goes on where it stopped when it is started again\n")
        return INTERRUPTED
    except ValueError as error:
        reason = str(error)
    except OSError as error:
        if error.errno is None:  # a library's, and not the system's
            raise
        reason = f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}"
    sys.stderr.write(f"hf-backdoor: {' '.join(reason.splitlines())}\n")
    return 2
