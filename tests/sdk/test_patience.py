"""How openai-python and anthropic-python wait at limitrate: heartbeats, deadlines, retries. Started by stack.py.

The waits are real, so all tests begin with the first one, each with models of its own, and with both SDKs.
"""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from types import SimpleNamespace

import anthropic
import openai
import pytest

from gateways import CLOCKS_APART_SECONDS, STACK, gaps, says, scripted, seen, stats, together, until

WORDS = ["Queue,", " don't", " reject."]
OFF = {"X-Limitrate-Heartbeat": "off"}
# Shorter than the waits here.
TIMEOUT = 1.5
USAGE = {"stream_options": {"include_usage": True}}
PLAIN = {"api_key": "the-caller's-key", "max_retries": 0, "timeout": TIMEOUT}


def chat(model, text="hi", sdk=None, stream=False, **more):
    answer = (sdk or OPENAI.client).chat.completions.create(model=model, messages=says(text), stream=stream, **more)
    return [chunk.choices[0].delta.content for chunk in answer] if stream else [answer.choices[0].message.content]


def message(model, text="hi", sdk=None, stream=False, **more):
    messages, more = (sdk or ANTHROPIC.client).messages, {"model": model, "max_tokens": 9, "messages": says(text)} | more
    if not stream:
        return [messages.create(**more).content[0].text]
    with messages.stream(**more) as events:
        return list(events.text_stream)


# The SDKs as far as they differ. `ask` returns what was said, word by word where it is streamed.
OPENAI = SimpleNamespace(
    name="openai",
    package=openai,
    client=openai.OpenAI(base_url=f"{STACK['patient']}/v1", **PLAIN),
    direct=openai.OpenAI(base_url=f"{STACK['upstream']}/direct/v1", **PLAIN | {"timeout": 20}),
    ask=chat,
    unavailable=openai.InternalServerError,
    error_event=openai.APIError,
)
ANTHROPIC = SimpleNamespace(
    name="anthropic",
    package=anthropic,
    client=anthropic.Anthropic(base_url=STACK["patient"], **PLAIN),
    direct=anthropic.Anthropic(base_url=f"{STACK['upstream']}/direct", **PLAIN | {"timeout": 20}),
    ask=message,
    unavailable=anthropic.ServiceUnavailableError,
    error_event=anthropic.APIStatusError,
)


CHECKS = []


def with_each_sdk(check):
    CHECKS.append(check)

    def test():
        for running in begun()[check]:
            running.result()

    return test


@cache
def begun():
    callers = ThreadPoolExecutor(2 * len(CHECKS))
    return {check: [callers.submit(check, sdk) for sdk in (OPENAI, ANTHROPIC)] for check in CHECKS}


def failure(kind, call, *arguments, **more):
    """The error that a call ends in; its class is checked exactly."""
    with pytest.raises(kind) as failed:
        call(*arguments, **more)
    assert type(failed.value) is kind, repr(failed.value)
    return failed.value


def unannounced(sdk):
    """What keeps the SDK from telling its read timeout."""
    return {"x-stainless-read-timeout": sdk.package.Omit()}


# --- heartbeats


@with_each_sdk
def test_a_wait_longer_than_the_read_timeout_succeeds_with_heartbeats_and_fails_without(sdk):
    plain, streamed = partial(sdk.ask, f"{sdk.name}-plain"), partial(sdk.ask, f"{sdk.name}-stream", stream=True)
    together(plain, streamed)
    timeout = sdk.package.APITimeoutError
    start = time.monotonic()
    *answers, _, _, refused, refused_stream = together(
        plain,
        streamed,
        partial(sdk.ask, "slow", extra_headers=scripted("late 2")),
        partial(sdk.ask, "slow", stream=True, extra_headers=scripted("late 2")),
        # Who does not tell how long it waits finds out for itself.
        partial(failure, timeout, plain, extra_headers=OFF | unannounced(sdk)),
        partial(failure, timeout, streamed, extra_headers=OFF | unannounced(sdk)),
        partial(failure, sdk.unavailable, plain, extra_headers=OFF),
        partial(failure, sdk.unavailable, streamed, extra_headers=OFF),
    )
    assert answers == 2 * [["hi"], WORDS]
    assert time.monotonic() - start > 2
    for error in (refused, refused_stream):
        assert error.status_code == 503 and "timeout" in error.message


