//! `limitrate health`: whether a gateway serves, for a container's HEALTHCHECK and whoever else has neither shell nor
//! curl.
//!
//! Owns what counts as a good answer.

use serde::Deserialize;

use super::ask::{Problem, Target};
use crate::log;

/// The page has less than a hundred bytes; whatever answers with more is something else.
const PAGE_LIMIT_BYTES: usize = 4096;

/// Asks a gateway: how it is, or why that can't be said, in words either way.
pub fn ask(place: &Target) -> Result<String, String> {
    let (url, page) =
        (place.url(), smol::block_on(place.page::<Page>("/admin/health", PAGE_LIMIT_BYTES)));
    let problem = match page {
        Ok(Page { status, version, uptime_seconds }) if status == "ok" => {
            let version: String = version.chars().filter(|char| !log::is_harmful(*char)).collect();
            return Ok(format!("{url} is well: limitrate {version}, up for {uptime_seconds} s"));
        }
        Ok(_) => "what answers is not limitrate".into(),
        Err(Problem::Locked) => "it answers with status 401".into(),
        Err(Problem::Other(words)) => words,
    };
    Err(format!("{url} is not well: {problem}"))
}

/// What `/admin/health` says.
#[derive(Deserialize)]
struct Page {
    status: String,
    version: String,
    uptime_seconds: u64,
}
