//! The demo's answers in the shapes of OpenAI's API: chat, completions, embeddings.

use serde_json::{Value, json};

use super::Reply;

/// A chat completion or a legacy one.
pub(super) fn completion(chat: bool, reply: &Reply) -> Value {
    let (object, choice) = match chat {
        true => {
            let message = json!({"role": "assistant", "content": reply.text});
            ("chat.completion", json!({"index": 0, "message": message, "finish_reason": "stop"}))
        }
        false => {
            let choice =
                json!({"index": 0, "text": reply.text, "logprobs": null, "finish_reason": "stop"});
            ("text_completion", choice)
        }
    };
    let (model, usage) = (&reply.model, usage(reply));
    json!({"id": "demo-1", "object": object, "created": 0, "model": model, "choices": [choice], "usage": usage})
}

/// The same as a stream: one event for each word, the end, and the usage where the request asks for it.
pub(super) fn events(chat: bool, reply: &Reply, request: &Value) -> Vec<String> {
    let object = if chat { "chat.completion.chunk" } else { "text_completion" };
    let event = |choices: Value, usage: Value| {
        let chunk = json!({"id": "demo-1", "object": object, "created": 0, "model": reply.model, "choices": choices,
            "usage": usage});
        format!("data: {chunk}\n\n")
    };
    let choice = |text: Option<&str>, finish: Value| match chat {
        true => {
            let delta =
                text.map_or(json!({}), |text| json!({"role": "assistant", "content": text}));
            json!([{"index": 0, "delta": delta, "finish_reason": finish}])
        }
        false => {
            json!([{"index": 0, "text": text.unwrap_or_default(), "logprobs": null, "finish_reason": finish}])
        }
    };
    let mut events: Vec<_> =
        reply.words().map(|word| event(choice(Some(word), Value::Null), Value::Null)).collect();
    events.push(event(choice(None, json!("stop")), Value::Null));
    if request["stream_options"]["include_usage"] == true {
        events.push(event(json!([]), usage(reply)));
    }
    events.push("data: [DONE]\n\n".to_owned());
    events
}

/// One vector, as numbers or, where the SDK asks for it (Node's does), as little-endian 32-bit floats in base64.
pub(super) fn embeddings(request: &Value, reply: &Reply) -> Value {
    let embedding = match request["encoding_format"] == "base64" {
        true => json!("AACAPgAAAD8AAEA/"),
        false => json!([0.25, 0.5, 0.75]),
    };
    let row = json!({"object": "embedding", "index": 0, "embedding": embedding});
    let usage = json!({"prompt_tokens": 1, "total_tokens": 1});
    json!({"object": "list", "data": [row], "model": reply.model, "usage": usage})
}

fn usage(reply: &Reply) -> Value {
    let (prompt, completion) = (reply.prompt_tokens, reply.reply_tokens);
    json!({"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion})
}
