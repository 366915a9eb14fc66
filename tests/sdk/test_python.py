"""What openai-python sees of limitrate. Started by stack.py, which runs the gateways and the scripted upstream."""

import asyncio
import json
import time
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from gateways import CLOCKS_APART_SECONDS, STACK, gaps, get, open_gate, says, scripted, seen, stats, until

# Retries hide failures; where they are the subject a test asks for them.
PLAIN = {"api_key": "the-caller's-key", "max_retries": 0, "timeout": 20}
client = openai.OpenAI(base_url=f"{STACK['open']}/v1", **PLAIN)
demo = openai.OpenAI(base_url=f"{STACK['demo']}/v1", **PLAIN)


def ask(model, text="hi", sdk=client, **more):
    return sdk.chat.completions.create(model=model, messages=says(text), **more)


# --- models


def test_models_of_all_providers_are_listed_once_and_typed():
    models = {model.id: model for model in client.models.list()}
    assert {"chat-model", "vendor/chat-model", "alias", "timed", "quick/chat-model", "twin/chat-model"} <= models.keys()
    assert "vendor/real-name" not in models
    for model in models.values():
        assert model.object == "model" and isinstance(model.created, int) and isinstance(model.owned_by, str)
    assert len(models) == len(client.models.list().data)


def test_a_model_with_a_slash_is_retrieved_escaped_and_raw():
    escaped = client.models.with_raw_response.retrieve("vendor/chat-model")
    assert escaped.http_request.url.raw_path == b"/v1/models/vendor%2Fchat-model"
    assert escaped.parse().id == "vendor/chat-model"
    assert client.get("/models/vendor/chat-model", cast_to=openai.types.Model).id == "vendor/chat-model"


def test_retrieving_an_unknown_model_is_not_found():
    with pytest.raises(openai.NotFoundError) as refusal:
        client.models.retrieve("vendor/chat-modle")
    assert refusal.value.code == "model_not_found" and "vendor/chat-model" in refusal.value.message


# --- answers


def test_chat_is_answered_by_the_provider_under_its_own_key():
    answer = ask("chat-model", "hello")
    assert answer.choices[0].message.content == "hello"
    request = seen("quick")[-1]
    assert request["path"] == "/quick/v1/chat/completions"
    assert request["headers"]["authorization"] == f"Bearer {STACK['provider_key']}"
    assert PLAIN["api_key"] not in json.dumps(request)


def test_a_provider_without_a_key_gets_no_authorization():
    assert ask("twin/chat-model").model == "chat-model"
    assert "authorization" not in seen("twin")[-1]["headers"]


def test_an_alias_reaches_the_provider_under_its_own_name():
    assert ask("alias").model == "vendor/real-name"


def test_a_model_with_a_slash_is_chatted_with():
    assert ask("vendor/chat-model").model == "vendor/chat-model"


def test_unicode_goes_there_and_back_unchanged():
    text = "限速 — наверное 🦀 \u2028 \\u0041 \"quoted\" \0"
    assert ask("chat-model", text).choices[0].message.content == text
    # The alias's name is spliced into a body that has bytes of several widths around it.
    assert ask("alias", text).choices[0].message.content == text


def test_completions_are_answered():
    assert client.completions.create(model="chat-model", prompt="once").choices[0].text == "once"


def test_embeddings_are_answered():
    answer = client.embeddings.create(model="chat-model", input="once", encoding_format="float")
    assert answer.data[0].embedding == [0.5, -0.25]


def test_any_other_path_below_v1_is_passed_on_with_its_query():
    body = {"model": "chat-model", "query": "q", "documents": ["a", "b"]}
    answer = client.post("/rerank", body=body, cast_to=object)
    assert [row["index"] for row in answer["results"]] == [0, 1]
    assert json.loads(seen("quick")[-1]["body"]) == body


def test_the_request_id_is_the_providers_or_else_ours():
    assert ask("chat-model")._request_id == "given-by-the-provider"
    assert client.models.list()._request_id
    with pytest.raises(openai.NotFoundError) as refusal:
        ask("nobody-has-this")
    assert refusal.value.request_id


def test_an_answer_says_who_gave_it_and_how_long_it_was_queued():
    headers = client.chat.completions.with_raw_response.create(model="chat-model", messages=says("hi")).headers
    assert headers["x-limitrate-provider"] == "quick" and int(headers["x-limitrate-queued-ms"]) >= 0


# --- streams


