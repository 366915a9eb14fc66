//! Runs the command line and turns its outcome into an exit code.

use std::process::ExitCode;

fn main() -> ExitCode {
    limitrate::cli::run(std::env::args().collect())
}
