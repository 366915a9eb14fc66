//! The shapes of the OpenAI API that the gateway reads or writes itself: `model` in a request body, the model list,
//! token counts in an answer, events of a stream. Where the gateway reads, Anthropic's API differs only in how it counts.
//!
//! Everything else in a body is the provider's and passes unread. Error objects belong to [`crate::error`]; which
//! models there are belongs to [`crate::registry`].

mod endpoints;
mod events;
mod models;
mod outline;
mod request;
mod usage;

pub use endpoints::answers_in_json;
pub use events::{EventScanner, error_event, event, is_json};
pub use models::{Model, model_list, model_object};
pub use request::{Peek, RequestBody, peek};
pub use usage::Usage;
