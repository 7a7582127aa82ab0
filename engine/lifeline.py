"""A process that must not outlive the one that started it.

Linux can signal a child when its parent dies, other systems cannot, and neither tells when the parent was gone before
the child could ask: so a small thread looks at the parent's process id, which is portable and has no race.
"""

import os
import signal
import threading
import time

POLL_S = 0.5


def exit_with_parent() -> None:
    """Send this process SIGTERM once its parent is gone, SIGKILL if it is still here 10 s later."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(POLL_S)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="lifeline", daemon=True).start()
