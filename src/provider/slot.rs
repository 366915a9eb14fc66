//! How a request that waits gets what a send needs: a permit, and a connection that stands before it.
//!
//! Each slot is of one configuration: what is sent on a connection is what was configured for its target.

use std::io;
use std::rc::Rc;
use std::time::{Duration, Instant};

use async_io::Timer;
use futures_lite::future;

use super::{Errand, Offer, Provider, Setup};
use crate::deadline::until;
use crate::heap::pinned;
use crate::log;
use crate::shaping::line::Refusal;
use crate::shaping::scheduler::{NoSlot, Permit, Place};
use crate::upstream::Failure;
use crate::upstream::pool::Connection;

/// Connections that the provider may close as soon as they stand, per attempt. One that it closes after a rest is replaced
/// for as long as the slot is not open.
const MAX_LOST_CONNECTIONS: usize = 5;

/// Before the next connection is made when the last one was lost while waiting.
const RECONNECT_PAUSE: Duration = Duration::from_millis(250);

/// A connection that is held for a slot is not replaced more often, however soon idle ones are closed.
const LEAST_REST: Duration = Duration::from_millis(500);

/// Less is no time to connect in.
const LEAST_CONNECT_TIMEOUT: Duration = Duration::from_millis(100);

/// What a send consumes.
pub(super) struct Slot {
    pub permit: Permit,
    pub connection: Box<Connection>,
    /// The configuration that the connection was made under, with the same target as the current one.
    pub setup: Rc<Setup>,
}

/// Why there is none.
pub(super) enum Lost {
    Slot(NoSlot),
    Connection(Failure),
}

impl From<NoSlot> for Lost {
    fn from(no_slot: NoSlot) -> Lost {
        Lost::Slot(no_slot)
    }
}

/// What ended the wait for a grant.
enum Waited {
    Granted(Result<Permit, NoSlot>),
    /// The connection is of no use any more, because of this where it broke.
    Spoiled(Option<io::Error>),
    /// The connection has rested for too long.
    Aged,
}

impl Provider {
    /// A permit for a slot that is open already, and an idle connection to use it on; else a place to wait in.
    pub(super) fn open_slot(
        &self,
        place: Place,
        permit: Option<Permit>,
        errand: &Errand<'_>,
        offer: &Offer,
    ) -> Result<Slot, Place> {
        let Some(permit) = permit else { return Err(place) };
        let setup = self.setup();
        match setup.pool.take().filter(|_| setup.uses(permit.lane())) {
            Some(connection) => Ok(Slot { permit, connection, setup }),
            None => {
                // It is gone meanwhile, and the slot waits for nobody. The permit first, so that our own grant does not count as
                // ahead of us.
                drop(permit);
                Err(self.join_again(errand, offer))
            }
        }
    }

    /// A permit and a connection to use it on, for a slot that is near. `fresh`: the connection is a new one.
    pub(super) async fn wait_for_slot(
        &self,
        mut place: Place,
        errand: &Errand<'_>,
        offer: &Offer,
        fresh: bool,
    ) -> Result<Slot, Lost> {
        let mut lost = 0;
        let mut broke = None;
        while lost < MAX_LOST_CONNECTIONS {
            let setup = self.setup();
            let idle = if fresh { None } else { setup.pool.take() };
            let connection = match idle {
                Some(connection) => Ok(connection),
                // On the heap: most requests find one that is idle, and need not have the room for this.
                None => pinned(|| self.connect(&place, &setup, errand, offer)).await,
            };
            let mut connection = match connection {
                Ok(connection) => connection,
                Err(lost) => {
                    place.leave();
                    return Err(lost);
                }
            };
            let rest = setup.config.pool_idle.max(LEAST_REST);
            match wait_for_grant(&place, &mut connection, rest).await {
                Waited::Granted(permit) => {
                    let permit = permit?;
                    // The key of a permit goes to the host that it is configured for, and to no other.
                    if let Some(setup) = self.still_valid(&setup, permit.lane()) {
                        let connection =
                            if fresh { connection } else { setup.pool.warmest(connection) };
                        return Ok(Slot { permit, connection, setup });
                    }
                    drop(permit);
                    place = self.join_again(errand, offer);
                }
                ended => {
                    // A slot on a connection that is known to be closed would be lost.
                    let place_kept = place.lost_connection()?;
                    place = place_kept.unwrap_or_else(|| self.join_again(errand, offer));
                    if let Waited::Spoiled(error) = ended
                        && !connection.has_rested()
                    {
                        lost += 1;
                        broke = error;
                        Timer::after(RECONNECT_PAUSE).await;
                    }
                }
            }
        }
        place.leave();
        let cause = broke.map_or(String::new(), |error| format!(": {error}"));
        let detail = format!("it closes every connection before a request is sent on it{cause}");
        Err(Lost::Connection(Failure::Disconnected(detail)))
    }

