//! The command line of the built binary: what it prints where, and its exit codes.

mod support;

use std::fs;
use std::net::TcpListener;
use std::process::Output;

use support::{Process, UNSHAPED, provider_at};

fn providers() -> String {
    provider_at("the-provider", "http://127.0.0.1:1/v1", &["m"], UNSHAPED, "api_key: sk-secret")
}

/// Exit code, standard output, standard error.
fn outcome(output: &Output) -> (Option<i32>, String, String) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code(), text(&output.stdout), text(&output.stderr))
}

#[test]
fn version_and_help_go_to_standard_output() {
    for option in ["--version", "-V"] {
        let version = format!("limitrate {}\n", env!("CARGO_PKG_VERSION"));
        assert_eq!(outcome(&Process::run(&[option])), (Some(0), version, String::new()));
    }
    for arguments in [&["--help"][..], &["check", "--help"], &["demo", "--help"]] {
        let (code, out, err) = outcome(&Process::run(arguments));
        assert_eq!((code, err.as_str()), (Some(0), ""), "{arguments:?}");
        assert!(out.contains("Usage: limitrate"), "{out}");
    }
    let (_, out, _) = outcome(&Process::run(&["--help"]));
    for word in ["--config", "--version", "check", "demo"] {
        assert!(out.contains(word), "no {word} in {out}");
    }
}

#[test]
fn a_wrong_command_line_exits_with_2() {
    for arguments in [&["--nonsense"][..], &["nonsense"], &["--config"], &["demo", "--port", "x"]] {
        let (code, out, err) = outcome(&Process::run(arguments));
        assert_eq!((code, out.as_str()), (Some(2), ""), "{arguments:?}");
        assert!(!err.is_empty());
    }
}

#[test]
fn a_missing_configuration_exits_with_2_and_says_what_to_do() {
    let folder = Process::file("unrelated", "").parent().expect("a file is in a folder").to_owned();
    for arguments in [&[][..], &["check"]] {
        let (code, out, err) = outcome(&Process::run_in(&folder, arguments));
        assert_eq!((code, out.as_str()), (Some(2), ""), "{arguments:?}");
        for word in ["config.yaml", "config.example.yaml", "--config", "demo"] {
            assert!(err.contains(word), "no {word} in {err}");
        }
    }
    for arguments in [&["--config", "nowhere.yaml"][..], &["check", "--config", "nowhere.yaml"]] {
        let (code, out, err) = outcome(&Process::run_in(&folder, arguments));
        assert_eq!((code, out.as_str()), (Some(2), ""), "{arguments:?}");
        assert!(err.contains("nowhere.yaml"), "{err}");
    }
}

#[test]
fn a_faulty_configuration_exits_with_2_and_names_file_line_and_key() {
    let file = Process::config("prot: 1\n", &providers());
    let file = file.to_str().expect("the build directory is UTF-8");
    for arguments in [&["--config", file][..], &["check", "--config", file], &["-c", file, "check"]] {
        let (code, out, err) = outcome(&Process::run(arguments));
        assert_eq!((code, out.as_str()), (Some(2), ""), "{arguments:?}");
        for word in ["config.yaml", "4", "prot", "port"] {
            assert!(err.contains(word), "no {word} in {err}");
        }
    }
}

#[test]
fn check_explains_a_good_configuration_and_shows_no_key() {
    let file = Process::config("", &providers());
    let folder = file.parent().expect("a file is in a folder");
    let named = ["check", "--config", file.to_str().expect("the build directory is UTF-8")];
    for arguments in [&named[..], &["check"]] {
        let (code, out, err) = outcome(&Process::run_in(folder, arguments));
        assert_eq!((code, err.as_str()), (Some(0), ""), "{arguments:?}");
        for word in ["the-provider", "http://127.0.0.1:1/v1", "burst", "worst case"] {
            assert!(out.contains(word), "no {word} in {out}");
        }
        assert!(!out.contains("sk-secret"), "{out}");
    }
}

#[test]
fn a_port_that_is_taken_exits_with_1_and_says_whose_turn_it_is() {
    let taken = TcpListener::bind("127.0.0.1:0").expect("bind a loopback port");
    let port = taken.local_addr().expect("the address of a bound listener").port();
    let text = format!("server: {{host: 127.0.0.1, port: {port}}}\nproviders:\n{}", providers());
    let file = Process::file("config.yaml", &text);
    let (code, out, err) = outcome(&Process::run(&["-c", file.to_str().expect("the build directory is UTF-8")]));
    assert_eq!((code, out.as_str()), (Some(1), ""));
    for word in [&port.to_string(), "127.0.0.1", "taken", "server.port"] {
        assert!(err.contains(word), "no {word} in {err}");
    }
    fs::remove_file(file).expect("nobody holds the file");
}
