//! What the line tells one waiter: two words at most, in order, within the thread.
//!
//! Instead of a channel, which would weigh more than the waiter's place does. Knows nothing of what is said.

use std::cell::RefCell;
use std::future::poll_fn;
use std::rc::Rc;
use std::task::{Poll, Waker};

/// Who tells, and who is told.
pub fn between<T>() -> (Teller<T>, Hearer<T>) {
    let said = Rc::new(RefCell::new(Said { words: [None, None], over: false, listening: None }));
    (Teller(said.clone()), Hearer(said))
}

/// Tells. Dropped, it has said its last word.
#[derive(Debug)]
pub struct Teller<T>(Rc<RefCell<Said<T>>>);

/// Is told.
#[derive(Debug)]
pub struct Hearer<T>(Rc<RefCell<Said<T>>>);

#[derive(Debug)]
struct Said<T> {
    /// The first one first.
    words: [Option<T>; 2],
    over: bool,
    listening: Option<Waker>,
}

impl<T> Teller<T> {
    /// Says a word. Of three that nobody has heard the first is forgotten: what counts most is how it ends.
    pub fn tell(&self, word: T) {
        let mut said = self.0.borrow_mut();
        let Said { words: [first, second], .. } = &mut *said;
        if first.is_none() {
            *first = Some(word);
        } else if let Some(before) = second.replace(word) {
            *first = Some(before);
        }
        wake(said.listening.take());
    }
}

impl<T> Drop for Teller<T> {
    fn drop(&mut self) {
        let mut said = self.0.borrow_mut();
        said.over = true;
        wake(said.listening.take());
    }
}

impl<T> Hearer<T> {
    /// The next word; `None` where there will be none.
    pub async fn next(&self) -> Option<T> {
        poll_fn(|cx| {
            if let Some(word) = self.heard() {
                return Poll::Ready(Some(word));
            }
            let mut said = self.0.borrow_mut();
            if said.over {
                return Poll::Ready(None);
            }
            match &mut said.listening {
                Some(known) => known.clone_from(cx.waker()),
                unknown => *unknown = Some(cx.waker().clone()),
            }
            Poll::Pending
        })
        .await
    }

    /// Whether the last word has been said, heard or not.
    pub fn is_over(&self) -> bool {
        self.0.borrow().over
    }

    /// What has been said already.
    pub fn heard(&self) -> Option<T> {
        let [first, second] = &mut self.0.borrow_mut().words;
        let word = first.take();
        *first = second.take();
        word
    }
}

fn wake(waker: Option<Waker>) {
    if let Some(waker) = waker {
        waker.wake();
    }
}

#[cfg(test)]
mod tests {
    use futures_lite::future::{self, block_on};

    use super::*;

    #[test]
    fn words_come_in_order_and_then_the_end() {
        let (teller, hearer) = between();
        assert_eq!(hearer.heard(), None);
        teller.tell(1);
        teller.tell(2);
        assert_eq!(block_on(hearer.next()), Some(1));
        teller.tell(3);
        assert_eq!((hearer.heard(), hearer.heard(), hearer.heard()), (Some(2), Some(3), None));
        (4..7).for_each(|word| teller.tell(word));
        assert!(!hearer.is_over());
        drop(teller);
        assert!(hearer.is_over());
        let words = (block_on(hearer.next()), block_on(hearer.next()), block_on(hearer.next()));
        assert_eq!(words, (Some(5), Some(6), None));
    }

    #[test]
    fn who_listens_is_woken_by_a_word_and_by_the_end() {
        let (teller, hearer) = between();
        let told = async {
            future::yield_now().await;
            teller.tell(7);
            future::yield_now().await;
            drop(teller);
        };
        let heard = async { (hearer.next().await, hearer.next().await) };
        assert_eq!(block_on(future::zip(told, heard)).1, (Some(7), None));
    }

    #[test]
    fn a_word_that_nobody_hears_is_dropped_with_the_hearer() {
        let (teller, hearer) = between();
        let word = Rc::new(());
        teller.tell(word.clone());
        drop(teller);
        assert_eq!(Rc::strong_count(&word), 2);
        drop(hearer);
        assert_eq!(Rc::strong_count(&word), 1);
    }
}
