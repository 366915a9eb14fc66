"""Runs what docs/clients.md tells the users of other people's programs to do. Started by stack.py.

Each section's blocks are run as they stand in the document, but for the address and the key, in a home of their own
and behind a gateway of their own (clients.yaml), where every request has to wait in front of the demo. The waits are
real, so all sections begin with the first one.
"""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from threading import Event

import pytest

from gateways import STACK, get, seen
from stack import Gateway

HERE = Path(__file__).parent
INSTALLED = HERE / "clients"
PATIENCE_SECONDS = 120
# A program's first request waits for at least half of this.
LEAST_WAIT_SECONDS = 3
KEY = "the-key-of-a-client"

# The requests that each client sends; more would be tries that nobody is told of.
REQUESTS = {
    "openai-python": 2,
    "openai-node": 2,
    "Anthropic SDK": 2,
    "curl": 1,
    "LangChain for Python": 2,
    "LangChain for JavaScript": 2,
    "LiteLLM": 2,
    "Codex CLI": 1,
    "OpenCode": 2,
    "Continue": 1,
}
# Its package for npm is not the same everywhere; this one has no installer.
OPENCODE = INSTALLED / "node_modules/opencode-linux-x64/bin"
# Run where somebody has them; too large to install each time.
BY_HAND = {"aider": ("aider", 2), "Claude Code": ("claude", 1)}
# Cline leaves a daemon running.
NOT_RUN = {"Cline", "Roo Code", "Open WebUI", "n8n"}

# What keeps the programs from looking for updates, catalogues and statistics.
ALONE = {
    "AIDER_ANALYTICS_DISABLE": "true",
    "AIDER_CHECK_UPDATE": "false",
    "AIDER_YES_ALWAYS": "true",
    "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
    "CONTINUE_TELEMETRY_ENABLED": "0",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "OPENCODE_DISABLE_AUTOUPDATE": "1",
    "OPENCODE_DISABLE_MODELS_FETCH": "1",
}


