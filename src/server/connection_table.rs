//! Which connections are open, whose they are, and which of them make room for others.
//!
//! A client may hold its share of them. Where there is no room, the connection that has waited longest for its next
//! request leaves, else the one that has lingered longest behind its last response. It may still answer a request
//! that is on its way: until it is gone it counts as leaving. Knows no sockets and no time.

use std::cell::RefCell;
use std::collections::HashMap;
use std::future::poll_fn;
use std::rc::Rc;
use std::task::{Poll, Waker};

/// Connections that were asked to leave and have not left yet: more are not asked.
const MAX_LEAVING: usize = 64;

/// How many may be open.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// In all.
    pub all: usize,
    /// Of one client.
    pub each: usize,
}

/// What a newcomer found no room in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Full {
    /// What all may have together.
    All,
    /// Its own client's share.
    Share,
}

/// The open connections.
#[derive(Debug, Default)]
pub struct Table(RefCell<State>);

#[derive(Debug, Default)]
struct State {
    /// By number; a number without a connection is free.
    connections: Vec<Option<Connection>>,
    free: Vec<usize>,
    /// Those that count; without those that leave.
    open: usize,
    leaving: usize,
    clients: HashMap<Rc<str>, Rc<Client>>,
    /// Counts the waits that have begun.
    turn: u64,
}

#[derive(Debug)]
struct Connection {
    /// None where its peer speaks for many.
    client: Option<Rc<Client>>,
    activity: Activity,
    waker: Option<Waker>,
}

#[derive(Debug)]
struct Client {
    name: Rc<str>,
    open: std::cell::Cell<usize>,
}

/// What a connection does. The numbers order those that do the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Activity {
    /// Waits for its next request.
    Idles(u64),
    /// Its last response is out.
    Lingers(u64),
    Works,
    Leaves,
}

/// One connection's place in the table; given back on drop.
#[derive(Debug)]
pub struct Entry {
    table: Rc<Table>,
    number: usize,
}

impl Table {
    /// Lets a connection of this client in, or says where there is no room.
    pub fn enter(self: &Rc<Self>, client: Option<&Rc<str>>, limits: Limits) -> Result<Entry, Full> {
        let mut state = self.0.borrow_mut();
        let state = &mut *state;
        let known = client.and_then(|client| state.clients.get(client)).cloned();
        let is_over = |known: &Rc<Client>| known.open.get() >= limits.each;
        // A share of everything is none.
        if limits.each < limits.all
            && known.as_ref().is_some_and(is_over)
            && !state.make_room(known.as_ref())
        {
            return Err(Full::Share);
        }
        if state.open >= limits.all && !state.make_room(None) {
            return Err(Full::All);
        }
        let client = known.or_else(|| client.map(|name| state.add_client(name)));
        Ok(Entry { table: self.clone(), number: state.add(client) })
    }
}

impl State {
    /// Asks the longest idle connection to leave, of this client or of any.
    fn make_room(&mut self, client: Option<&Rc<Client>>) -> bool {
        if self.leaving >= MAX_LEAVING {
            return false;
        }
        let is_of = |connection: &Connection| match (client, &connection.client) {
            (None, _) => true,
            (Some(client), Some(own)) => Rc::ptr_eq(client, own),
            (Some(_), None) => false,
        };
        let connections = self.connections.iter_mut().flatten();
        let first = connections
            .filter(|connection| is_of(connection))
            .min_by_key(|connection| connection.activity)
            .filter(|connection| connection.activity < Activity::Works);
        let Some(connection) = first else { return false };
        connection.activity = Activity::Leaves;
        if let Some(client) = &connection.client {
            client.open.set(client.open.get() - 1);
        }
        self.open -= 1;
        self.leaving += 1;
        if let Some(waker) = connection.waker.take() {
            waker.wake();
        }
        true
    }

