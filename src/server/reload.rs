//! Going on under another configuration: whoever is connected stays connected, whoever waits stays in line.
//!
//! Each request is served under the configuration that was in force when it came. A provider that stays keeps its line and
//! all that was sent; one that is gone gets no new requests. It is kept all the same: what was sent to it counts when it
//! comes back.

use std::cell::RefCell;
use std::rc::Rc;

use super::listener::{Listener, Listeners, list};
use super::turns::Turns;
use super::{Gateway, budget, client_names, start};
use crate::config::{self, Config};
use crate::log;
use crate::provider::Provider;
use crate::registry::Registry;

/// What new requests are served with.
pub struct Front {
    gateway: RefCell<Rc<Gateway>>,
    /// As configured, for telling what a reload changes.
    configured: RefCell<Vec<config::Provider>>,
    /// All that there ever were, by unique names.
    known: RefCell<Vec<Rc<Provider>>>,
}

impl Front {
    /// Until the first reload.
    pub(super) fn new(configured: Vec<config::Provider>, gateway: Gateway) -> Front {
        Front {
            known: RefCell::new(gateway.providers.clone()),
            gateway: RefCell::new(Rc::new(gateway)),
            configured: RefCell::new(configured),
        }
    }

    /// As it is at present.
    pub(super) fn gateway(&self) -> Rc<Gateway> {
        self.gateway.borrow().clone()
    }

    /// Those at work and those that are gone: somebody may still wait for one, and what was sent counts.
    pub(super) fn all_providers(&self) -> Vec<Rc<Provider>> {
        self.known.borrow().clone()
    }
}

/// Puts a configuration in force and says in the log what it changes. Where the new address can't be had, all stays as it
/// was. Returns the listeners that it has left, if it moves.
pub(super) fn reload(
    turns: &Turns,
    front: &Front,
    listeners: &mut Listeners,
    config: Config,
) -> Vec<Listener> {
    let before = front.gateway();
    let Config { log: settings, mut server, providers: configs } = config;
    keep_ticket_keys(&before.config, &mut server);
    let places = listeners.places(before.config.tls.is_some());
    let left = match listeners.move_to(&before.config, &server) {
        Ok(left) => left,
        Err(error) => {
            log::error(format_args!("nothing was reloaded: {error}"));
            return Vec::new();
        }
    };
    log::change(settings);
    let new_places = listeners.places(server.tls.is_some());
    if new_places != places {
        log::info(format_args!("from now on at {}", list(&new_places)));
    }
    let changes = changes(&before.config, &server, &front.configured.borrow(), &configs);
    let provider = |config: &config::Provider| {
        let mut all = front.known.borrow_mut();
        if let Some(known) = all.iter().find(|known| **known.name() == *config.name) {
            known.reload(config, server.fairness);
            return known.clone();
        }
        all.push(start(turns, config, server.fairness, &[]));
        all[all.len() - 1].clone()
    };
    let providers = configs.iter().map(provider).collect();
    before.budget.set_limits(budget::limits(&server));
    let gateway = Gateway {
        registry: Registry::new(&configs),
        providers,
        client_names: client_names(&server),
        fingerprints: before.fingerprints.clone(),
        budget: before.budget.clone(),
        telemetry: before.telemetry.clone(),
        started: before.started,
        created: before.created,
        draining: before.draining.clone(),
        aborting: before.aborting.clone(),
        config: server,
    };
    front.gateway.replace(Rc::new(gateway));
    front.configured.replace(configs);
    log::info(format_args!("reloaded: {changes}"));
    left
}

/// Keeps the TLS context where the certificate is the same: the keys in it are those of the
/// clients' session tickets.
fn keep_ticket_keys(before: &config::Server, after: &mut config::Server) {
    if before.tls == after.tls {
        after.tls.clone_from(&before.tls);
    }
}

/// What is different, in one line.
fn changes(
    before: &config::Server,
    after: &config::Server,
    old: &[config::Provider],
    new: &[config::Provider],
) -> String {
    let mut changes = Vec::new();
    if before != after {
        changes.push("server is changed".to_owned());
    }
    if before.state_file != after.state_file {
        changes.push("state_file takes effect at the next start".to_owned());
    }
    let find = |name: &str, among: &[config::Provider]| {
        among.iter().position(|provider| provider.name == name)
    };
    for provider in new {
        match find(&provider.name, old) {
            None => changes.push(format!("{} is new", provider.name)),
            Some(at) if old[at] != *provider => {
                changes.push(format!("{} is changed", provider.name))
            }
            Some(_) => {}
        }
    }
    let gone = old.iter().filter(|provider| find(&provider.name, new).is_none());
    changes.extend(gone.map(|provider| format!("{} is gone", provider.name)));
    let names = |providers: &[config::Provider]| {
        providers.iter().map(|one| one.name.clone()).collect::<Vec<_>>()
    };
    if changes.is_empty() && names(old) != names(new) {
        changes.push("the providers are in another order".to_owned());
    }
    if changes.is_empty() { "nothing is different".to_owned() } else { changes.join("; ") }
}