@with_each_sdk
def test_heartbeats_leave_no_trace_in_a_stream(sdk):
    question = {"model": "slow", "messages": says("hi"), "stream": True}
    if sdk is OPENAI:
        calls = [
            lambda client, **more: client.chat.completions.create(**question, **more),
            lambda client, **more: client.chat.completions.create(**question, **USAGE, **more),
            lambda client, **more: client.responses.create(model="slow", input="hi", stream=True, **more),
        ]
    else:
        calls = [lambda client, **more: client.messages.create(max_tokens=9, **question, **more)]
    sent = [list(call(sdk.direct)) for call in calls]
    assert together(*(lambda call=call: list(call(sdk.client, extra_headers=scripted("late 2"))) for call in calls)) == sent
    assert [len(chunks) for chunks in sent] == ([3, 4, 5] if sdk is OPENAI else [8])
    assert sdk is ANTHROPIC or sent[1][-1].usage.total_tokens == 10


@with_each_sdk
def test_what_goes_wrong_after_a_heartbeat_raises_with_its_message(sdk):
    def goes_wrong(model, message, script):
        error = failure(sdk.error_event, sdk.ask, model, stream=True, extra_headers=scripted(script))
        assert message in error.message, error

    together(
        partial(goes_wrong, "slow", "scripted 400", "late 2 status 400"),
        partial(goes_wrong, "slow", "answered 500: <html>", "late 2 html 500"),
        partial(goes_wrong, "slow", "broke before the answer was complete", "late 2 broken"),
        partial(goes_wrong, "slow", "broke before the answer was complete", "late 2 torn"),
        partial(goes_wrong, "unreachable", "cannot be reached", "never read"),
        # A plain answer has no place for a message any more.
        partial(failure, sdk.package.APIConnectionError, sdk.ask, "slow", extra_headers=scripted("late 2 cut")),
    )


@with_each_sdk
def test_a_stream_that_breaks_inside_an_event_raises_after_the_events_before_it(sdk):
    words = []
    torn = {"model": "slow", "messages": says("hi"), "stream": True, "extra_headers": scripted("torn")}
    with pytest.raises(sdk.error_event, match="broke before the answer was complete"):
        if sdk is OPENAI:
            words.extend(chunk.choices[0].delta.content for chunk in sdk.client.chat.completions.create(**torn))
        else:
            events = sdk.client.messages.create(max_tokens=9, **torn)
            words.extend(event.delta.text for event in events if event.type == "content_block_delta")
    assert words == WORDS[:2]


def test_a_response_that_breaks_inside_an_event_raises_as_well():
    with pytest.raises(openai.APIError, match="broke before the answer was complete"):
        list(OPENAI.client.responses.create(model="slow", input="hi", stream=True, extra_headers=scripted("torn")))


# --- deadlines


@with_each_sdk
def test_who_would_wait_in_vain_is_told_so_at_once_and_not_to_hammer(sdk):
    model = f"far-{sdk.name}"
    sdk.ask(model)
    start = time.monotonic()
    error = failure(sdk.unavailable, sdk.ask, model, sdk=sdk.client.with_options(max_retries=2), extra_headers=OFF)
    assert time.monotonic() - start < TIMEOUT
    assert error.status_code == 503 and "the caller waits 1.5 s" in error.message
    assert error.response.headers["x-should-retry"] == "false"
    assert 90 <= int(error.response.headers["retry-after"]) <= 100
    assert stats(model, "patient")["rejected_deadline"] == 1 and len(seen(model)) == 1


@with_each_sdk
def test_a_retrying_client_is_back_when_it_can_be_served_in_time(sdk):
    model = f"soon-{sdk.name}"
    sdk.ask(model)
    assert sdk.ask(model, sdk=sdk.client.with_options(max_retries=2), extra_headers=OFF) == ["hi"]
    assert stats(model, "patient")["rejected_deadline"] == 1
    (gap,) = gaps(model)
    assert gap >= 2.75 - CLOCKS_APART_SECONDS


# --- retries


@with_each_sdk
def test_a_retry_takes_back_the_place_of_the_call_that_timed_out(sdk):
    model = f"place-{sdk.name}"
    headers = OFF | unannounced(sdk)
    # The slot comes after 3 s; it times out after 1.75 and is back half a second later at most.
    retrying, patient = sdk.client.with_options(max_retries=2, timeout=1.75), sdk.client.with_options(timeout=3.5)
    sdk.ask(model, "first")

    def comes_in_between():
        until(model, "patient", queued_ahead=1)
        failure(sdk.package.APITimeoutError, sdk.ask, model, "other", sdk=patient, extra_headers=headers)

    answer, _ = together(partial(sdk.ask, model, "retried", sdk=retrying, extra_headers=headers), comes_in_between)
    assert answer == ["retried"]
    assert [json.loads(request["body"])["messages"][0]["content"] for request in seen(model)] == ["first", "retried"]
    assert stats(model, "patient")["returned_to_place"] == 1
