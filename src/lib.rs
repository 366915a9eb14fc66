//! limitrate, an OpenAI-compatible LLM gateway that queues instead of rejecting.
//!
//! This is the map. Imports run downwards only; `tests/layering.rs` holds the code to it.
//!
//! | floor | room | owns |
//! |---|---|---|
//! | 7 | [`cli`] | the command line: serve, check, demo; exit codes |
//! | 6 | [`server`] | the front: listener, connection loop, routes, relay to the caller, shutdown |
//! | 5 | [`admin`] | `/admin/health`, `/admin/stats`, `/admin/queue` |
//! | 5 | [`dispatch`] | which of several providers does a request |
//! | 5 | [`demo`] | the built-in provider of `limitrate demo` |
//! | 4 | [`provider`] | one provider: waiting, sending, repeating; its answers, its counters |
//! | 3 | [`registry`] | model name -> provider; the merged model list |
//! | 3 | [`telemetry`] | what was asked and how it was answered: the request log, the counters |
//! | 3 | [`state`] | the file that a restart finds the limits' memory in |
//! | 3 | [`upstream`] | the back: pool, connect (DNS, TCP, TLS), client (one exchange), what a refusal says |
//! | 2 | [`shaping`] | limiters, books and queue (pure), scheduler (the task that sleeps) |
//! | 2 | [`http1`] | heads and body framing; the only room that names `async_h1`, `http_types`, `httparse` |
//! | 2 | [`openai`] | model-list objects, peeking at a body, usage (Anthropic's too), SSE events |
//! | 1 | [`config`] | YAML -> validated [`config::Config`]; `${ENV}`; secrets |
//! | 1 | [`tls`] | TLS sessions in both directions, by OpenSSL; why one failed, in plain words |
//! | 0 | [`error`] | one `Error`; status and JSON, in either API's shape, are decided only there |
//! | 0 | [`log`] | one line an event, on standard error |
//! | 0 | [`deadline`] | work that may not take for ever; one timer for all who wait |
//! | 0 | [`socket`] | bytes in and out of the kernel, without asking it in vain |
//! | 0 | [`aside`] | computation of milliseconds, on a thread of its own |
//! | 0 | [`heap`] | futures on the heap, made in their place |
//! | 0 | [`edits`] | how far two words are apart |
//! | 0 | [`stale_errors`] | what OpenSSL's calls leave behind for the next one |
//!
//! A request's way: `server` reads a head and a body through `http1`, `openai` peeks at `model`, `registry`
//! names the providers, `dispatch` chooses one, `provider` waits for a permit of its scheduler and spends it on `upstream`, and `server`
//! relays the answer as it comes.
//!
//! Everything but DNS look-ups, TLS handshakes and the writing of the log runs on one thread, on `LocalExecutor`s: nobody waits for a lock, and on
//! a Raspberry Pi three cores stay free.

pub mod admin;
pub mod aside;
pub mod cli;
pub mod config;
pub mod deadline;
pub mod demo;
pub mod dispatch;
pub mod edits;
pub mod error;
pub mod heap;
pub mod http1;
pub mod log;
pub mod openai;
pub mod provider;
pub mod registry;
pub mod server;
pub mod shaping;
pub mod socket;
pub mod stale_errors;
pub mod state;
pub mod telemetry;
pub mod tls;
pub mod upstream;
