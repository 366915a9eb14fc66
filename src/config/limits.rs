//! The keys of `rate_limit:` (of a provider and of a model) and of `retry:`, and which of them go together.
//!
//! A key that would say nothing where it stands is a fault: somebody believes in it.

use std::time::Duration;

use super::section::{SECONDS_MAX, SECONDS_MIN, Section};
use super::{
    Budget, CooldownScope, Day, DayReset, Mode, ModelLimit, Pace, RateLimit, Retry, day_reset,
};

/// Faster than this is no limit any more, and its interval would come near zero.
const RPM_MAX: f64 = 60_000_000.0;
/// One send in a week.
const RPM_MIN: f64 = 0.0001;
/// Past these a count is no limit any more.
const COUNT_MAX: u32 = 1_000_000_000;
const TPM_MAX: u64 = 1_000_000_000_000;

const RPM_REMEDY: &str = "write the requests per minute your key allows, e.g. rpm: 40";
const STATUSES_REMEDY: &str = "write e.g. statuses: [429, 503]";
const MODES: [(&str, Mode); 3] =
    [("spaced", Mode::Spaced), ("burst", Mode::Burst), ("window", Mode::Window)];
/// Those that pass by themselves. 529 is what Anthropic says when it is overloaded, as others say 503.
const RETRIED: [u16; 6] = [429, 500, 502, 503, 504, 529];

/// `rate_limit:` of a provider. `None` only together with a fault.
pub(super) fn provider(mut keys: Section<'_, '_, '_>) -> Option<RateLimit> {
    let (pace, window) = pace(&mut keys);
    if pace.is_none() {
        keys.fault(&format!("neither rpm nor interval_seconds is given; {RPM_REMEDY}"));
    }
    let budget = budget(&mut keys, window);
    let max_wait = keys.number(
        "max_wait_seconds",
        0.0..=SECONDS_MAX,
        "write seconds, e.g. max_wait_seconds: 60, or null to wait for ever",
    );
    let scopes = [("provider", CooldownScope::Provider), ("model", CooldownScope::Model)];
    let cooldown = keys.choice("cooldown", &scopes, CooldownScope::Auto);
    let adaptive = keys.flag("adaptive", false);
    if adaptive && pace.is_some_and(|pace| pace.mode == Mode::Window) {
        let problem = "stretches an interval, which mode: window does not have; remove it, or write mode: spaced";
        keys.refuse("adaptive", problem);
    }
    keys.finish();
    Some(RateLimit {
        pace: pace?,
        budget,
        max_wait: max_wait.map(Duration::from_secs_f64),
        cooldown,
        adaptive,
    })
}

/// `rate_limit:` of a model.
pub(super) fn model(mut keys: Section<'_, '_, '_>) -> ModelLimit {
    let (pace, window) = pace(&mut keys);
    if pace.is_none() {
        for key in ["mode", "strict_window"] {
            keys.refuse(
                key,
                "says nothing without rpm or interval_seconds; write one of them, or remove it",
            );
        }
    }
    let budget = budget(&mut keys, window);
    let telling =
        ["rpm", "interval_seconds", "mode", "strict_window", "rpd", "tpm", "max_concurrent"];
    if telling.into_iter().all(|key| keys.optional(key).is_none()) {
        keys.fault(
            "sets no limit; write at least one of rpm, rpd, tpm and max_concurrent, or remove it",
        );
    }
    keys.finish();
    ModelLimit { pace, budget }
}

/// `retry:` of a provider.
pub(super) fn retry(mut keys: Section<'_, '_, '_>) -> Retry {
    let retry = Retry {
        attempts: keys.integer("attempts", 5, 1..=100),
        statuses: statuses(&mut keys).unwrap_or_else(|| RETRIED.to_vec()),
        max_cooldown: keys.seconds("max_cooldown_seconds", 300.0, 0.0),
    };
    keys.finish();
    retry
}

fn statuses(keys: &mut Section<'_, '_, '_>) -> Option<Vec<u16>> {
    let found = keys.optional("statuses")?;
    let mut statuses = Vec::new();
    for item in keys.walk.items(&found, STATUSES_REMEDY) {
        let Some(status) = keys.walk.whole(&item, 400..=599, STATUSES_REMEDY) else { continue };
        if statuses.contains(&status) {
            keys.walk.fault(&item, "is listed twice; keep one of them");
        }
        statuses.push(status);
    }
    Some(statuses)
}