    fn add_client(&mut self, name: &Rc<str>) -> Rc<Client> {
        let client = Rc::new(Client { name: name.clone(), open: 0.into() });
        self.clients.insert(name.clone(), client.clone());
        client
    }

    fn add(&mut self, client: Option<Rc<Client>>) -> usize {
        if let Some(client) = &client {
            client.open.set(client.open.get() + 1);
        }
        self.open += 1;
        let number = self.free.pop().unwrap_or_else(|| {
            self.connections.push(None);
            self.connections.len() - 1
        });
        self.connections[number] =
            Some(Connection { client, activity: Activity::Works, waker: None });
        number
    }

    fn remove(&mut self, number: usize) {
        let connection = self.connections[number].take().expect("an entry leaves once");
        self.free.push(number);
        let counts = connection.activity != Activity::Leaves;
        if counts {
            self.open -= 1;
        } else {
            self.leaving -= 1;
        }
        let Some(client) = connection.client else { return };
        client.open.set(client.open.get() - usize::from(counts));
        // The list's own, and this one.
        if Rc::strong_count(&client) == 2 {
            self.clients.remove(&client.name);
        }
    }

    fn connection(&mut self, number: usize) -> &mut Connection {
        self.connections[number].as_mut().expect("its entry is there")
    }
}

impl Entry {
    /// The connection waits for its next request from now on.
    pub fn idles(&self) {
        self.does(Activity::Idles);
    }

    /// Its last response is out, and it reads on for a while.
    pub fn lingers(&self) {
        self.does(Activity::Lingers);
    }

    /// It has something to do.
    pub fn works(&self) {
        self.does(|_| Activity::Works);
    }

    fn does(&self, activity: impl FnOnce(u64) -> Activity) {
        let mut state = self.table.0.borrow_mut();
        state.turn += 1;
        let turn = state.turn;
        let connection = state.connection(self.number);
        if connection.activity != Activity::Leaves {
            connection.activity = activity(turn);
        }
    }

    /// Whether it was asked to leave.
    pub fn is_leaving(&self) -> bool {
        self.table.0.borrow_mut().connection(self.number).activity == Activity::Leaves
    }

    /// Waits until it is asked to leave.
    pub async fn is_asked_to_leave(&self) {
        poll_fn(|cx| {
            let mut state = self.table.0.borrow_mut();
            let connection = state.connection(self.number);
            if connection.activity == Activity::Leaves {
                return Poll::Ready(());
            }
            match &mut connection.waker {
                Some(known) => known.clone_from(cx.waker()),
                unknown => *unknown = Some(cx.waker().clone()),
            }
            Poll::Pending
        })
        .await;
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.table.0.borrow_mut().remove(self.number);
    }
}

#[cfg(test)]
mod tests {
    use futures_lite::future::{block_on, poll_once};
    use proptest::prelude::*;

    use super::*;

    const LIMITS: Limits = Limits { all: 4, each: 2 };

    fn enter(table: &Rc<Table>, client: &str) -> Result<Entry, Full> {
        table.enter(Some(&client.into()), LIMITS)
    }

    #[test]
    fn a_client_has_its_share_and_a_peer_that_speaks_for_many_has_none() {
        let table = Rc::new(Table::default());
        let _two = [enter(&table, "a").unwrap(), enter(&table, "a").unwrap()];
        assert_eq!(enter(&table, "a").unwrap_err(), Full::Share);
        let other = enter(&table, "b").unwrap();
        let proxied = table.enter(None, LIMITS).unwrap();
        assert_eq!(table.enter(None, LIMITS).unwrap_err(), Full::All);
        assert_eq!(enter(&table, "c").unwrap_err(), Full::All);
        drop(other);
        let _more = enter(&table, "c").unwrap();
        drop(proxied);
        let _last = table.enter(None, LIMITS).unwrap();
        assert_eq!(table.0.borrow().clients.len(), 2, "who has no connection is forgotten");
    }

