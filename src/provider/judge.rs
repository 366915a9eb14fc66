//! What a provider's response means for the request that got it, and what the scheduler is told of it.

use std::time::{Duration, Instant, SystemTime};

use super::{Advice, Answer, Provider, Setup};
use crate::config::CooldownScope;
use crate::log;
use crate::shaping::books::{Ask, Scope};
use crate::upstream::verdict::{self, Verdict};

/// Of the body of a refusal, so much is read, for so long. Status and headers decide where it is longer or slower.
const JUDGED_BODY_BYTES: usize = 64 * 1024;
const JUDGED_BODY_TIME: Duration = Duration::from_secs(2);

/// What to do with an outcome.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Judgement {
    PassOn,
    /// For the caller, unless another provider takes it.
    Unable,
    /// Send again; the scheduler knows for how long the provider pauses.
    Again,
    /// This API key has had its fill. Send again while there is one that has not said so.
    WithAnotherKey,
    /// Send again after a pause of this request's own.
    AgainAfterBackoff,
}

impl Provider {
    /// Whether an answer is the caller's, or a refusal that waiting may overcome. Tells the scheduler what the provider
    /// asks for.
    pub(super) async fn judge(&self, setup: &Setup, answer: &mut Answer, ask: Ask) -> Judgement {
        let (status, retry) = (answer.head.status, &setup.config.retry);
        let listed = retry.statuses.contains(&status);
        if !listed && !verdict::may_be_refusal(status) {
            self.scheduler.accepted(answer.lane(), ask.model);
            return Judgement::PassOn;
        }
        answer.read_ahead(JUDGED_BODY_BYTES, JUDGED_BODY_TIME).await;
        let body = answer.read_so_far();
        let verdict = verdict::judge(status, &answer.head.headers, body, SystemTime::now());
        answer.is_judged(matches!(verdict, Verdict::CoolDown { .. } | Verdict::Exhausted));
        match verdict {
            Verdict::CoolDown { wait, scope } => {
                self.cool_down(setup, answer, ask, scope, wait);
                let too_long = wait.is_some_and(|wait| wait > retry.max_cooldown);
                match (listed, too_long) {
                    (true, false) => Judgement::Again,
                    (true, true) => Judgement::Unable,
                    (false, _) => Judgement::PassOn,
                }
            }
            Verdict::Exhausted => {
                answer.advice = Some(Advice::StayAway);
                if setup.has_several_keys() && listed {
                    self.scheduler.refused(answer.lane(), ask.model, Scope::Provider, None);
                    return Judgement::WithAnotherKey;
                }
                if listed { Judgement::Unable } else { Judgement::PassOn }
            }
            Verdict::Repeat | Verdict::PassOn if listed => Judgement::AgainAfterBackoff,
            Verdict::Repeat | Verdict::PassOn => Judgement::PassOn,
        }
    }

    fn cool_down(
        &self,
        setup: &Setup,
        answer: &mut Answer,
        ask: Ask,
        said: verdict::Scope,
        wait: Option<Duration>,
    ) {
        let scope = match (setup.config.rate_limit.cooldown, said) {
            (CooldownScope::Provider, _) | (CooldownScope::Auto, verdict::Scope::Provider) => {
                Scope::Provider
            }
            (CooldownScope::Model, _) | (CooldownScope::Auto, verdict::Scope::Model) => {
                Scope::Model
            }
        };
        let pause = wait.map(|wait| wait.min(setup.config.retry.max_cooldown));
        self.scheduler.refused(answer.lane(), ask.model, scope, pause);
        answer.advice = Some(Advice::ComeBack(wait.map(|wait| Instant::now() + wait)));
        let who = match scope {
            Scope::Provider => "all its models",
            Scope::Model => setup.model_id(ask.model),
        };
        let (name, status) = (self.with_key(answer.lane()), answer.head.status);
        match wait {
            Some(wait) => log::warn(format_args!(
                "{name} answered {status}: {who} pause for {} s",
                wait.as_secs_f64()
            )),
            None => {
                log::warn(format_args!("{name} answered {status} and no time: {who} back off"));
            }
        }
    }
}
