//! Whether a provider was sent to faster than its limit allows, from the times at which the kernel received the heads.
//!
//! The gateway takes a slot's time after its write and begins the next write no earlier than that allows; the kernel
//! stamps a loopback packet inside the write. So the limits hold for the stamps as they stand, whatever the load, the
//! cadence's but for the lateness that it makes up ([`MADE_UP`]). The two clocks, monotonic there and real time here, are slewed together; a step of the wall clock would fail a soak.

use std::time::Duration;

/// For rounding, and for reading two clocks. Over a busy time it does not add up: see [`bucket`].
pub const EXACT: Duration = Duration::from_micros(200);

/// By so much a gap may be shorter than an interval (of more than a millisecond), if those before it were late.
const MADE_UP_BY_A_GAP: Duration = Duration::from_millis(1);

/// By so much several gaps together. With a burst, whose gaps are no measure, one is all.
const MADE_UP: Duration = Duration::from_millis(20);

/// For messages of many packets, whose time may be that of a later one (see `wire`).
pub const LATE: Duration = Duration::from_millis(250);

/// Checks a token bucket over sorted times in nanoseconds: no k+capacity sends within less than k intervals and
/// [`MADE_UP`], for any k, and without a burst no gap shorter by more than [`MADE_UP_BY_A_GAP`].
pub fn bucket(
    times: &[u64],
    interval: Duration,
    capacity: u32,
    tolerance: Duration,
) -> Result<(), String> {
    let (step, slack) = (nanos(interval), nanos(tolerance));
    let made_up = nanos(if capacity == 1 { MADE_UP } else { MADE_UP_BY_A_GAP });
    let least_gap = if capacity == 1 { step.saturating_sub(nanos(MADE_UP_BY_A_GAP)) } else { 0 };
    let mut full_at = 0;
    for (n, &at) in times.iter().enumerate() {
        let opens = u64::saturating_sub(full_at, (u64::from(capacity) - 1) * step);
        let gap = if n == 0 { u64::MAX } else { at - times[n - 1] };
        if at + slack + made_up < opens || gap.saturating_add(slack) < least_gap {
            return Err(format!(
                "send {n} came {:.3} ms before its token, {:.3} ms after the one before it",
                millis(opens.saturating_sub(at)),
                millis(gap)
            ));
        }
        full_at = at.max(full_at) + step;
    }
    Ok(())
}

/// Checks that no `span` holds more than `max` of the sorted times.
pub fn window(times: &[u64], max: u32, span: Duration) -> Result<(), String> {
    let max = max as usize;
    let full = (max..times.len()).find(|&n| times[n] - times[n - max] + nanos(EXACT) < nanos(span));
    let Some(n) = full else { return Ok(()) };
    Err(format!("{} sends within {:.3} ms", max + 1, millis(times[n] - times[n - max])))
}

/// Checks that nothing came during a pause, but for its first `reaction`, when what had left already may arrive.
pub fn pauses(times: &[u64], pauses: &[(u64, u64)], reaction: Duration) -> Result<(), String> {
    for &(from, to) in pauses {
        let first = times.partition_point(|&at| at < from + nanos(reaction));
        if let Some(&at) = times.get(first).filter(|&&at| at + nanos(EXACT) < to) {
            return Err(format!("a send {:.3} ms before the end of a pause", millis(to - at)));
        }
    }
    Ok(())
}

/// In milliseconds.
pub fn smallest_gap(times: &[u64]) -> Option<f64> {
    times.windows(2).map(|pair| pair[1] - pair[0]).min().map(millis)
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).expect("a limit of this soak is below 500 years")
}

fn millis(nanos: u64) -> f64 {
    nanos as f64 / 1e6
}