/// The pace, and the window where one is asked for. No pace where no key asks for one.
fn pace(keys: &mut Section<'_, '_, '_>) -> (Option<Pace>, Option<u32>) {
    let mode = keys.choice("mode", &MODES, Mode::Spaced);
    let rpm = keys.number("rpm", RPM_MIN..=RPM_MAX, RPM_REMEDY);
    let remedy = "write the seconds between two sends, e.g. interval_seconds: 1.5";
    let seconds = keys.number("interval_seconds", SECONDS_MIN..=SECONDS_MAX, remedy);
    let capacity = keys.integer("capacity", 1, 1..=1_000_000);
    let strict = keys.flag("strict_window", false);
    if mode != Mode::Burst {
        keys.refuse("capacity", "belongs to mode: burst; remove it, or write mode: burst");
    }
    if mode == Mode::Window {
        keys.refuse(
            "interval_seconds",
            "belongs to mode: spaced and burst; remove it, or write mode: spaced",
        );
        keys.refuse(
            "strict_window",
            "belongs to mode: spaced and burst (mode: window is strict by itself); remove it",
        );
    }
    let counted =
        if mode == Mode::Window { Some("mode: window") } else { strict.then_some("strict_window") };
    let window = counted.map(|by| window(keys, rpm, by));
    let given = keys.optional("rpm").is_some() || keys.optional("interval_seconds").is_some();
    let pace = (given || window.is_some()).then(|| Pace {
        mode,
        rpm,
        interval: interval(rpm, seconds),
        capacity: window.filter(|_| mode == Mode::Window).unwrap_or(capacity),
    });
    (pace, window)
}

/// The whole requests of `rpm`, which the setting `by` counts in a rolling minute.
fn window(keys: &mut Section<'_, '_, '_>, rpm: Option<f64>, by: &str) -> u32 {
    let found = keys.required("rpm", &format!("{by} counts up to it; {RPM_REMEDY}"));
    let (Some(found), Some(rpm)) = (found, rpm) else { return 1 };
    if rpm < 1.0 {
        let remedy = "write rpm: 1 or more, or mode: spaced without strict_window";
        let problem = format!("is less than 1, and {by} counts whole requests; {remedy}");
        keys.walk.fault(&found, problem);
    }
    rpm as u32 // the whole part, at most RPM_MAX
}

fn budget(keys: &mut Section<'_, '_, '_>, window: Option<u32>) -> Budget {
    let margin = keys.integer("window_margin_ms", 500, 0..=60_000);
    let rpd = keys.whole(
        "rpd",
        1..=COUNT_MAX,
        "write the requests per day your key allows, e.g. rpd: 1000",
    );
    let reset = day_reset(keys);
    let tpm = keys.whole(
        "tpm",
        1..=TPM_MAX,
        "write the tokens per minute your key allows, e.g. tpm: 60000",
    );
    let remedy = "write how many requests may be in flight, e.g. max_concurrent: 4";
    let max_concurrent = keys.whole("max_concurrent", 1..=COUNT_MAX, remedy);
    let daily = keys.optional("rpd").is_some();
    if !daily {
        keys.refuse(
            "day_resets_at",
            "belongs to rpd; remove it, or write the requests per day, e.g. rpd: 1000",
        );
    }
    if !daily && window.is_none() && keys.optional("tpm").is_none() {
        let problem =
            "belongs to mode: window, strict_window, rpd and tpm; remove it, or write one of them";
        keys.refuse("window_margin_ms", problem);
    }
    Budget {
        window,
        window_margin: Duration::from_millis(margin),
        day: rpd.map(|max| Day { max, reset }),
        tokens_per_minute: tpm,
        max_concurrent,
    }
}

fn day_reset(keys: &mut Section<'_, '_, '_>) -> DayReset {
    let midnight = DayReset::At(Duration::ZERO);
    let Some(found) = keys.optional("day_resets_at") else {
        return midnight;
    };
    let Some(text) = keys.walk.text(&found) else {
        return midnight;
    };
    day_reset::parse(&text.value).unwrap_or_else(|| {
        keys.walk.fault(
            &found,
            format!("must be a time of day or rolling, not {}; {}", text.shown, day_reset::REMEDY),
        );
        midnight
    })
}

/// The longer of the two; zero only where a fault left neither. 60 s / rpm is rounded up to the nanosecond, lest a minute hold one send too many.
fn interval(rpm: Option<f64>, seconds: Option<f64>) -> Duration {
    let by_rpm = rpm.map(|rpm| Duration::from_nanos((60e9 / rpm).ceil() as u64));
    let by_seconds = seconds.map(Duration::from_secs_f64);
    by_rpm.max(by_seconds).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_interval_is_the_longer_and_exact() {
        for (rpm, seconds, millis) in [
            (Some(40.0), None, 1500),
            (Some(60.0), None, 1000),
            (Some(0.5), None, 120_000),
            (Some(600.0), None, 100),
            (None, Some(0.1), 100),
            (None, Some(2.3), 2300),
            (Some(60.0), Some(2.0), 2000),
            (Some(20.0), Some(2.0), 3000),
        ] {
            assert_eq!(
                interval(rpm, seconds),
                Duration::from_millis(millis),
                "{rpm:?} {seconds:?}"
            );
        }
        assert_eq!(interval(Some(RPM_MAX), None), Duration::from_micros(1));
        assert_eq!(interval(Some(RPM_MIN), None), Duration::from_secs(600_000));
    }

    #[test]
    fn no_whole_rpm_is_exceeded_by_rounding() {
        for rpm in 1..=100_000_u32 {
            let interval = interval(Some(f64::from(rpm)), None);
            assert!(interval * rpm >= Duration::from_secs(60), "{rpm}");
            assert!((interval - Duration::from_nanos(1)) * rpm < Duration::from_secs(60), "{rpm}");
        }
    }
}
