"""A process that must not outlive the one that started it.

Linux can signal a child when its parent dies, other systems cannot: so a small thread looks at the parent's process id,
which is portable. The starter writes its own id into the environment of what it starts, for a parent may be gone before
its child gets to ask who it was.
"""

import os
import signal
import threading
import time

PARENT_VARIABLE = "CLOUDMATRIX_PARENT_PID"
POLL_S = 0.5


def exit_with_parent() -> None:
    """Send this process SIGTERM once its parent is gone, SIGKILL if it is still here 10 s later.

    The parent is the process named by `CLOUDMATRIX_PARENT_PID`, else the one that is the parent now.
    """
    parent = int(os.environ.get(PARENT_VARIABLE) or os.getppid())

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(POLL_S)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="lifeline", daemon=True).start()
