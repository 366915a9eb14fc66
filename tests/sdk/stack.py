"""Runs a command among running gateways: `stack.py COMMAND...`

Starts the scripted upstream and four gateways (open.yaml, locked.yaml, patient.yaml, the demo), tells the command in
the variable STACK (JSON) where they are, and stops them when it ends. LIMITRATE_BIN names the binary. Exits as the
command did, or with 1 when a gateway died or did not stop as it should.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import upstream

HERE = Path(__file__).parent
READY_SECONDS = 20
STOP_SECONDS = 10


def main():
    with tempfile.TemporaryDirectory(prefix="limitrate-sdk-") as folder, refusing_port() as closed:
        stack = {
            "upstream": upstream.start(),
            "gateway_token": "the-gateway's-token",
            "provider_key": "the-provider's-key",
        }
        variables = {
            "UPSTREAM": stack["upstream"],
            "REFUSING": f"http://127.0.0.1:{closed}",
            "GATEWAY_TOKEN": stack["gateway_token"],
            "PROVIDER_KEY": stack["provider_key"],
        }
        gateways = [Gateway(name, Path(folder), variables) for name in ("open", "locked", "patient", "demo")]
        try:
            stack |= {gateway.name: gateway.ready() for gateway in gateways}
            status = subprocess.run(sys.argv[1:], env=os.environ | {"STACK": json.dumps(stack)}).returncode
        finally:
            faults = [fault for gateway in gateways if (fault := gateway.stop())]
        for gateway in gateways if status or faults else []:
            print(f"--- what the {gateway.name} gateway wrote\n{gateway.log.read_text()}", file=sys.stderr)
        for fault in faults:
            print(fault, file=sys.stderr)
        sys.exit(status or bool(faults))


class Gateway:
    def __init__(self, name, folder, variables, config=None):
        self.name = name
        self.port = free_port()
        self.log = folder / f"{name}.log"
        arguments = ["demo", "--port", str(self.port)]
        if name != "demo":
            template = (HERE / (config or f"{name}.yaml")).read_text()
            filled = folder / f"{name}.yaml"
            filled.write_text(template.replace("@PORT@", str(self.port)))
            arguments = ["--config", filled]
        with self.log.open("w") as log:
            command = [os.environ["LIMITRATE_BIN"], *arguments]
            self.process = subprocess.Popen(command, env=os.environ | variables, stdout=log, stderr=log)

    def ready(self):
        """Waits until it accepts connections; returns its address as a URL."""
        deadline = time.monotonic() + READY_SECONDS
        while self.process.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1):
                return f"http://127.0.0.1:{self.port}"
            time.sleep(0.02)
        sys.exit(f"the {self.name} gateway does not serve:\n{self.log.read_text()}")

    def stop(self):
        """Ends it as an operator would; returns what was wrong with that, or None."""
        died = self.process.poll()
        if died is not None:
            return f"the {self.name} gateway died with {died}"
        self.process.terminate()
        try:
            status = self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return f"the {self.name} gateway still ran {STOP_SECONDS} s after SIGTERM"
        return f"the {self.name} gateway ended with {status} on SIGTERM" if status else None


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def refusing_port():
    """A port that refuses connections: bound, so that nobody else gets it, and never listened on."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]


if __name__ == "__main__":
    main()
