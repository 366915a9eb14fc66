//! The demo's answers in the shapes of Anthropic's API: messages and the counting of their tokens.

use serde_json::{Value, json};

use super::Reply;

/// A whole message.
pub(super) fn message(reply: &Reply) -> Value {
    let content = json!([{"type": "text", "text": reply.text}]);
    envelope(reply, content, json!("end_turn"), reply.reply_tokens)
}

/// The same as a stream (<https://docs.anthropic.com/en/docs/build-with-claude/streaming>): each event is named as its data
/// says, the input is counted at the start and the output at the end.
pub(super) fn events(reply: &Reply) -> Vec<String> {
    let delta = |word| json!({"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": word}});
    let mut events = vec![
        json!({"type": "message_start", "message": envelope(reply, json!([]), Value::Null, 1)}),
        json!({"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}),
    ];
    events.extend(reply.words().map(delta));
    events.extend([
        json!({"type": "content_block_stop", "index": 0}),
        json!({"type": "message_delta", "delta": {"stop_reason": "end_turn", "stop_sequence": null},
            "usage": {"output_tokens": reply.reply_tokens}}),
        json!({"type": "message_stop"}),
    ]);
    let named = |event: Value| {
        format!("event: {}\ndata: {event}\n\n", event["type"].as_str().unwrap_or_default())
    };
    events.into_iter().map(named).collect()
}

/// What a message would cost to read.
pub(super) fn count(reply: &Reply) -> Value {
    json!({"input_tokens": reply.prompt_tokens})
}

fn envelope(reply: &Reply, content: Value, stop_reason: Value, output_tokens: usize) -> Value {
    json!({"id": "msg_demo", "type": "message", "role": "assistant", "model": reply.model, "content": content,
        "stop_reason": stop_reason, "stop_sequence": null,
        "usage": {"input_tokens": reply.prompt_tokens, "output_tokens": output_tokens}})
}
