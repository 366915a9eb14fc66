//! The front: what a caller connects to.
//!
//! [`Server`] serves what comes to its [`listener`]s and goes down in order; [`accept`] keeps to `max_connections` and each
//! client to its share of them, by the [`connection_table`]; [`connection`] is one caller's connection,
//! [`routes`] decides what a request is for, [`terms`] what it asks for beside its answer,
//! [`proxy`] sends it on and relays the answer, [`heartbeat`] keeps its caller patient meanwhile, [`seam`] knows where a
//! stream may break, [`caller`] writes, [`client_address`] says who asks,
//! [`cors`] which web pages may read an answer, [`web_guard`] which may ask at all, [`target`] which
//! path is meant. [`keeper`] remembers for the next start, [`reload`] changes everything while it
//! runs. [`listener`], [`stream`] and [`tls`] are the ways in; [`turns`] says which task runs next.
//! Knows nothing of how a provider is reached or shaped.

mod accept;
mod budget;
mod caller;
mod client_address;
mod connection;
mod connection_table;
mod cors;
mod heartbeat;
mod keeper;
mod lifecycle;
mod listener;
mod proxy;
mod reload;
mod request_body;
mod routes;
mod seam;
mod stream;
mod target;
mod terms;
mod tls;
mod token;
mod turns;
mod web_guard;

use std::convert::Infallible;
use std::hash::RandomState;
use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::panic::AssertUnwindSafe;
use std::rc::Rc;
use std::time::{Duration, Instant, SystemTime};

use async_channel::{Receiver, Sender};
use async_io::Timer;
use futures_lite::{FutureExt, future};

use crate::config::{self, Config, Fairness};
use crate::deadline::{with_one_timer, within};
use crate::log;
use crate::provider::Provider;
use crate::registry::Registry;
use crate::shaping::lane::Past;
use crate::socket::with_watched_sockets;
use crate::telemetry::Telemetry;
use accept::Doors;
use budget::Budget;
use keeper::Keeper;
use lifecycle::{Lifecycle, Phase};
use listener::Listeners;
pub use listener::Place;
use reload::Front;
use turns::Turns;

/// How long aborted requests get to write their last bytes.
const ABORT_GRACE: Duration = Duration::from_secs(2);

/// How a server is asked to stop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// Accept nobody, refuse (or send) what is queued, let running requests finish.
    Drain,
    /// End at once.
    Now,
}

/// Bound listeners and what they will serve.
#[derive(Debug)]
pub struct Server {
    listeners: Listeners,
    config: Config,
    reloads: (Sender<Config>, Receiver<Config>),
}

/// What every connection shares.
struct Gateway {
    config: config::Server,
    registry: Registry,
    providers: Vec<Rc<Provider>>,
    /// Of the configured clients.
    client_names: Vec<Rc<str>>,
    /// Makes fingerprints that nobody outside can foresee.
    fingerprints: RandomState,
    budget: Rc<Budget>,
    telemetry: Rc<Telemetry>,
    started: Instant,
    /// When every model was "created": Unix seconds of the start.
    created: u64,
    draining: Phase,
    aborting: Phase,
}

impl Server {
    /// Binds `server.host` and `server.port`, and `server.socket`. Nothing is accepted before [`Server::run`]. An error says
    /// where it can't serve and why.
    pub fn bind(config: &Config) -> io::Result<Server> {
        let listeners = Listeners::bind(&config.server)?;
        Ok(Server { listeners, config: config.clone(), reloads: async_channel::bounded(1) })
    }

    /// On listening sockets that another program has opened, in the place of those that the configuration names.
    pub fn adopt(config: &Config, sockets: Vec<OwnedFd>) -> io::Result<Server> {
        let listeners = Listeners::adopt(sockets)?;
        Ok(Server { listeners, config: config.clone(), reloads: async_channel::bounded(1) })
    }

    /// Whether its sockets were opened by another program.
    pub fn is_adopted(&self) -> bool {
        self.listeners.are_given()
    }

    /// Takes configurations to go on with while it runs.
    pub fn reloads(&self) -> Sender<Config> {
        self.reloads.0.clone()
    }

    /// Where it listens: at least one place.
    pub fn places(&self) -> Vec<Place> {
        self.listeners.places(self.config.server.tls.is_some())
    }

    /// The address among these places.
    pub fn local_addr(&self) -> Option<SocketAddr> {
        self.places().into_iter().find_map(|place| match place {
            Place::Http(address) | Place::Https(address) => Some(address),
            Place::Unix(_) => None,
        })
    }

    /// Serves on the current thread until `stop` says so or its sender is gone, and returns when the last caller is.
    pub async fn run(self, stop: Receiver<Stop>) -> io::Result<()> {
        self.run_beside(stop, future::ready(())).await
    }

