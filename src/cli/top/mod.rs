//! `limitrate top`: a gateway's lines and latest requests, live in a terminal.
//!
//! Owns the asking and the terminal; what is on the screen is `screen`'s. Into a pipe or file it writes one screen and ends.

mod screen;

use std::io::{IsTerminal, Write};
use std::process::ExitCode;
use std::time::Duration;

use async_io::Timer;
use async_signal::{Signal, Signals};
use futures_lite::{StreamExt, future};
use rustix::termios::tcgetwinsize;

use super::ask::{Problem, Target};
use crate::log;
use screen::{Live, Screen};

/// Between two looks.
const EVERY: Duration = Duration::from_secs(1);

/// A gateway with a thousand models and keys says no more than that.
const PAGE_LIMIT_BYTES: usize = 8 << 20;

/// Where there is no terminal to ask.
const SIZE: Screen = Screen { columns: 160, rows: usize::MAX, colour: false };

/// The other screen, on which nothing of the shell is; without cursor, and back.
const ENTER: &str = "\x1b[?1049h\x1b[?25l";
const LEAVE: &str = "\x1b[?25h\x1b[?1049l";

/// Shows until it is interrupted. Fails where the first look does: there is nothing to show.
pub fn run(place: &Target) -> ExitCode {
    let first = match smol::block_on(look(place)) {
        Ok(live) => live,
        Err(problem) => {
            log::error(format_args!("{}: {}", place.url(), words(problem)));
            return ExitCode::from(1);
        }
    };
    let mut out = std::io::stdout();
    if !out.is_terminal() {
        let _ = out.write_all(screen::draw(&place.url(), Ok(&first), SIZE).as_bytes());
        return ExitCode::SUCCESS;
    }
    match smol::block_on(show(place, first)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            log::error(format_args!("the terminal can't be written to: {error}"));
            ExitCode::from(1)
        }
    }
}

async fn show(place: &Target, mut live: Live) -> std::io::Result<()> {
    let mut signals =
        Signals::new([Signal::Int, Signal::Term, Signal::Hup, Signal::Quit, Signal::Tstp])?;
    let mut out = std::io::stdout();
    out.write_all(ENTER.as_bytes())?;
    let _restored = OtherScreen;
    let mut problem = None;
    let colour = std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    loop {
        let size = tcgetwinsize(&out)?;
        // A serial line does not know its size.
        let or = |cells: u16, usual| if cells == 0 { usual } else { usize::from(cells) };
        let size = Screen { columns: or(size.ws_col, 80), rows: or(size.ws_row, 24), colour };
        let text = screen::draw(
            &place.url(),
            problem.as_deref().map_or(Ok(&live), |problem| Err((problem, &live))),
            size,
        );
        // From the top, each line to its end, and nothing below the last one: no flicker, as nothing is cleared first.
        let text = text.replace('\n', "\x1b[K\r\n");
        out.write_all(format!("\x1b[H{text}\x1b[J").as_bytes())?;
        out.flush()?;
        let next = async {
            Timer::after(EVERY).await;
            Some(look(place).await)
        };
        let stopped = async {
            signals.next().await;
            None
        };
        match future::or(next, stopped).await {
            Some(Ok(seen)) => (live, problem) = (seen, None),
            Some(Err(why)) => problem = Some(words(why)),
            None => return Ok(()),
        }
    }
}

/// Gives the terminal back as it was, however this ends.
struct OtherScreen;

impl Drop for OtherScreen {
    fn drop(&mut self) {
        let mut out = std::io::stdout();
        let _ = out.write_all(LEAVE.as_bytes()).and_then(|()| out.flush());
    }
}

async fn look(place: &Target) -> Result<Live, Problem> {
    Ok(Live {
        stats: place.page("/admin/stats", PAGE_LIMIT_BYTES).await?,
        queue: place.page("/admin/queue?limit=20", PAGE_LIMIT_BYTES).await?,
        requests: place.page("/admin/requests?limit=50", PAGE_LIMIT_BYTES).await?,
    })
}

fn words(problem: Problem) -> String {
    match problem {
        Problem::Locked => {
            "it wants a token: put it into the variable LIMITRATE_TOKEN, or name its file with -c"
                .into()
        }
        Problem::Other(words) => words,
    }
}
