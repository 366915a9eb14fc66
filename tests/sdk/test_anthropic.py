"""What anthropic-python sees of limitrate. Started by stack.py, which runs the gateways and the scripted upstream."""

import asyncio
import json

import anthropic
import pytest

from gateways import CLOCKS_APART_SECONDS, STACK, gaps, open_gate, says, scripted, seen, stats

PLAIN = {"api_key": "the-caller's-key", "max_retries": 0, "timeout": 20}
client = anthropic.Anthropic(base_url=STACK["open"], **PLAIN)
demo = anthropic.Anthropic(base_url=STACK["demo"], **PLAIN)


def ask(model="claude", text="hi", sdk=client, **more):
    return sdk.messages.create(model=model, max_tokens=9, messages=says(text), **more)


def stream(model="claude", text="hi", sdk=client, **more):
    return sdk.messages.stream(model=model, max_tokens=9, messages=says(text), **more)


def words(events):
    return (event.delta.text for event in events if event.type == "content_block_delta")


# --- answers


def test_a_message_is_answered_by_the_provider_under_its_own_key():
    answer = ask(text="hello", extra_headers={"anthropic-beta": "some-2025-01-01"})
    assert answer.content[0].text == "hello" and answer.stop_reason == "end_turn"
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == (7, 3)
    request = seen("claude")[-1]
    assert request["path"] == "/claude/v1/messages"
    assert request["headers"]["x-api-key"] == STACK["provider_key"] and "authorization" not in request["headers"]
    assert request["headers"]["anthropic-version"] and request["headers"]["anthropic-beta"] == "some-2025-01-01"
    assert PLAIN["api_key"] not in json.dumps(request)


def test_a_call_passes_with_its_query():
    assert ask(extra_query={"beta": "true"}).content[0].text == "hi"
    assert seen("claude")[-1]["path"] == "/claude/v1/messages?beta=true"


def test_an_alias_reaches_the_provider_under_its_own_name():
    text = "限速 — наверное 🦀 \u2028 \\u0041 \"quoted\" \0"
    answer = ask("claude-alias", text)
    assert (answer.model, answer.content[0].text) == ("claude-real-name", text)


def test_tokens_are_counted_by_the_provider():
    assert client.messages.count_tokens(model="claude", messages=says("one two three")).input_tokens == 3
    request = seen("claude")[-1]
    assert request["path"] == "/claude/v1/messages/count_tokens"
    assert request["headers"]["x-api-key"] == STACK["provider_key"]


def test_the_models_are_listed():
    assert {"claude", "claude-alias"} <= {model.id for model in client.models.list()}


def test_the_request_id_is_the_providers_or_else_ours():
    assert ask()._request_id == "given-by-the-provider"
    with pytest.raises(anthropic.NotFoundError) as refusal:
        ask("nobody-has-this")
    assert refusal.value.request_id.startswith("req_")


def test_an_answer_says_who_gave_it_and_how_long_it_was_queued():
    headers = client.messages.with_raw_response.create(model="claude", max_tokens=9, messages=says("hi")).headers
    assert headers["x-limitrate-provider"] == "claude" and int(headers["x-limitrate-queued-ms"]) >= 0


# --- streams


def test_a_stream_comes_word_by_word_as_the_provider_sends_it():
    came = words(ask(stream=True, extra_headers=scripted("gated anthropic-create")))
    # The provider does not send a word before the one in front of it has been read here.
    assert next(came) == "Queue,"
    open_gate("anthropic-create")
    assert next(came) == " don't"
    open_gate("anthropic-create")
    assert list(came) == [" reject."]


def test_the_streaming_helper_puts_the_message_together():
    with stream() as events:
        assert "".join(events.text_stream) == "Queue, don't reject."
        whole = events.get_final_message()
    assert whole.content[0].text == "Queue, don't reject." and whole.stop_reason == "end_turn"
    assert (whole.usage.input_tokens, whole.usage.output_tokens) == (7, 3)


def test_the_async_client_asks_and_streams_as_well():
    async def run():
        async with anthropic.AsyncAnthropic(base_url=STACK["open"], **PLAIN) as sdk:
            answer = await ask(sdk=sdk)
            async with stream(sdk=sdk) as events:
                return answer.content[0].text, "".join([text async for text in events.text_stream])

    assert asyncio.run(run()) == ("hi", "Queue, don't reject.")


@pytest.mark.parametrize("helper", [False, True])
def test_a_stream_that_breaks_at_the_provider_raises_after_what_came(helper):
    came = []
    with pytest.raises(anthropic.APIStatusError) as broken:
        if helper:
            with stream(extra_headers=scripted("broken")) as events:
                came.extend(events.text_stream)
        else:
            came.extend(words(ask(stream=True, extra_headers=scripted("broken"))))
    # The error event was read, not just the broken connection felt.
    assert broken.value.type == "api_error" and "broke" in broken.value.api_message
    assert came == ["Queue,", " don't"]