    /// The same, and does something else meanwhile, which is dropped at the end: polled only when it is woken, it costs
    /// requests nothing.
    pub async fn run_beside(
        self,
        stop: Receiver<Stop>,
        other: impl Future<Output = ()> + 'static,
    ) -> io::Result<()> {
        let turns = Turns::default();
        turns.spawn(other);
        let (lifecycle, draining, aborting) = Lifecycle::new();
        let state_file = self.config.server.state_file.as_ref();
        let kept = state_file.map(|path| Keeper::open(path, &self.config.providers)).transpose()?;
        let (mut keeper, pasts) = kept.unzip();
        let mut providers = Vec::new();
        for (index, config) in self.config.providers.iter().enumerate() {
            let pasts = pasts.as_ref().map_or(&[][..], |pasts| &pasts[index]);
            providers.push(start(&turns, config, self.config.server.fairness, pasts));
        }
        let gateway = Gateway {
            registry: Registry::new(&self.config.providers),
            budget: Budget::new(budget::limits(&self.config.server)),
            telemetry: Rc::default(),
            client_names: client_names(&self.config.server),
            fingerprints: RandomState::new(),
            config: self.config.server,
            providers,
            started: Instant::now(),
            created: SystemTime::now()
                .duration_since(SystemTime::UNIX_EPOCH)
                .map_or(0, |since| since.as_secs()),
            draining,
            aborting,
        };
        let front = Rc::new(Front::new(self.config.providers, gateway));
        let work = async {
            if let Some(keeper) = &mut keeper {
                keeper.begin(&front).await?;
            }
            let served = serve(&turns, self.listeners, &front, lifecycle, stop, self.reloads.1);
            match &mut keeper {
                Some(keeper) => keeper.keep(&front, served).await,
                None => served.await,
            }
            if let Some(keeper) = keeper {
                keeper.end(&front).await;
            }
            Ok(())
        };
        // On the heap: what runs it would hold it several times over.
        with_watched_sockets(with_one_timer(turns.run(Box::pin(work)))).await?
    }
}

fn client_names(config: &config::Server) -> Vec<Rc<str>> {
    config.clients.iter().map(|client| client.name.as_str().into()).collect()
}

/// A provider with its task.
fn start(
    turns: &Turns,
    config: &config::Provider,
    fairness: Fairness,
    pasts: &[Past],
) -> Rc<Provider> {
    let (provider, task) = Provider::new(config, fairness, pasts);
    turns.spawn_urgent(or_abort(task));
    provider
}

/// A provider without its scheduler would refuse everybody for ever; a program that ends is started anew.
async fn or_abort(task: impl Future<Output = ()>) {
    if AssertUnwindSafe(task).catch_unwind().await.is_err() {
        log::error(format_args!(
            "a provider's scheduler panicked (see above); nothing can go on without it"
        ));
        log::flush();
        std::process::abort();
    }
}

async fn serve(
    turns: &Turns,
    mut listeners: Listeners,
    front: &Rc<Front>,
    lifecycle: Lifecycle,
    stop: Receiver<Stop>,
    reloads: Receiver<Config>,
) {
    // Every connection holds a sender; when the last is gone, `gone` ends.
    let (alive, gone) = async_channel::bounded::<Infallible>(1);
    let doors = Doors::new(alive);
    let why = loop {
        let stopped = async { Event::Stop(stop.recv().await.unwrap_or(Stop::Now)) };
        let reloaded = async {
            match reloads.recv().await {
                Ok(config) => Event::Reload(Box::new(config)),
                Err(_) => future::pending().await,
            }
        };
        let accepting = doors.accept(turns, &listeners, front);
        match future::or(stopped, future::or(reloaded, accepting)).await {
            Event::Stop(why) => break why,
            Event::Reload(config) => {
                for left in reload::reload(turns, front, &mut listeners, *config) {
                    // Who has connected already is let in: closing would reset it.
                    while let Ok((stream, peer)) = left.accept_now() {
                        doors.admit(turns, front, stream, peer);
                    }
                }
            }
        }
    };
    drop((listeners, doors));
    if why == Stop::Now {
        return;
    }
    let gateway = front.gateway();
    log::info(format_args!(
        "going down: running requests have {} s",
        gateway.config.drain.as_secs_f64()
    ));
    lifecycle.drain();
    if !gateway.config.drain_queue {
        front.all_providers().iter().for_each(|provider| provider.close());
    }
    let everybody_gone = async {
        let _ = gone.recv().await;
        Ending::Done
    };
    let out_of_time = async {
        Timer::after(gateway.config.drain).await;
        Ending::Abort
    };
    let impatient = async {
        let _ = stop.recv().await;
        Ending::Done
    };
    if future::or(everybody_gone, future::or(out_of_time, impatient)).await == Ending::Done {
        return;
    }
    lifecycle.abort();
    let all_gone = async {
        let _ = gone.recv().await;
    };
    within(ABORT_GRACE, all_gone).await;
}

enum Event {
    Stop(Stop),
    Reload(Box<Config>),
}

#[derive(PartialEq, Eq)]
enum Ending {
    Done,
    Abort,
}
