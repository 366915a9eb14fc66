//! Which provider does a request: the first that lists its model or the one whose slot comes first, and the next one where
//! it can't.
//!
//! Owns the choice and the body's name for the model. Does not know how a provider waits or sends.

use std::rc::Rc;
use std::time::Duration;

use crate::aside::Buffer;
use crate::config::Routing;
use crate::error::Error;
use crate::openai::{Peek, RequestBody};
use crate::provider::{Answer, Errand, Exchanged, Offer, Provider};
use crate::registry::Registry;
use crate::shaping::books::Ask;

/// How often the choice is made anew because others were quicker; after that, any wait will do.
const MAX_CHOICES: usize = 5;

/// A wait that nobody can foresee: longer than any that can be.
const UNKNOWN: Duration = Duration::from_secs(u32::MAX as u64);

/// All providers, and how one is chosen.
pub struct Dispatch<'g> {
    /// By the index that the registry knows.
    pub providers: &'g [Rc<Provider>],
    /// Who lists what.
    pub registry: &'g Registry,
    /// Who comes first.
    pub routing: Routing,
    /// Whether a request moves on from a provider that can't do it.
    pub fallback: bool,
}

/// A provider that has not been tried in vain.
struct Candidate<'g> {
    provider: &'g Rc<Provider>,
    /// The model's number there, and its name.
    model: usize,
    upstream: &'g str,
    attempts: u32,
}

impl<'g> Dispatch<'g> {
    /// Has a request done. The body's `model` says by whom.
    pub async fn run(
        &self,
        errand: &Errand<'_>,
        body: Buffer,
        peek: Peek,
    ) -> Result<Box<Answer>, Error> {
        let tokens = peek.estimated_tokens(&body.0);
        let mut candidates = self.candidates(&peek.model)?;
        let body = RequestBody::new(body);
        let mut choices = 0;
        loop {
            let (at, elsewhere) = self.choose(&candidates, errand, tokens).await;
            choices += 1;
            let elsewhere =
                elsewhere.map(|wait| if choices < MAX_CHOICES { wait } else { Duration::MAX });
            let Candidate { provider, model, upstream, attempts } = candidates[at];
            provider.is_chosen();
            errand.trace.goes_to(provider.name(), provider.setup().model_id(model));
            let offer = Offer {
                ask: Ask { model, tokens },
                body: under(&body, &peek, upstream),
                attempts,
                elsewhere,
                fallback: self.fallback && candidates.len() > 1,
            };
            match provider.exchange(errand, offer).await {
                Exchanged::Unable(_) if self.fallback && candidates.len() > 1 => {
                    candidates.remove(at);
                }
                Exchanged::Final(outcome) | Exchanged::Unable(outcome) => return outcome,
                Exchanged::Moved { attempts } => candidates[at].attempts = attempts,
            }
        }
    }

    fn candidates(&self, model: &str) -> Result<Vec<Candidate<'g>>, Error> {
        let any = self.fallback || self.routing == Routing::Earliest;
        let routes = self.registry.resolve(model)?.take(if any { usize::MAX } else { 1 });
        let candidate = |provider: &'g Rc<Provider>, id, upstream| {
            // A provider knows every model that it ever listed.
            let model = provider.setup().model(id)?;
            Some(Candidate { provider, model, upstream, attempts: 0 })
        };
        let candidates = routes.filter_map(|route| {
            candidate(&self.providers[route.provider], route.id, route.upstream)
        });
        Ok(candidates.collect())
    }

    /// Whom to ask, and after which wait somebody else would do it. A provider that is down comes last.
    async fn choose(
        &self,
        candidates: &[Candidate<'_>],
        errand: &Errand<'_>,
        tokens: u64,
    ) -> (usize, Option<Duration>) {
        if candidates.len() == 1 {
            return (0, None);
        }
        if self.routing == Routing::First {
            let is_up =
                |candidate: &Candidate<'_>| !(self.fallback && candidate.provider.is_down());
            return (candidates.iter().position(is_up).unwrap_or(0), None);
        }
        let mut ranked = Vec::with_capacity(candidates.len());
        for (at, Candidate { provider, model, .. }) in candidates.iter().enumerate() {
            let ask = Ask { model: *model, tokens };
            let estimate = provider.estimate(ask, errand).await;
            // The first of equals stays in front; who would refuse comes last, and says so.
            ranked.extend(estimate.map(|estimate| (provider.is_down(), estimate, at)));
        }
        ranked.sort_unstable();
        match ranked[..] {
            [] => (0, None),
            [(.., at)] => (at, None),
            // Nothing is sooner where no connection can be made.
            [(.., at), (true, ..), ..] => (at, Some(Duration::MAX)),
            [(.., at), (_, second, _), ..] => {
                (at, Some(if second.waits_for_an_end { UNKNOWN } else { second.wait }))
            }
        }
    }
}

/// The body with this name for the model that was found in it.
fn under(body: &RequestBody, peek: &Peek, model: &str) -> RequestBody {
    if peek.model == model { body.clone() } else { body.with_model(peek.model_span.clone(), model) }
}