# --- refusals and failures


def test_an_unknown_model_is_not_found_and_the_nearest_names_are_told():
    for call in (lambda: ask("claud"), lambda: client.messages.count_tokens(model="claud", messages=says("hi"))):
        with pytest.raises(anthropic.NotFoundError) as refusal:
            call()
        assert refusal.value.type == "not_found_error" and "`claude`" in refusal.value.api_message


def test_a_body_over_the_limit_is_refused_with_413():
    with pytest.raises(anthropic.RequestTooLargeError) as refusal:
        ask(text="x" * 300_000)
    assert refusal.value.type == "request_too_large" and "max_body_bytes" in refusal.value.api_message


def test_a_wrong_token_is_refused_and_the_right_one_let_in_either_way():
    token = STACK["gateway_token"]
    with anthropic.Anthropic(base_url=STACK["locked"], **PLAIN) as wrong:
        for call in (lambda: ask("chat-model", sdk=wrong), lambda: stream("chat-model", sdk=wrong).__enter__()):
            with pytest.raises(anthropic.AuthenticationError) as refusal:
                call()
            assert refusal.value.type == "authentication_error" and "x-api-key" in refusal.value.api_message
    # This version sends its key as a Bearer token; older ones and other clients in a field of its own.
    for right in ({"api_key": token}, {"default_headers": {"X-Api-Key": token}}):
        with anthropic.Anthropic(base_url=STACK["locked"], **PLAIN | right) as sdk:
            assert ask("chat-model", sdk=sdk).content[0].text == "hi"
            assert [model.id for model in sdk.models.list()] == ["chat-model"]
        request = seen("locked")[-1]
        assert request["headers"]["x-api-key"] == STACK["provider_key"] and token not in json.dumps(request)


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, anthropic.BadRequestError),
        (401, anthropic.AuthenticationError),
        (403, anthropic.PermissionDeniedError),
        (404, anthropic.NotFoundError),
        (500, anthropic.InternalServerError),
        (529, anthropic.OverloadedError),
    ],
)
@pytest.mark.parametrize("streamed", [False, True])
def test_the_providers_own_errors_arrive_as_they_are(status, kind, streamed):
    with pytest.raises(kind) as failure:
        ask(stream=streamed, extra_headers=scripted(f"status {status}"))
    assert failure.value.status_code == status
    assert failure.value.body == {"type": "error", "error": {"message": f"scripted {status}", "type": "scripted_error"}}


def test_an_unreachable_provider_is_a_502_that_says_why_and_tells_no_key():
    with pytest.raises(anthropic.InternalServerError) as failure:
        ask("unreachable")
    assert failure.value.status_code == 502 and failure.value.type == "api_error"
    assert "refused" in failure.value.api_message.lower()
    assert STACK["provider_key"] not in failure.value.response.text


# --- waiting


def test_a_wait_past_the_limit_is_a_503_with_retry_after():
    ask("claude-busy")
    with pytest.raises(anthropic.ServiceUnavailableError) as refusal:
        ask("claude-busy")
    assert refusal.value.type == "overloaded_error" and "max_wait_seconds" in refusal.value.api_message
    assert refusal.value.response.headers["retry-after"] == "1"
    assert stats("claude-busy")["rejected_wait"] == 1 and len(seen("claude-busy")) == 1


@pytest.mark.parametrize("streamed", [False, True])
def test_a_429_is_waited_out_and_never_seen(streamed):
    before = len(seen("claude-limited"))
    answer = ask("claude-limited", stream=streamed, extra_headers=scripted(f"limited 1 anthropic-{streamed}"))
    if streamed:
        assert list(words(answer)) == ["Queue,", " don't", " reject."]
    else:
        assert answer.content[0].text == "hi"
    refused, answered = seen("claude-limited")[before:]
    assert gaps("claude-limited")[before] >= 1 - CLOCKS_APART_SECONDS
    # Sent again by the gateway, not by the SDK.
    assert refused["headers"] == answered["headers"] and refused["body"] == answered["body"]


# --- the demo


def test_the_demo_answers_counts_and_streams_what_it_would_have_said():
    whole = ask("demo-fast", "ping pong", demo)
    assert "ping pong" in whole.content[0].text and whole.usage.output_tokens > whole.usage.input_tokens == 2
    assert demo.messages.count_tokens(model="demo-fast", messages=says("ping pong")).input_tokens == 2
    with stream("demo-fast", "ping pong", demo) as events:
        assert "".join(events.text_stream) == whole.content[0].text
        assert events.get_final_message().usage == whole.usage
