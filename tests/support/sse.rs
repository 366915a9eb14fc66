//! Streams as OpenAI's API makes them.

/// One `chat.completion.chunk` event with `text` as its delta.
pub fn event(text: &str) -> Vec<u8> {
    let chunk = serde_json::json!({
        "id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "m",
        "choices": [{"index": 0, "delta": {"content": text}, "finish_reason": null}],
    });
    format!("data: {chunk}\n\n").into_bytes()
}

/// The event that ends a stream.
pub fn done() -> Vec<u8> {
    b"data: [DONE]\n\n".to_vec()
}

/// One event for each word, then `[DONE]`.
pub fn words(words: &[&str]) -> Vec<Vec<u8>> {
    words.iter().map(|word| event(word)).chain([done()]).collect()
}
