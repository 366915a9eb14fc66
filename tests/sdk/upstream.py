"""A provider that does what each request tells it to, and remembers what it saw.

A request's `x-script` header says how it is answered; without one it gets what a provider would say that speaks OpenAI's
API and, below `/v1/messages`, Anthropic's.

    status N        an error object under that status
    refused N M     the same with Retry-After: M
    limited N NAME  the first request of that name gets 429 with Retry-After: N, later ones an answer
    quota           a 429 that no waiting mends
    html N          a page that is no JSON under that status
    held GATE       the answer is kept back until the gate opens
    gated GATE      a stream that waits at the gate before every word but the first
    broken          a stream that closes in mid chunk after two words
    torn            a stream that closes in the middle of the third word's event
    cut             an answer that promises more than comes
    parted S        a stream whose final chunk comes S seconds behind its last event
    late S SCRIPT   what SCRIPT says (none: an answer), S seconds later

The tests talk to it directly as well: `POST /-/open/GATE` lets one pass a gate, `GET /-/seen/NAME` lists the requests
below `/NAME/` in the order of their arrival.
"""

import json
import socket
import struct
import threading
import time
from collections import defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

# socket(7). Python's module has no name for it.
SO_TIMESTAMPNS = 35

GATE_PATIENCE_SECONDS = 20
WORDS = ["Queue,", " don't", " reject."]

gates = defaultdict(lambda: threading.Semaphore(0))
seen = []
limited = set()
lock = threading.Lock()


def start():
    """Serves on a free port of 127.0.0.1 in a thread of its own; returns the address as a URL."""
    server = Server(("127.0.0.1", 0), Exchange)
    # Connections inherit it from here. Set on each of them, it would come after their first bytes.
    server.socket.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}"


class Server(ThreadingHTTPServer):
    # Past the usual 5 that are not accepted yet, a connection takes a second to be made.
    request_queue_size = 128


