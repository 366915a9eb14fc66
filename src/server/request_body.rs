//! Reading a request body: within its limits and deadlines, and without holding up others.
//!
//! A body may be 32 MiB and more. It comes in pieces with others' turns between them, which its socket sees
//! to, and a large one is parsed on another thread.

use std::rc::Rc;

use super::Gateway;
use super::budget::{Full, Reserved};
use super::caller::{Caller, Gone};
use super::stream::Stream;
use super::terms::{self, Examined};
use crate::aside::{BODIES, Buffer};
use crate::deadline::within;
use crate::error::Error;
use crate::heap::pinned;
use crate::http1::{BodyDecoder, Framing, Reader, RequestHead};

/// A shorter body is parsed at once: that takes 1.5 ms at worst.
pub const LARGE_BODY_BYTES: usize = 128 * 1024;

/// A request body and what belongs to it.
pub struct Body {
    /// The body.
    pub bytes: Buffer,
    /// What was read of it, where it is large.
    pub examined: Option<Box<Result<Examined, Error>>>,
    /// Its memory; to be dropped with it.
    pub reserved: Reserved,
}

impl Body {
    /// Of a request without one.
    pub fn none(reserved: Reserved) -> Body {
        Body { bytes: Buffer::default(), examined: None, reserved }
    }
}

/// Why a body was not read to its end.
pub enum Stopped {
    /// The client has to be told.
    Refuse(Error),
    /// The client has left.
    Gone,
}

impl From<Gone> for Stopped {
    fn from(_: Gone) -> Stopped {
        Stopped::Gone
    }
}

/// Reads the body behind `head`, which `client` sends.
pub async fn read(
    gateway: &Gateway,
    head: &RequestHead,
    client: &Rc<str>,
    reader: &mut Reader<Stream>,
    caller: &mut Caller,
) -> Result<Body, Stopped> {
    let limit_bytes = gateway.config.max_body_bytes;
    let too_large = || Stopped::Refuse(Error::BodyTooLarge { limit_bytes });
    if let Framing::Length(length) = head.framing
        && length > limit_bytes
    {
        return Err(too_large());
    }
    let mut decoder = BodyDecoder::new(head.framing);
    if head.expects_continue && !decoder.is_done() && reader.buffered().is_empty() {
        caller.go_on().await?;
    }
    let mut body = Body::none(gateway.budget.reserve(client));
    let limit = usize::try_from(limit_bytes).unwrap_or(usize::MAX);
    loop {
        let wanted = decoder.wanted_room(reader, &body.bytes.0, limit);
        if wanted > 0 {
            body.bytes.reserve(wanted).await;
        }
        let bytes = &mut body.bytes.0;
        let drained = decoder.drain(reader, bytes);
        let over = drained.map_err(|fault| malformed(fault.to_string()))?;
        if bytes.len() as u64 > limit_bytes {
            return Err(too_large());
        }
        // The byte to spare and the room for chunk sizes are not counted: one body always fits.
        let held = limit_bytes.min(bytes.capacity() as u64);
        body.reserved.grow_to(held).map_err(|full| no_room(gateway, full))?;
        if over {
            break;
        }
        more(gateway, &mut decoder, reader, bytes).await?;
    }
    if body.bytes.0.len() < LARGE_BODY_BYTES {
        return Ok(body);
    }
    // On the heap: in the future it would weigh on every connection.
    Ok(pinned(|| examined(gateway, head, body)).await)
}

async fn more(
    gateway: &Gateway,
    decoder: &mut BodyDecoder,
    reader: &mut Reader<Stream>,
    bytes: &mut Vec<u8>,
) -> Result<(), Stopped> {
    let waited = gateway.config.body_timeout;
    match within(waited, decoder.read(reader, bytes)).await {
        Some(Ok(0)) => {
            let came = decoder.payload_so_far();
            Err(malformed(format!(
                "the connection ended inside the request body, after {came} bytes"
            )))
        }
        Some(Ok(_)) => Ok(()),
        Some(Err(_)) => Err(Stopped::Gone),
        None => Err(Stopped::Refuse(Error::RequestTimeout { part: "body", waited })),
    }
}

/// Reads a large body on another thread. Nobody gives this up midway, whatever the client does: its memory
/// stays accounted for as long as that thread has it.
async fn examined(gateway: &Gateway, head: &RequestHead, body: Body) -> Body {
    let Body { bytes, reserved, .. } = body;
    let target = head.target.clone();
    let fingerprints = terms::fingerprints(gateway, head).cloned();
    let work = async move {
        let examined = terms::examine(&bytes.0, &target, fingerprints.as_ref());
        (bytes, Box::new(examined))
    };
    let (bytes, examined) = BODIES.run(work).await;
    Body { bytes, examined: Some(examined), reserved }
}

fn no_room(gateway: &Gateway, full: Full) -> Stopped {
    Stopped::Refuse(match full {
        Full::All => Error::BuffersFull { limit_bytes: gateway.config.max_buffered_bytes },
        Full::Share => {
            let limit_bytes = gateway.config.max_buffered_bytes_per_client;
            Error::ClientBuffersFull { limit_bytes }
        }
    })
}

fn malformed(detail: String) -> Stopped {
    Stopped::Refuse(Error::MalformedRequest { detail })
}
