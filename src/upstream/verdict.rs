//! stub
use crate::http1::Headers;
use std::time::{Duration, SystemTime};
pub enum Scope {
    Provider,
    Model,
}
pub enum Verdict {
    PassOn,
    CoolDown { wait: Option<Duration>, scope: Scope },
    Repeat,
    Exhausted,
}
pub fn may_be_refusal(status: u16) -> bool {
    matches!(status, 429 | 503 | 529)
}
pub fn judge(status: u16, headers: &Headers, _body: &[u8], _now: SystemTime) -> Verdict {
    let wait =
        headers.get("retry-after").and_then(|v| std::str::from_utf8(v).ok()?.parse().ok()).map(Duration::from_secs_f64);
    match status {
        429 => Verdict::CoolDown { wait, scope: Scope::Provider },
        _ => Verdict::Repeat,
    }
}