@pytest.mark.parametrize("kind", ["chat", "completions"])
def test_a_stream_comes_word_by_word_as_the_provider_sends_it(kind):
    gate = f"python-{kind}"
    if kind == "chat":
        stream = ask("chat-model", stream=True, extra_headers=scripted(f"gated {gate}"))
        words = (chunk.choices[0].delta.content for chunk in stream)
    else:
        stream = client.completions.create(
            model="chat-model", prompt="x", stream=True, extra_headers=scripted(f"gated {gate}")
        )
        words = (chunk.choices[0].text for chunk in stream)
    # The provider does not send a word before the one in front of it has been read here.
    assert next(words) == "Queue,"
    open_gate(gate)
    assert next(words) == " don't"
    open_gate(gate)
    assert list(words) == [" reject."]


def test_the_async_client_streams_as_well():
    async def collect():
        async with openai.AsyncOpenAI(base_url=client.base_url, **PLAIN) as sdk:
            stream = await ask("chat-model", sdk=sdk, stream=True)
            return "".join([chunk.choices[0].delta.content async for chunk in stream])

    assert asyncio.run(collect()) == "Queue, don't reject."


def test_streams_that_the_sdk_closes_at_done_succeed_on_one_connection():
    before = stats("parted")
    for _ in range(30):
        stream = ask("parted", stream=True, extra_headers=scripted("parted 0.001"))
        assert "".join(chunk.choices[0].delta.content for chunk in stream) == "Queue, don't reject."
    until("parted", succeeded=before["succeeded"] + 30, upstream_errors=before["upstream_errors"])
    errors = get(f"{STACK['open']}/admin/requests")["errors"]
    assert "caller_gone" not in {row["error"] for row in requests_of("parted")}, errors
    # The next request may come before the end of the one before it.
    assert len({request["connection"] for request in seen("parted")}) <= 2


def requests_of(model):
    return [row for row in get(f"{STACK['open']}/admin/requests")["requests"] if row["model"] == model]


def test_the_tokens_of_streams_that_the_sdk_closes_at_done_are_settled():
    started = time.monotonic()
    for _ in range(4):
        options = {"include_usage": True}
        stream = ask("metered", stream=True, stream_options=options, max_tokens=1500)
        assert [chunk.usage.total_tokens for chunk in stream if chunk.usage] == [10]
    assert time.monotonic() - started < 20


def test_a_stream_of_responses_that_breaks_at_the_provider_raises_in_words():
    with pytest.raises(openai.APIError) as failure:
        list(client.responses.create(model="chat-model", input="hi", stream=True, extra_headers=scripted("broken")))
    assert "broke before the answer was complete" in failure.value.message


def test_a_stream_that_breaks_at_the_provider_raises_after_what_came():
    words = []
    with pytest.raises(openai.APIError) as broken:
        for chunk in ask("chat-model", stream=True, extra_headers=scripted("broken")):
            words.append(chunk.choices[0].delta.content)
    assert words == ["Queue,", " don't"]
    # The error event was read, not just the broken connection felt.
    assert not isinstance(broken.value, openai.APIConnectionError)
    assert broken.value.code == "upstream_disconnected"


# --- refusals and failures


@pytest.mark.parametrize("body", [{}, {"model": 5}, {"model": None}, {"messages": [{"model": "chat-model"}]}])
def test_a_body_without_a_model_is_a_bad_request(body):
    with pytest.raises(openai.BadRequestError) as refusal:
        client.post("/chat/completions", body=body, cast_to=object)
    assert refusal.value.type == "invalid_request_error" and "model" in refusal.value.message


def test_an_unknown_model_is_not_found_and_the_nearest_names_are_told():
    with pytest.raises(openai.NotFoundError) as refusal:
        ask("chat-modle")
    assert refusal.value.code == "model_not_found" and "chat-model" in refusal.value.message


def test_a_wrong_method_is_refused_with_the_right_one():
    with pytest.raises(openai.APIStatusError) as refusal:
        client.get("/chat/completions", cast_to=object)
    assert refusal.value.status_code == 405 and refusal.value.response.headers["allow"] == "POST"


def test_a_body_over_the_limit_is_refused_with_413():
    with pytest.raises(openai.APIStatusError) as refusal:
        ask("chat-model", "x" * 300_000)
    assert refusal.value.status_code == 413 and refusal.value.body["message"]


