//! The model's tokens: at most `max` in any `span`, estimated at the send and corrected when the truth is known.

use std::collections::VecDeque;

use super::Nanos;
use super::memory::{NS_PER_MS, TokensMemory};

#[derive(Debug)]
pub(super) struct TokenWindow {
    max: u64,
    span: Nanos,
    /// Oldest first. What has left the window is dropped at the next send.
    sends: VecDeque<Entry>,
    /// The number of sends dropped: the id of the first in `sends`.
    dropped: u64,
    /// Of all in `sends`; wide, so that it cannot saturate and then subtract too much.
    total: u128,
}

#[derive(Debug)]
struct Entry {
    at: Nanos,
    tokens: u64,
}

impl TokenWindow {
    pub(super) fn new(max: u64, span: Nanos) -> Self {
        TokenWindow { max: max.max(1), span, sends: VecDeque::new(), dropped: 0, total: 0 }
    }

    /// When `cost` more tokens fit; a cost above `max` fits when nothing else is in the window.
    pub(super) fn earliest(&self, now: Nanos, cost: u64) -> Nanos {
        let room_for_others = u128::from(self.max.saturating_sub(cost));
        let mut total = self.total;
        let mut at = now;
        for entry in &self.sends {
            if total <= room_for_others {
                break;
            }
            total -= u128::from(entry.tokens);
            at = at.max(entry.at.saturating_add(self.span));
        }
        at
    }

    pub(super) fn sent(&mut self, at: Nanos, tokens: u64) {
        while let Some(oldest) = self.sends.front()
            && oldest.at.saturating_add(self.span) <= at
        {
            self.total -= u128::from(oldest.tokens);
            self.sends.pop_front();
            self.dropped += 1;
        }
        let last = self.sends.back().map_or(0, |entry| entry.at);
        self.sends.push_back(Entry { at: at.max(last), tokens });
        self.total += u128::from(tokens);
    }

    /// Corrects the send with this id (they count from 0), unless it has been dropped.
    pub(super) fn settle(&mut self, id: u64, tokens: u64) {
        let index = id.checked_sub(self.dropped).and_then(|index| usize::try_from(index).ok());
        let Some(entry) = index.and_then(|index| self.sends.get_mut(index)) else {
            return;
        };
        self.total = self.total - u128::from(entry.tokens) + u128::from(tokens);
        entry.tokens = tokens;
    }

    /// The next send has this id; those in the window have the ones before it.
    pub(super) fn renumber(&mut self, next: u64) {
        self.dropped = next.saturating_sub(self.sends.len() as u64);
    }

    /// Those that count, oldest first.
    pub(super) fn memory(&self, now: Nanos) -> TokensMemory {
        let left = self.sends.partition_point(|entry| entry.at.saturating_add(self.span) <= now);
        let pair = |entry: &Entry| (now.saturating_sub(entry.at) / NS_PER_MS, entry.tokens);
        self.sends.range(left..).map(pair).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SPAN: Nanos = 60;

    #[test]
    fn what_is_asked_for_waits_for_the_oldest_to_leave() {
        let mut tokens = TokenWindow::new(100, SPAN);
        for (at, cost) in [(0, 40), (10, 30), (20, 20)] {
            assert_eq!(tokens.earliest(at, cost), at);
            tokens.sent(at, cost);
        }
        // 90 are in the window at 20.
        for (cost, want) in
            [(0, 20), (10, 20), (11, 60), (50, 60), (51, 70), (81, 80), (100, 80), (5000, 80)]
        {
            assert_eq!(tokens.earliest(20, cost), want, "{cost} tokens");
        }
    }

    #[test]
    fn a_settled_send_counts_what_it_used_at_its_own_instant() {
        let mut tokens = TokenWindow::new(100, SPAN);
        tokens.sent(0, 40);
        tokens.sent(10, 40);
        // (id, used, then when 60 more fit)
        for (id, used, want) in [(0, 0, 20), (0, 41, 60), (1, 200, 70), (1, 10, 60), (7, 900, 60)] {
            tokens.settle(id, used);
            assert_eq!(tokens.earliest(20, 60), want, "send {id} used {used}");
        }
        tokens.sent(60, 60); // the first has left
        tokens.settle(0, 1000);
        assert_eq!(tokens.earliest(60, 30), 60);
        assert_eq!(tokens.earliest(60, 31), 70);
        tokens.settle(2, 90);
        assert_eq!(tokens.earliest(60, 11), 120);
    }

    #[test]
    fn a_request_larger_than_the_limit_goes_alone() {
        let mut tokens = TokenWindow::new(100, SPAN);
        assert_eq!(tokens.earliest(5, u64::MAX), 5);
        tokens.sent(5, u64::MAX);
        assert_eq!(tokens.earliest(6, 0), 65);
        tokens.settle(0, 99);
        assert_eq!((tokens.earliest(6, 1), tokens.earliest(6, 2)), (6, 65));
    }
}
