//! Work that may not take for ever.

use std::future::poll_fn;
use std::pin::pin;
use std::time::Duration;

use async_io::Timer;
use futures_lite::future;

/// What `work` brings within `limit`; `None` if it takes longer, and then it is dropped.
pub async fn within<T>(limit: Duration, work: impl Future<Output = T>) -> Option<T> {
    // Polled where it is: wrapping it in another future would hold its state twice, in every connection.
    let mut work = pin!(work);
    let late = async {
        Timer::after(limit).await;
        None
    };
    future::or(poll_fn(|cx| work.as_mut().poll(cx).map(Some)), late).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_done_in_time_counts_and_nothing_else() {
        let limit = Duration::from_millis(1);
        assert_eq!(smol::block_on(within(limit, future::ready(1))), Some(1));
        assert_eq!(smol::block_on(within(limit, future::pending::<()>())), None);
    }
}