def test_a_wrong_token_is_refused_and_the_right_one_let_in():
    locked = f"{STACK['locked']}/v1"
    with openai.OpenAI(base_url=locked, **PLAIN) as wrong:
        for call in (lambda: ask("chat-model", sdk=wrong), wrong.models.list):
            with pytest.raises(openai.AuthenticationError) as refusal:
                call()
            assert refusal.value.code == "invalid_api_key"
            assert refusal.value.response.headers["www-authenticate"].startswith("Bearer")
    with openai.OpenAI(base_url=locked, **PLAIN | {"api_key": STACK["gateway_token"]}) as right:
        assert [model.id for model in right.models.list()] == ["chat-model"]
        assert ask("chat-model", sdk=right).choices[0].message.content == "hi"
    request = seen("locked")[-1]
    assert request["headers"]["authorization"] == f"Bearer {STACK['provider_key']}"


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, openai.BadRequestError),
        (401, openai.AuthenticationError),
        (403, openai.PermissionDeniedError),
        (404, openai.NotFoundError),
        (409, openai.ConflictError),
        (422, openai.UnprocessableEntityError),
        (500, openai.InternalServerError),
        (529, openai.InternalServerError),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_the_providers_own_errors_arrive_as_they_are(status, kind, stream):
    with pytest.raises(kind) as failure:
        ask("chat-model", stream=stream, extra_headers=scripted(f"status {status}"))
    assert failure.value.status_code == status
    want = {"message": f"scripted {status}", "type": "scripted_error", "param": None, "code": "scripted"}
    assert failure.value.body == want


def test_an_unreachable_provider_is_a_502_that_says_why_and_tells_no_key():
    with pytest.raises(openai.InternalServerError) as failure:
        ask("unreachable")
    assert failure.value.status_code == 502 and failure.value.code == "upstream_unreachable"
    assert "unreachable" in failure.value.message and "refused" in failure.value.message.lower()
    assert STACK["provider_key"] not in failure.value.response.text


# --- waiting


def test_three_at_once_leave_an_interval_apart():
    with ThreadPoolExecutor() as callers:
        answers = list(callers.map(lambda text: ask("timed", text), ["a", "b", "c"]))
    assert [answer.choices[0].message.content for answer in answers] == ["a", "b", "c"]
    between = gaps("timed")
    assert len(between) == 2 and min(between) >= 0.4 - CLOCKS_APART_SECONDS
    assert sum(between) < 0.8 + 2


@pytest.mark.parametrize("stream", [False, True])
def test_a_caller_who_leaves_the_queue_costs_no_slot(stream):
    provider = "left-stream" if stream else "left"

    async def run():
        async with openai.AsyncOpenAI(base_url=client.base_url, **PLAIN) as sdk:
            await ask(provider, "first", sdk)
            leaving = asyncio.create_task(ask(provider, "leaves", sdk, stream=stream))
            await asyncio.to_thread(until, provider, queued_ahead=1)
            staying = asyncio.create_task(ask(provider, "stays", sdk))
            await asyncio.to_thread(until, provider, queued_ahead=2)
            leaving.cancel()
            await asyncio.to_thread(until, provider, queued_ahead=1, cancelled_in_queue=1, sent=1)
            await staying

    asyncio.run(run())
    said = [json.loads(request["body"])["messages"][0]["content"] for request in seen(provider)]
    assert said == ["first", "stays"]
    # Behind the one who left it would have been 3 s.
    (gap,) = gaps(provider)
    assert 1.5 - CLOCKS_APART_SECONDS <= gap < 2.9
    assert stats(provider)["sent"] == 2


@pytest.mark.parametrize("script", ["held", "gated"])
def test_a_caller_who_leaves_a_running_request_ends_it(script):
    async def run():
        async with openai.AsyncOpenAI(base_url=client.base_url, **PLAIN) as sdk:
            headers = scripted(f"{script} never-opened")
            running = asyncio.create_task(ask("chat-model", sdk=sdk, stream=script == "gated", extra_headers=headers))
            await asyncio.to_thread(until, "quick", in_flight=1)
            if script == "gated":
                stream = await running
                await anext(aiter(stream))
                await stream.close()
            running.cancel()
            await asyncio.to_thread(until, "quick", in_flight=0)

    asyncio.run(run())


def test_a_wait_past_the_limit_is_a_503_with_retry_after():
    ask("busy")
    with pytest.raises(openai.InternalServerError) as refusal:
        ask("busy")
    assert refusal.value.status_code == 503 and refusal.value.code == "queue_wait_exceeded"
    assert refusal.value.type == "rate_limit_error" and "busy" in refusal.value.message
    assert refusal.value.response.headers["retry-after"] == "1"
    assert "x-should-retry" not in refusal.value.response.headers
    assert stats("busy")["rejected_wait"] == 1 and len(seen("busy")) == 1


def test_a_retrying_client_outlives_that_503():
    retrying = client.with_options(max_retries=1)
    for text in ("first", "second"):
        assert ask("busy-retried", text, retrying).choices[0].message.content == text
    assert stats("busy-retried")["rejected_wait"] == 1
    (gap,) = gaps("busy-retried")
    assert 2 - CLOCKS_APART_SECONDS <= gap < 5


def test_a_retrying_client_is_told_not_to_hammer_where_the_wait_is_long():
    ask("hopeless")
    with pytest.raises(openai.InternalServerError) as refusal:
        ask("hopeless", sdk=client.with_options(max_retries=2))
    assert refusal.value.response.headers["x-should-retry"] == "false"
    assert 90 <= int(refusal.value.response.headers["retry-after"]) <= 100
    assert stats("hopeless")["rejected_wait"] == 1


