//! From the start of the program to its first answer, and how large the program is.

use std::fs;
use std::io;

use crate::Bench;
use crate::contestant::Recipe;
use crate::table::Goal;

const STARTS: usize = 7;

pub fn startup(bench: &mut Bench) -> io::Result<()> {
    for round in 0..STARTS {
        for contestant in
            bench.start("startup", |entry| entry.is_process() && entry.is_started_here())
        {
            let Some(took) = contestant.took_to_start() else { continue };
            let figure = "from the start to the first answer, ms";
            bench.table.note(
                figure,
                1,
                Goal::AtMost(10.0),
                &contestant.name,
                round,
                took as f64 / 1e6,
            );
        }
    }
    for entry in &bench.entries {
        let Recipe::Gateway { program, logs: false } = &entry.recipe else { continue };
        match fs::metadata(program) {
            Ok(about) => {
                let size = about.len() as f64 / 1024.0 / 1024.0;
                bench.table.note(
                    "program, MiB (OpenSSL built in)",
                    2,
                    Goal::AtMost(6.0),
                    &entry.name,
                    0,
                    size,
                );
            }
            Err(error) => bench.table.remarks.push(format!("startup: {}: {error}", entry.name)),
        }
    }
    Ok(())
}
