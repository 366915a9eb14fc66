"""What the tests of every SDK share: where the gateways of stack.py are, and what they and the upstream have seen."""

import json
import os
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

STACK = json.loads(os.environ["STACK"])

# The upstream's clock is the wall's, the gateway's is monotonic: NTP may bend one against the other.
CLOCKS_APART_SECONDS = 0.001


def says(text):
    return [{"role": "user", "content": text}]


def scripted(script):
    return {"x-script": script}


def get(url, token=None):
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=10) as response:
        return json.load(response)


def seen(provider):
    """What the upstream got for that provider, oldest first."""
    return get(f"{STACK['upstream']}/-/seen/{provider}")


def open_gate(gate):
    urllib.request.urlopen(urllib.request.Request(f"{STACK['upstream']}/-/open/{gate}", method="POST"), timeout=10)


def stats(provider, gateway="open"):
    rows = get(f"{STACK[gateway]}/admin/stats")["providers"]
    return next(row for row in rows if row["provider"] == provider)


def until(provider, gateway="open", within=5, **fields):
    """Waits until /admin/stats shows these values; a cadence is no reason to wait longer."""
    deadline = time.monotonic() + within
    while (row := stats(provider, gateway)) and {name: row[name] for name in fields} != fields:
        assert time.monotonic() < deadline, f"never {fields}: {row}"
        time.sleep(0.01)


def gaps(provider):
    instants = [request["at"] for request in seen(provider)]
    return [later - earlier for earlier, later in zip(instants, instants[1:])]


def together(*calls):
    """Makes the calls at the same time: their waits are as long as the longest. Returns or raises as they do."""
    with ThreadPoolExecutor(len(calls)) as callers:
        return [running.result() for running in [callers.submit(call) for call in calls]]
