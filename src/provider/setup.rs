//! A provider as configured at present: what a reload exchanges while requests wait and run.
//!
//! API keys and models have a number that stays theirs for as long as the provider lives, so that whoever waits or is in
//! flight is never taken for another's; one that is gone keeps its number, without a use.

use std::rc::Rc;

use crate::config::{self, Budget, DayReset, Fairness, Mode, Pace, Secret};
use crate::shaping::limiter::{Cadence, Day, Limits, Reset};
use crate::shaping::terms::Rules;
use crate::upstream::connect::Connector;
use crate::upstream::pool::Pool;

/// A shorter key is shown by its place alone.
const SHOWN_KEY_BYTES: usize = 12;

/// What the configuration makes of a provider.
pub struct Setup {
    /// As in the file.
    pub config: config::Provider,
    pub(super) connector: Connector,
    pub(super) pool: Rc<Pool>,
    /// By lane; `None` goes without.
    keys: Vec<Option<Secret>>,
    models: Vec<Model>,
}

/// A model by its number.
#[derive(Clone)]
struct Model {
    id: Rc<str>,
    /// Whether a limit on tokens has to know what a request used.
    metered: bool,
}

impl Setup {
    /// After another one, whose numbers go on.
    pub(super) fn new(config: &config::Provider, before: Option<&Setup>) -> Setup {
        let mut keys = before.map(|before| before.keys.clone()).unwrap_or_default();
        for key in keys_of(config) {
            if !keys.contains(&key) {
                keys.push(key);
            }
        }
        let mut models = before.map(|before| before.models.clone()).unwrap_or_default();
        for model in &config.models {
            let metered = is_metered(config, model);
            match models.iter_mut().find(|known| *known.id == *model.id) {
                Some(known) => known.metered = metered,
                None => models.push(Model { id: model.id.as_str().into(), metered }),
            }
        }
        let kept = before.filter(|before| before.has_target_of(config));
        let pool = match kept.map(|before| before.pool.clone()) {
            Some(pool) => {
                pool.set_limits(config.pool_max_idle, config.pool_idle);
                pool
            }
            None => Rc::new(Pool::new(config.pool_max_idle, config.pool_idle)),
        };
        Setup { config: config.clone(), connector: Connector::new(config), pool, keys, models }
    }

    /// Whether its connections are good for this configuration too.
    pub(super) fn has_target_of(&self, config: &config::Provider) -> bool {
        let ours = (&self.config.base_url, &self.config.proxy, &self.config.ca_pem);
        ours == (&config.base_url, &config.proxy, &config.ca_pem)
    }

    /// Whether a lane's API key is one of this configuration.
    pub(super) fn uses(&self, lane: usize) -> bool {
        self.keys.get(lane).is_some_and(|key| keys_of(&self.config).any(|used| used == *key))
    }

    /// A model's number.
    pub fn model(&self, id: &str) -> Option<usize> {
        self.models.iter().position(|model| *model.id == *id)
    }

    /// A model's name.
    pub fn model_id(&self, model: usize) -> &Rc<str> {
        &self.models[model].id
    }

    /// The API key of a lane.
    pub fn key(&self, lane: usize) -> Option<&Secret> {
        self.keys.get(lane)?.as_ref()
    }

    /// How an API key is called where people read: by its end where that gives nothing away and no other ends so, or by
    /// its place.
    pub fn key_label(&self, lane: usize) -> String {
        let end = |key: &Option<Secret>| {
            let key = key.as_ref().map(Secret::reveal).filter(|key| key.len() > SHOWN_KEY_BYTES)?;
            Some(key[key.len() - 4..].to_owned())
        };
        match self.keys.get(lane).and_then(end) {
            Some(own)
                if self.keys.iter().filter_map(end).filter(|other| *other == own).count() == 1 =>
            {
                format!("...{own}")
            }
            _ => format!("#{}", lane + 1),
        }
    }

    /// The names of all models, by number.
    pub fn model_ids(&self) -> impl Iterator<Item = &str> {
        self.models.iter().map(|model| &*model.id)
    }

    pub(super) fn is_metered(&self, model: usize) -> bool {
        self.models[model].metered
    }

    /// Whether a refusal of one key leaves others to try.
    pub(super) fn has_several_keys(&self) -> bool {
        self.config.api_keys.len() > 1
    }

    /// What the scheduler keeps to.
    pub(super) fn rules(&self, fairness: Fairness) -> Rules {
        let rate = &self.config.rate_limit;
        let in_use: Vec<_> = keys_of(&self.config).collect();
        let of_model = |model: &Model| {
            let configured =
                self.config.models.iter().find(|configured| *configured.id == *model.id);
            let limit = configured.and_then(|configured| configured.rate_limit.as_ref());
            limit.map_or_else(Limits::default, |limit| limits(limit.pace.as_ref(), &limit.budget))
        };
        Rules {
            lanes: self.keys.iter().map(|key| in_use.contains(key)).collect(),
            limits: limits(Some(&rate.pace), &rate.budget),
            models: self.models.iter().map(of_model).collect(),
            adaptive: rate.adaptive,
            max_wait: rate.max_wait,
            max_queue: self.config.max_queue,
            fairness,
        }
    }
}

/// The lanes of a configuration: its keys, or one without.
fn keys_of(config: &config::Provider) -> impl Iterator<Item = Option<Secret>> {
    let without = config.api_keys.is_empty().then_some(None);
    config.api_keys.iter().cloned().map(Some).chain(without)
}

fn is_metered(config: &config::Provider, model: &config::Model) -> bool {
    let own = model.rate_limit.as_ref().map(|limit| &limit.budget);
    [Some(&config.rate_limit.budget), own]
        .into_iter()
        .flatten()
        .any(|budget| budget.tokens_per_minute.is_some())
}

pub(super) fn limits(pace: Option<&Pace>, budget: &Budget) -> Limits {
    let cadence = |pace: &Pace| Cadence { interval: pace.interval, capacity: pace.capacity };
    let reset = |reset| match reset {
        DayReset::At(time) => Reset::At(time),
        DayReset::Rolling => Reset::Rolling,
    };
    Limits {
        cadence: pace.filter(|pace| pace.mode != Mode::Window).map(cadence),
        window: budget.window,
        day: budget.day.map(|day| Day { max: day.max, reset: reset(day.reset) }),
        tokens: budget.tokens_per_minute,
        concurrent: budget.max_concurrent,
        margin: budget.window_margin,
    }
}