# --- what the provider refuses


@pytest.mark.parametrize("stream", [False, True])
def test_a_429_is_waited_out_and_never_seen(stream):
    before = len(seen("limited"))
    answer = ask("limited", stream=stream, extra_headers=scripted(f"limited 1 python-{stream}"))
    if stream:
        assert "".join(chunk.choices[0].delta.content for chunk in answer) == "Queue, don't reject."
    else:
        assert answer.choices[0].message.content == "hi"
    refused, answered = seen("limited")[before:]
    assert answered["at"] - refused["at"] >= 1 - CLOCKS_APART_SECONDS
    # Sent again by the gateway, not by the SDK.
    assert refused["headers"] == answered["headers"] and refused["body"] == answered["body"]


@pytest.mark.parametrize(("status", "kind"), [(429, openai.RateLimitError), (503, openai.InternalServerError)])
@pytest.mark.parametrize("stream", [False, True])
def test_the_last_refusal_is_the_providers_own_with_its_retry_after(status, kind, stream):
    with pytest.raises(kind) as refusal:
        ask("final", stream=stream, extra_headers=scripted(f"refused {status} 7"))
    assert refusal.value.body["message"] == f"scripted {status}"
    headers = refusal.value.response.headers
    assert headers["retry-after"] == "7" and headers["x-should-retry"] == "true"


@pytest.mark.parametrize(
    ("script", "sent", "least_seconds"), [("refused 429 1", 3, 1), ("refused 429 100", 1, 0), ("quota", 1, 0)]
)
def test_a_retrying_client_does_as_the_last_refusal_says(script, sent, least_seconds):
    before = len(seen("final"))
    with pytest.raises(openai.RateLimitError) as refusal:
        ask("final", sdk=client.with_options(max_retries=2), extra_headers=scripted(script))
    assert refusal.value.response.headers["x-should-retry"] == ("true" if sent > 1 else "false")
    assert len(seen("final")) - before == sent
    between = gaps("final")[before:]
    assert all(gap >= least_seconds - CLOCKS_APART_SECONDS for gap in between)


# --- the demo


def test_the_demo_lists_its_models():
    names = {model.id for model in demo.models.list()}
    assert {"demo", "demo-fast", "demo-spaced/demo", "demo-burst/demo"} <= names


def test_the_demo_chats_and_counts():
    answer = ask("demo-fast", "ping", demo)
    assert "ping" in answer.choices[0].message.content
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens > 0


def test_the_demo_streams_what_it_would_have_said():
    whole = ask("demo-burst/demo", "ping", demo).choices[0].message.content
    chunks = list(ask("demo-burst/demo", "ping", demo, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == whole
    assert chunks[-1].choices == [] and chunks[-1].usage.total_tokens > 0
    assert chunks[-2].choices[0].finish_reason == "stop"


def test_the_demo_responds_and_streams_what_it_would_have_said():
    whole = demo.responses.create(model="demo-fast", input="ping pong")
    assert "ping pong" in whole.output_text and whole.usage.input_tokens == 2
    with demo.responses.stream(model="demo-fast", input=says("ping pong")) as events:
        words = [event.delta for event in events if event.type == "response.output_text.delta"]
        final = events.get_final_response()
    assert "".join(words) == final.output_text == whole.output_text
    assert len(words) == final.usage.output_tokens == whole.usage.output_tokens


def test_the_demo_completes_and_embeds():
    assert "ping" in demo.completions.create(model="demo-fast", prompt="ping").choices[0].text
    streamed = demo.completions.create(model="demo-fast", prompt="ping", stream=True)
    assert "ping" in "".join(chunk.choices[0].text for chunk in streamed)
    # The SDK asks for base64 unless told otherwise.
    usual, floats = (
        demo.embeddings.create(model="demo-fast", input="ping", **more).data[0].embedding
        for more in ({}, {"encoding_format": "float"})
    )
    assert len(usual) > 0 and usual == floats


def test_three_at_once_in_the_demo_queue_and_drain_as_its_stats_say():
    start = time.monotonic()
    with ThreadPoolExecutor() as callers:
        calls = [callers.submit(ask, "demo", str(number), demo) for number in range(3)]
        for tokens in (-2, -1, 0):
            until("demo-spaced", "demo", tokens=tokens, queued_ahead=-tokens)
        texts = [call.result().choices[0].message.content for call in calls]
    assert all(str(number) in text for number, text in enumerate(texts))
    # They left at 0, 1.5 and 3 s.
    assert 3 <= time.monotonic() - start < 8