    #[test]
    fn the_longest_idle_connection_makes_room_then_the_longest_lingering_one() {
        let table = Rc::new(Table::default());
        let [a, b, c, d] = ["a", "b", "c", "d"].map(|client| enter(&table, client).unwrap());
        c.lingers();
        b.idles();
        a.idles();
        a.works();
        a.idles();
        let mut left = Vec::new();
        for _ in 0..3 {
            left.push(table.enter(None, LIMITS).unwrap());
            let leaving = [&a, &b, &c, &d].map(Entry::is_leaving);
            assert_eq!(leaving.iter().filter(|leaves| **leaves).count(), left.len());
            assert!(leaving[1] && !leaving[3] && (left.len() < 2 || leaving[0]), "{leaving:?}");
        }
        assert_eq!(table.enter(None, LIMITS).unwrap_err(), Full::All);
        d.idles();
        assert!(table.enter(None, LIMITS).is_ok());
    }

    #[test]
    fn a_client_over_its_share_takes_only_its_own_idle_connection() {
        let table = Rc::new(Table::default());
        let [other, own, busy] = ["b", "a", "a"].map(|client| enter(&table, client).unwrap());
        other.idles();
        assert_eq!(enter(&table, "a").unwrap_err(), Full::Share);
        own.idles();
        assert!(block_on(poll_once(own.is_asked_to_leave())).is_none());
        let _newcomer = enter(&table, "a").unwrap();
        assert_eq!([&other, &own, &busy].map(Entry::is_leaving), [false, true, false]);
        own.works();
        assert!(block_on(poll_once(own.is_asked_to_leave())).is_some(), "it stays asked");
        assert_eq!(enter(&table, "a").unwrap_err(), Full::Share);
        drop((own, busy));
        assert!(enter(&table, "a").is_ok());
    }

    #[test]
    fn no_more_leave_at_once_than_may() {
        let table = Rc::new(Table::default());
        let limits = Limits { all: 1000, each: 1000 };
        let all: Vec<Entry> = (0..1000).map(|_| table.enter(None, limits).unwrap()).collect();
        all.iter().for_each(Entry::idles);
        let newcomers: Vec<_> = (0..MAX_LEAVING).map(|_| table.enter(None, limits)).collect();
        assert!(newcomers.iter().all(Result::is_ok));
        assert_eq!(table.enter(None, limits).unwrap_err(), Full::All);
    }

    proptest! {
        #[test]
        fn the_counts_are_those_of_the_connections(steps in prop::collection::vec((0..5_u8, 0..4_usize, 0..8_usize), 1..200)) {
            let table = Rc::new(Table::default());
            let mut entries: Vec<(usize, Entry)> = Vec::new();
            for (step, client, which) in steps {
                let name: Rc<str> = format!("client {client}").into();
                let at = (!entries.is_empty()).then(|| which % entries.len().max(1));
                match (step, at) {
                    (0 | 1, _) => {
                        if let Ok(entry) = table.enter(Some(&name), LIMITS) {
                            entries.push((client, entry));
                        }
                    }
                    (2, Some(at)) => drop(entries.swap_remove(at)),
                    (3, Some(at)) => entries[at].1.idles(),
                    (4, Some(at)) => entries[at].1.works(),
                    _ => {}
                }
                let count = |client: Option<usize>| {
                    let counts = |(of, entry): &&(usize, Entry)| {
                        client.is_none_or(|client| *of == client) && !entry.is_leaving()
                    };
                    entries.iter().filter(counts).count()
                };
                prop_assert_eq!(table.0.borrow().open, count(None));
                prop_assert!(count(None) <= LIMITS.all);
                prop_assert!((0..4).all(|client| count(Some(client)) <= LIMITS.each));
            }
            drop(entries);
            let state = table.0.borrow();
            prop_assert_eq!((state.open, state.leaving, state.clients.len()), (0, 0, 0));
        }
    }
}
