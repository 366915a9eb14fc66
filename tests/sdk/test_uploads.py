"""A refusal reaches a client that is still uploading. Started by stack.py.

The gateway refuses at the request head; the client has 40 MB to send and takes a failed write for the outcome.
"""

import asyncio
import json
import urllib.error
import urllib.request

import httpx2
import openai

from gateways import STACK, says

TRIES = 20
TEXT = "x" * 40_000_000
BODY = json.dumps({"model": "chat-model", "messages": says(TEXT)}).encode()
# The gateway, and what it refuses with.
REFUSALS = {"open": 413, "locked": 401}


def outcomes(attempt, gateways=tuple(REFUSALS)):
    """What each try came to: a status, or the error."""
    def tried(gateway):
        try:
            return attempt(f"{STACK[gateway]}/v1")
        except Exception as error:
            return repr(error)

    return {gateway: [tried(gateway) for _ in range(TRIES)] for gateway in gateways}


ALL_REFUSED = {gateway: [status] * TRIES for gateway, status in REFUSALS.items()}


def test_urllib_gets_a_refusal_while_it_uploads():
    def attempt(base):
        request = urllib.request.Request(f"{base}/chat/completions", data=BODY, method="POST")
        try:
            return urllib.request.urlopen(request, timeout=20).status
        except urllib.error.HTTPError as refusal:
            refusal.read()
            return refusal.code

    assert outcomes(attempt) == ALL_REFUSED


def test_async_httpx_gets_a_refusal_while_it_uploads():
    async def post(base):
        async with httpx2.AsyncClient(timeout=20) as client:
            return (await client.post(f"{base}/chat/completions", content=BODY)).status_code

    assert outcomes(lambda base: asyncio.run(post(base))) == ALL_REFUSED


def test_async_openai_gets_a_refusal_while_it_uploads():
    async def ask(base):
        async with openai.AsyncOpenAI(base_url=base, api_key="wrong", max_retries=0, timeout=20) as client:
            try:
                await client.chat.completions.create(model="chat-model", messages=says(TEXT))
            except openai.APIStatusError as refusal:
                return refusal.status_code

    # One gateway: this SDK takes longer to make so large a request than to send it.
    assert outcomes(lambda base: asyncio.run(ask(base)), ["open"]) == {"open": [413] * TRIES}