class Exchange(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def handle_one_request(self):
        try:
            self.at = arrival(self.connection)
            super().handle_one_request()
        except OSError:
            self.close_connection = True

    def do_GET(self):
        name = self.path.rpartition("/-/seen/")[2]
        with lock:
            self.json(200, [request for request in seen if request["path"].startswith(f"/{name}/")])

    def do_POST(self):
        text = self.rfile.read(int(self.headers.get("content-length", 0)))
        if self.path.startswith("/-/open/"):
            gates[self.path.rpartition("/")[2]].release()
            return self.json(200, {})
        headers = {name.lower(): value for name, value in self.headers.items()}
        with lock:
            request = {"at": self.at, "path": self.path, "headers": headers, "body": text.decode()}
            seen.append(request | {"connection": self.client_address[1]})
        self.follow(headers.get("x-script", "answer").split(), json.loads(text))

    def follow(self, script, body):
        match script:
            case ["late", seconds, *rest]:
                time.sleep(float(seconds))
                self.follow(rest or ["answer"], body)
            case ["status", status]:
                self.refuse(int(status), f"scripted {status}")
            case ["refused", status, seconds]:
                self.refuse(int(status), f"scripted {status}", {"Retry-After": seconds})
            case ["html", status]:
                self.whole(int(status), b"<html>\r\n<h1>scripted page</h1>\n</html>", {"Content-Type": "text/html"})
            case ["quota"]:
                self.refuse(429, "no credit", code="insufficient_quota")
            case ["limited", seconds, name] if self.first(name):
                self.refuse(429, "slow down", {"Retry-After": seconds})
            case ["held", gate]:
                pass_gate(gate)
                self.answer(body)
            case ["gated", gate]:
                self.stream(body, lambda: pass_gate(gate))
            case ["broken"]:
                # A chunk of 255 bytes is promised; two of them come.
                self.stream(body, breaks_off=lambda _: b"ff\r\nda")
            case ["torn"]:
                self.stream(body, breaks_off=lambda event: chunk(event[: len(event) // 2]))
            case ["parted", seconds]:
                self.stream(body, parted=float(seconds))
            case ["cut"]:
                self.answer(body, {"Content-Length": 9999})
                self.close_connection = True
            case _ if body.get("stream"):
                self.stream(body)
            case _:
                self.answer(body)

    def first(self, name):
        with lock:
            return name not in limited and not limited.add(name)

    def kind(self):
        return self.path.partition("/v1/")[2].partition("?")[0]

    def answer(self, body, headers={}):
        kind = self.kind()
        request_id = "request-id" if kind.startswith("messages") else "x-request-id"
        self.json(200, ANSWERS[kind](body), {request_id: "given-by-the-provider", **headers})

    def refuse(self, status, message, headers={}, code="scripted"):
        error = {"message": message, "type": "scripted_error"}
        if self.kind().startswith("messages"):
            return self.json(status, {"type": "error", "error": error}, headers)
        self.json(status, {"error": error | {"param": None, "code": code}}, headers)

    def json(self, status, value, headers={}):
        payload = json.dumps(value, ensure_ascii=False).encode()
        self.whole(status, payload, {"Content-Type": "application/json", **headers})

    def whole(self, status, payload, headers):
        self.send_response(status, "Scripted")
        for name, text in {"Content-Length": len(payload), **headers}.items():
            self.send_header(name, str(text))
        self.end_headers()
        self.wfile.write(payload)

    def stream(self, body, between=lambda: None, breaks_off=None, parted=0):
        self.send_response(200, "Scripted")
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        before, piece, after = STREAMS[self.kind()](body)
        self.wfile.write(chunk(before))
        for number, word in enumerate(WORDS):
            if number:
                between()
            if breaks_off and number == 2:
                self.wfile.write(breaks_off(piece(word)))
                self.close_connection = True
                return
            self.wfile.write(chunk(piece(word)))
        self.wfile.write(chunk(after))
        time.sleep(parted)
        self.wfile.write(b"0\r\n\r\n")

    def log_message(self, *_):
        pass


def chunk(text):
    data = text.encode()
    return b"%x\r\n%s\r\n" % (len(data), data) if data else b""


def arrival(connection):
    """When the kernel took in the next request's first bytes, in Unix seconds: later delays of this process don't count."""
    first, ancillary, _, _ = connection.recvmsg(1, 64, socket.MSG_PEEK)
    if not first:
        return None
    (_, _, stamp), = ancillary
    seconds, nanoseconds = struct.unpack("@ll", stamp)
    return seconds + nanoseconds / 1e9


def pass_gate(name):
    if not gates[name].acquire(timeout=GATE_PATIENCE_SECONDS):
        raise TimeoutError(f"nobody opened the gate {name}")


def chat(body):
    """Says the last message back."""
    message = {"role": "assistant", "content": body["messages"][-1]["content"]}
    choices = [{"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}]
    return {"id": "chat-1", "object": "chat.completion", "created": 1, "model": body["model"], "choices": choices}


def chat_chunk(body, word):
    choices = [{"index": 0, "delta": {"role": "assistant", "content": word}, "finish_reason": None}]
    return {"id": "chat-1", "object": "chat.completion.chunk", "created": 1, "model": body["model"], "choices": choices}


def text_completion(body, word=None):
    choices = [{"index": 0, "text": word or body["prompt"], "finish_reason": "stop", "logprobs": None}]
    return {"id": "text-1", "object": "text_completion", "created": 1, "model": body["model"], "choices": choices}


def embeddings(body):
    row = {"object": "embedding", "index": 0, "embedding": [0.5, -0.25]}
    usage = {"prompt_tokens": 1, "total_tokens": 1}
    return {"object": "list", "data": [row], "model": body["model"], "usage": usage}


def rerank(body):
    return {"results": [{"index": index, "relevance_score": 1.0} for index, _ in enumerate(body["documents"])]}


def message(body, content=None, stop="end_turn", output_tokens=3):
    """Says the last message back, unless there is another content."""
    text = [{"type": "text", "text": body["messages"][-1]["content"]}]
    usage = {"input_tokens": 7, "output_tokens": output_tokens}
    shape = {"id": "msg_1", "type": "message", "role": "assistant", "model": body["model"], "stop_sequence": None}
    return shape | {"content": text if content is None else content, "stop_reason": stop, "usage": usage}


def count_tokens(body):
    return {"input_tokens": len(body["messages"][-1]["content"].split())}


ANSWERS = {
    "chat/completions": chat,
    "completions": text_completion,
    "embeddings": embeddings,
    "rerank": rerank,
    "messages": message,
    "messages/count_tokens": count_tokens,
}


def openai_stream(chunk_of):
    data = lambda value: f"data: {json.dumps(value)}\n\n"
    usage = {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}}
    counted = lambda body: data(chunk_of(body, "") | usage) if body.get("stream_options", {}).get("include_usage") else ""
    return lambda body: ("", lambda word: data(chunk_of(body, word)), counted(body) + "data: [DONE]\n\n")


def event(kind, **fields):
    return f"event: {kind}\ndata: {json.dumps({'type': kind} | fields)}\n\n"


def response_stream(body):
    """Of the Responses API: named events, and no `[DONE]`."""
    where = {"item_id": "msg_1", "output_index": 0, "content_index": 0}
    whole = lambda status: {"id": "resp_1", "object": "response", "created_at": 1, "status": status, "model": body["model"], "output": []}
    delta = lambda word: event("response.output_text.delta", sequence_number=1, delta=word, logprobs=[], **where)
    start = event("response.created", sequence_number=0, response=whole("in_progress"))
    return start, delta, event("response.completed", sequence_number=2, response=whole("completed"))


def message_stream(body):
    delta = lambda word: event("content_block_delta", index=0, delta={"type": "text_delta", "text": word})
    start = event("message_start", message=message(body, [], None, 1))
    start += event("content_block_start", index=0, content_block={"type": "text", "text": ""}) + event("ping")
    end = event("content_block_stop", index=0)
    end += event("message_delta", delta={"stop_reason": "end_turn", "stop_sequence": None}, usage={"output_tokens": 3})
    return start, delta, end + event("message_stop")


# What a stream begins with, what it says for a word, and what it ends with.
STREAMS = {
    "chat/completions": openai_stream(chat_chunk),
    "completions": openai_stream(text_completion),
    "messages": message_stream,
    "responses": response_stream,
}