    /// The configuration to send under on a connection that was made under `setup`. None where the target or the API keys
    /// have changed since, so that permit and connection do not belong together.
    fn still_valid(&self, setup: &Rc<Setup>, lane: usize) -> Option<Rc<Setup>> {
        let current = self.setup();
        let same = Rc::ptr_eq(setup, &current) || current.has_target_of(&setup.config);
        (same && current.uses(lane)).then_some(current)
    }

    /// A new connection, if it stands before the place is taken away.
    async fn connect(
        &self,
        place: &Place,
        setup: &Setup,
        errand: &Errand<'_>,
        offer: &Offer,
    ) -> Result<Box<Connection>, Lost> {
        let begun = Instant::now();
        let connect = async {
            let limit = connect_limit(setup, errand, offer, begun);
            match setup.connector.connect(limit).await {
                Ok(stream) => {
                    self.availability.reached();
                    Ok(Connection::fresh(stream))
                }
                Err(failure) => {
                    self.is_unreachable(begun);
                    Err(Lost::Connection(failure))
                }
            }
        };
        let taken_away = async {
            let no_slot = place.taken_away().await;
            if is_out_of_time(&no_slot) && self.is_unreachable(begun) {
                let (name, waited) = (self.name(), begun.elapsed().as_secs_f64());
                log::warn(format_args!("{name}: no connection within {waited:.1} s, so far"));
            }
            Err(Lost::Slot(no_slot))
        };
        future::or(connect, taken_away).await
    }

    /// A connection that was `begun` then has not come to stand. False if the provider counts as down already.
    fn is_unreachable(&self, begun: Instant) -> bool {
        let is_new = self.availability.failed(begun, Instant::now());
        if is_new {
            self.scheduler.move_on();
        }
        is_new
    }
}

fn is_out_of_time(no_slot: &NoSlot) -> bool {
    let NoSlot::Refused(refusal) = no_slot else { return false };
    matches!(refusal, Refusal::WaitExceeded { .. } | Refusal::Deadline { .. })
}

/// How long a connection may take: `connect_timeout_seconds`, and where another provider could take the request, half of
/// the time that is left to it.
fn connect_limit(setup: &Setup, errand: &Errand<'_>, offer: &Offer, now: Instant) -> Duration {
    let configured = setup.config.connect_timeout;
    match errand.gives_up(setup.config.rate_limit.max_wait) {
        Some(end) if offer.has_alternative() => {
            let half = end.saturating_duration_since(now) / 2;
            configured.min(half.max(LEAST_CONNECT_TIMEOUT))
        }
        _ => configured,
    }
}

/// Waits for the grant on a connection that may be `rest` old at most.
async fn wait_for_grant(place: &Place, connection: &mut Connection, rest: Duration) -> Waited {
    let aged_at = connection.rests_since() + rest;
    let granted = async { Waited::Granted(place.granted().await) };
    let aged = async {
        until(aged_at).await;
        Waited::Aged
    };
    let spoiled = async { Waited::Spoiled(connection.spoiled().await.err()) };
    future::or(spoiled, future::or(granted, aged)).await
}
