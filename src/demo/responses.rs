//! The demo's answers in the shapes of OpenAI's Responses API, which Codex and other agents speak.

use serde_json::{Value, json};

use super::Reply;

/// A whole response.
pub(super) fn response(reply: &Reply) -> Value {
    let usage = json!({"input_tokens": reply.prompt_tokens, "input_tokens_details": {"cached_tokens": 0},
        "output_tokens": reply.reply_tokens, "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": reply.prompt_tokens + reply.reply_tokens});
    envelope(reply, "completed", json!([item("completed", json!([part(&reply.text)]))]), usage)
}

/// The same as a stream: each event is named as its data says and has a number; there is no `[DONE]`.
pub(super) fn events(reply: &Reply) -> Vec<String> {
    let text = |kind: &str, field: &str, value: Value| json!({"type": kind, "item_id": ITEM, "output_index": 0, "content_index": 0, "logprobs": [], field: value});
    let opened = |kind: &str| json!({"type": kind, "response": envelope(reply, "in_progress", json!([]), Value::Null)});
    let mut events = vec![
        opened("response.created"),
        opened("response.in_progress"),
        json!({"type": "response.output_item.added", "output_index": 0, "item": item("in_progress", json!([]))}),
        text("response.content_part.added", "part", part("")),
    ];
    events
        .extend(reply.words().map(|word| text("response.output_text.delta", "delta", json!(word))));
    let whole = response(reply);
    events.extend([
        text("response.output_text.done", "text", json!(reply.text)),
        text("response.content_part.done", "part", part(&reply.text)),
        json!({"type": "response.output_item.done", "output_index": 0, "item": whole["output"][0]}),
        json!({"type": "response.completed", "response": whole}),
    ]);
    let named = |(number, mut event): (usize, Value)| {
        event["sequence_number"] = json!(number);
        format!("event: {}\ndata: {event}\n\n", event["type"].as_str().unwrap_or_default())
    };
    events.into_iter().enumerate().map(named).collect()
}

const ITEM: &str = "msg_demo";

fn item(status: &str, content: Value) -> Value {
    json!({"id": ITEM, "type": "message", "role": "assistant", "status": status, "content": content})
}

fn part(text: &str) -> Value {
    json!({"type": "output_text", "text": text, "annotations": [], "logprobs": []})
}

fn envelope(reply: &Reply, status: &str, output: Value, usage: Value) -> Value {
    json!({"id": "resp_demo", "object": "response", "created_at": 0, "status": status, "model": reply.model,
        "output": output, "parallel_tool_calls": true, "tool_choice": "auto", "tools": [], "error": null,
        "incomplete_details": null, "usage": usage})
}
