"""What a Google machine says of its own end: a maintenance that ends it, or that it is a spot machine whose time is over."""

import http.client
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable

SAYS = {"maintenance-event": "TERMINATE_ON_HOST_MAINTENANCE", "preempted": "TRUE"}  # of instance/, a minute or so before
HOST = "GCE_METADATA_HOST"  # the variable by which Google's own programs are told of another server
SECONDS = 5  # between two looks


def watch(act: Callable[[str], None], seconds: float = SECONDS) -> threading.Thread:
    """Asks the metadata server ($HOST, or Google's) in a thread. It calls `act` once, with what was said, and ends
    there, or at once where there is no such server."""
    host = os.environ.get(HOST, "metadata.google.internal")

    def look() -> None:
        there = False
        while True:
            for name, end in SAYS.items():
                said = _ask(host, name)
                there = there or said is not None
                if not there:
                    return
                if said == end:
                    return act(f"{name}: {said}")
            time.sleep(seconds)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    return thread


def _ask(host: str, name: str) -> str | None:
    """A value of the server; "" when it has none, None when nobody answers."""
    url = f"http://{host}/computeMetadata/v1/instance/{name}"
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers={"Metadata-Flavor": "Google"}), timeout=5) as answer:
            return answer.read().decode().strip()
    except urllib.error.HTTPError:
        return ""
    except (OSError, http.client.HTTPException):
        return None