@cache
def sections():
    """By heading, the fenced blocks: (language, the file it is the content of or "", text)."""
    paper = (HERE.parent.parent / "docs" / "clients.md").read_text()
    fence = re.compile(r"^```(\w+) ?(\S*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    return {name: fence.findall(text) for name, text in re.findall(r"^## (.+)\n((?:(?!^## ).*\n)*)", paper, re.MULTILINE)}


@cache
def running():
    names = [name for name in [*REQUESTS, *BY_HAND] if not missing(name)]
    pool = ThreadPoolExecutor(len(names))
    return {name: pool.submit(follow, name) for name in names}


def missing(name):
    """The program that is not there, where that is no fault."""
    if name == "OpenCode" and (sys.platform, platform.machine()) != ("linux", "x86_64"):
        return "opencode for Linux on x86_64"
    program, _ = BY_HAND.get(name, (None, None))
    return None if program is None or shutil.which(program) else program


def follow(name):
    """Does what the section says; returns what the programs printed, what the gateway counted, and how many of these
    requests were ours."""
    with tempfile.TemporaryDirectory(prefix="limitrate-client-") as folder:
        home, work = Path(folder, "home"), Path(folder, "work")
        home.mkdir()
        work.mkdir()
        subprocess.run(["git", "init", "--quiet", work], check=True)
        (work / "node_modules").symlink_to(INSTALLED / "node_modules")
        variables = {"DEMO": STACK["demo"], "GATEWAY_TOKEN": KEY}
        gateway = Gateway(name.replace(" ", "-"), Path(folder), variables, "clients.yaml")
        try:
            url = gateway.ready()
            take_a_slot(url)
            ended = Event()
            with ThreadPoolExecutor(1) as pool:
                holder = pool.submit(take_slots_until_somebody_waits, url, ended)
                try:
                    printed = "".join(run(block, url, home, work) for block in sections()[name])
                finally:
                    ended.set()
            return printed, stats(url), 1 + holder.result()
        finally:
            fault = gateway.stop()
            assert not fault, f"{fault}\n{gateway.log.read_text()}"


def run(block, url, home, work):
    language, file, text = block
    text = text.replace("http://localhost:8080", url).replace("anything", KEY)
    if file:
        target = home / file[2:] if file.startswith("~/") else work / file
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
        return ""
    script = work / {"python": "block.py", "js": "block.mjs", "sh": "block.sh"}[language]
    script.write_text(text)
    program = {"python": INSTALLED / ".venv/bin/python", "js": "node", "sh": "bash"}[language]
    path = f"{INSTALLED}/node_modules/.bin:{OPENCODE}:{os.environ['PATH']}"
    ended = subprocess.run(
        [program, *(["-e"] if language == "sh" else []), script],
        cwd=work,
        # Nothing of the caller's own settings and keys.
        env=ALONE | {"PATH": path, "HOME": str(home), "LANG": "C.UTF-8", "TERM": "dumb"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        timeout=PATIENCE_SECONDS,
    )
    assert ended.returncode == 0, f"{text}\nended with {ended.returncode}:\n{ended.stdout}\n{ended.stderr}"
    return ended.stdout


def stats(url):
    (row,) = get(f"{url}/admin/stats", KEY)["providers"]
    return row


def take_slots_until_somebody_waits(url, ended):
    """Takes each slot that a program which starts slowly would find open; returns how many."""
    taken = 0
    while True:
        next_slot = time.monotonic() + stats(url)["interval_seconds"]
        while time.monotonic() < next_slot - LEAST_WAIT_SECONDS:
            row = stats(url)
            if row["queued_ahead"] or row["waiting_in_acquire"] or row["sent"] > 1 + taken or ended.wait(0.5):
                return taken
        taken += 1
        take_a_slot(url)


def take_a_slot(url):
    body = json.dumps({"model": "demo", "messages": [{"role": "user", "content": "first"}]}).encode()
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(f"{url}/v1/chat/completions", body, headers), timeout=20) as answer:
        assert b"first" in answer.read()


def test_every_section_is_run_or_said_to_be_not():
    assert sections().keys() == REQUESTS.keys() | BY_HAND.keys() | NOT_RUN
    assert all(sections()[name] for name in [*REQUESTS, *BY_HAND])


@pytest.mark.parametrize("name", [*REQUESTS, *BY_HAND])
def test_a_client_with_the_documented_settings_waits_in_line_and_is_answered(name):
    if missing(name):
        pytest.skip(f"no {missing(name)}")
    printed, row, ours = running()[name].result()
    assert "You said: " in printed and "Hello there!" in printed, printed
    requests = ours + (REQUESTS.get(name) or BY_HAND[name][1])
    wrong = [row[name] for name in ("upstream_4xx", "upstream_5xx", "upstream_errors", "cancelled_in_queue")]
    assert row["sent"] == requests and not any(wrong), row
    assert row["queue_wait_seconds"]["max"] > LEAST_WAIT_SECONDS / 2, row


@pytest.mark.parametrize("script, words", [("broken", "broke before the answer was complete"), ("late 1 refused 402 3", "scripted 402")])
def test_codex_shows_an_error_of_its_stream_and_sends_no_request_again(script, words):
    requests = lambda: [request for request in seen("quick") if request["path"].endswith("/responses")]
    before = len(requests())
    with tempfile.TemporaryDirectory(prefix="limitrate-codex-") as folder:
        home, work = Path(folder, "home"), Path(folder, "work")
        (home / ".codex").mkdir(parents=True)
        subprocess.run(["git", "init", "--quiet", work], check=True)
        # Codex waits for five minutes: the heartbeats come at once for a timeout like this.
        headers = f'{{ "x-script" = "{script}", "x-stainless-read-timeout" = "0.3" }}'
        (home / ".codex/config.toml").write_text(
            'model = "chat-model"\nmodel_provider = "limitrate"\n[model_providers.limitrate]\nname = "limitrate"\n'
            f'base_url = "{STACK["open"]}/v1"\nenv_key = "LIMITRATE_KEY"\nwire_api = "responses"\nhttp_headers = {headers}\n'
        )
        ended = subprocess.run(
            [INSTALLED / "node_modules/.bin/codex", "exec", "hi"],
            cwd=work,
            env={"PATH": os.environ["PATH"], "HOME": str(home), "LIMITRATE_KEY": KEY, "TERM": "dumb"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=PATIENCE_SECONDS,
        )
    assert words in ended.stdout, ended.stdout[-2000:]
    assert len(requests()) == before + 1


def test_the_versions_told_are_those_installed():
    paper = (HERE.parent.parent / "docs" / "clients.md").read_text()
    told = dict(re.findall(r"^\| \[(.+?)\].*\| (.+) \|$", paper, re.MULTILINE))
    python = dict(line.split("==") for line in (INSTALLED / "requirements.txt").read_text().split() if "==" in line)
    node = json.loads((INSTALLED / "package.json").read_text())
    node = node["dependencies"] | node["optionalDependencies"]
    assert {name: told[name] for name in REQUESTS} == {
        "openai-python": python["openai"],
        "openai-node": node["openai"],
        "Anthropic SDK": python["anthropic"],
        "curl": "any",
        "LangChain for Python": python["langchain-openai"],
        "LangChain for JavaScript": node["@langchain/openai"],
        "LiteLLM": python["litellm"],
        "Codex CLI": node["@openai/codex"],
        "OpenCode": node["opencode-linux-x64"],
        "Continue": f"cli {node['@continuedev/cli']}",
    }
