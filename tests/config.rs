//! The configuration as a whole: files that load, files that are refused and with which words, the example.
//!
//! `fixtures/config/invalid/NAME.txt` is what is printed for `NAME.yaml`, to the letter. `UPDATE_GOLDEN=1` writes these
//! files anew; the diff is then to be read.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, UNIX_EPOCH};

use limitrate::config::{
    self, Budget, Config, CooldownScope, Day, DayReset, Fairness, Hosts, Mode, ModelLimit, Origins,
    Pace, Priority, RateLimit, Retry, Routing, Socket, TrustedProxies,
};
use proptest::prelude::*;

const FIXTURES: &str = "tests/fixtures/config";

/// What a file without further limits comes to.
const NO_BUDGET: Budget = Budget {
    window: None,
    window_margin: Duration::from_millis(500),
    day: None,
    tokens_per_minute: None,
    max_concurrent: None,
};

/// The environment of every test here. No fault may show what a variable holds.
fn env(name: &str) -> Option<String> {
    if name.ends_with("_API_KEY") || name.ends_with("_TOKEN") {
        return Some(format!("sk-secret-of-{name}"));
    }
    let value = match name {
        "KEY" => "sk-secret-of-the-environment",
        "ODD_KEY" => "sk: #secret-{}[]\"'$$${X}",
        "FROM_FILE" => "sk-secret\n",
        "EMPTY" => "",
        "RPM" => "120",
        "MINUS" => "-77",
        "SMALL" => "0.77",
        "DRAIN" => "true",
        "WORD" => "secret-word",
        _ => return None,
    };
    Some(value.to_owned())
}

fn parse(text: &str) -> Result<Config, config::Faults> {
    config::parse(text, Path::new("config.yaml"), &env)
}

fn load_valid(name: &str) -> Config {
    config::load(&Path::new(FIXTURES).join("valid").join(name), &env)
        .unwrap_or_else(|faults| panic!("{faults}"))
}

fn files(folder: &str, extension: &str) -> Vec<PathBuf> {
    let folder = Path::new(FIXTURES).join(folder);
    let paths = fs::read_dir(folder)
        .expect("the fixtures are there")
        .map(|entry| entry.expect("a readable folder").path());
    paths.filter(|path| path.extension().is_some_and(|found| found == extension)).collect()
}

#[test]
fn valid_files_load() {
    let files = files("valid", "yaml");
    assert!(files.len() >= 4, "{files:?}");
    for file in files {
        config::load(&file, &env).unwrap_or_else(|faults| panic!("{faults}"));
    }
}

#[test]
fn invalid_files_are_refused_in_these_words() {
    let found: BTreeMap<PathBuf, String> = files("invalid", "yaml")
        .into_iter()
        .map(|file| {
            let faults = config::load(&file, &env).expect_err(&file.display().to_string());
            let folder = format!("{FIXTURES}/invalid/");
            (file.with_extension("txt"), format!("{faults}\n").replace(&folder, ""))
        })
        .collect();
    assert_eq!(found.keys().cloned().collect::<Vec<_>>(), {
        let mut expected = files("invalid", "txt");
        expected.sort();
        expected
    });
    for (file, faults) in found {
        if std::env::var_os("UPDATE_GOLDEN").is_some() {
            fs::write(&file, &faults).unwrap();
        }
        assert_eq!(fs::read_to_string(&file).unwrap(), faults, "{}", file.display());
        for secret in ["secret", "-77", "0.77", "1234567890"] {
            assert!(!faults.contains(secret), "{} shows {secret}", file.display());
        }
    }
}

#[test]
fn a_file_that_cannot_be_read_is_named() {
    let missing = config::load(Path::new("no/such/config.yaml"), &env).unwrap_err().to_string();
    assert!(missing.starts_with("no/such/config.yaml: cannot be read: "), "{missing}");
    assert!(missing.contains("config.example.yaml") && missing.contains("--config"), "{missing}");
    let folder = config::load(Path::new("tests"), &env).unwrap_err().to_string();
    assert!(folder.starts_with("tests: cannot be read: "), "{folder}");
    let endless = config::load(Path::new("/dev/zero"), &env).unwrap_err().to_string();
    assert!(endless.contains("larger than 1 MiB"), "{endless}");
}

#[test]
fn a_clients_share_is_half_and_at_least_one() {
    for (keys, connections, bytes) in [
        ("max_connections: 1", 1, 128 << 20),
        ("max_connections: 7", 3, 128 << 20),
        ("max_body_bytes: 100, max_buffered_bytes: 300", 512, 150),
        ("max_body_bytes: 100, max_buffered_bytes: 150", 512, 100),
        ("max_buffered_bytes: 33554432", 512, 32 << 20),
        ("max_connections: 4, max_connections_per_client: 4", 4, 128 << 20),
    ] {
        let text = format!(
            "server: {{{keys}}}\nproviders: [{{name: p, base_url: 'http://x/v1', models: [m], \
             rate_limit: {{rpm: 1}}}}]"
        );
        let server = config::parse(&text, Path::new("test.yaml"), &|_| None).unwrap().server;
        let shares = (server.max_connections_per_client, server.max_buffered_bytes_per_client);
        assert_eq!(shares, (connections, bytes), "{keys}");
    }
}

#[test]
fn defaults() {
    let config = load_valid("minimal.yaml");
    let server = &config.server;
    assert_eq!((server.host.as_str(), server.port, &server.socket), ("0.0.0.0", Some(8080), &None));
    assert_eq!(server.auth_token, None);
    assert_eq!(server.tls, None);
    assert_eq!(
        (&server.trusted_proxies, &server.cors_origins, &server.hosts),
        (&TrustedProxies::default(), &Origins::Unset, &Hosts::default())
    );
    assert_eq!((server.max_body_bytes, server.max_head_bytes), (32 << 20, 32 << 10));
    assert_eq!((server.max_connections, server.max_connections_per_client), (1024, 512));
    assert_eq!(
        (server.max_buffered_bytes, server.max_buffered_bytes_per_client),
        (256 << 20, 128 << 20)
    );
    assert_eq!(server.header_timeout, Duration::from_secs(30));
    assert_eq!(server.body_timeout, Duration::from_secs(60));
    assert_eq!(server.keep_alive, Duration::from_secs(75));
    assert_eq!(server.write_timeout, Duration::from_secs(60));
    assert_eq!(server.drain, Duration::from_secs(30));
    assert!(!server.drain_queue);
    assert_eq!(
        (server.routing, server.fallback, server.fairness),
        (Routing::First, false, Fairness::Client)
    );
    assert!(server.clients.is_empty());
    assert_eq!(
        (server.heartbeat_after, server.heartbeat_json),
        (Some(Duration::from_secs(15)), false)
    );
    assert_eq!(server.state_file, None);

    let [provider] = config.providers.as_slice() else { panic!("{config:?}") };
    assert_eq!(provider.name, "a");
    assert_eq!((provider.base_url.host.as_str(), provider.base_url.port), ("::1", 11434));
    assert_eq!((provider.base_url.path.as_str(), provider.base_url.tls), ("", false));
    assert_eq!(provider.api_keys, []);
    assert!(provider.headers.is_empty());
    assert_eq!(provider.ca_pem, None);
    assert_eq!(provider.connect_timeout, Duration::from_secs(10));
    assert_eq!(provider.request_timeout, Duration::from_secs(600));
    assert_eq!(provider.idle_timeout, Duration::from_secs(300));
    assert_eq!((provider.max_queue, provider.pool_max_idle), (1000, 256));
    assert_eq!(provider.pool_idle, Duration::from_secs(50));

    let budget = NO_BUDGET;
    let pace =
        Pace { mode: Mode::Spaced, rpm: None, interval: Duration::from_millis(2500), capacity: 1 };
    let expected =
        RateLimit { pace, budget, max_wait: None, cooldown: CooldownScope::Auto, adaptive: false };
    assert_eq!(provider.rate_limit, expected);
    assert_eq!(provider.models[0].rate_limit, None);
    let statuses = vec![429, 500, 502, 503, 504, 529];
    assert_eq!(
        provider.retry,
        Retry { attempts: 5, statuses, max_cooldown: Duration::from_secs(300) }
    );
}

#[test]
fn every_key_arrives() {
    let config = load_valid("full.yaml");
    let server = &config.server;
    assert_eq!((server.host.as_str(), server.port), ("::1", Some(9090)));
    assert_eq!(
        server.socket,
        Some(Socket { path: Path::new(FIXTURES).join("valid/s.sock"), mode: 0o600 })
    );
    let tls = server.tls.as_ref().expect("a certificate with its key");
    assert!(
        tls.is_valid_at(UNIX_EPOCH + Duration::from_secs(2_000_000_000))
            && !tls.is_valid_at(UNIX_EPOCH),
        "{tls:?}"
    );
    assert_eq!(server.auth_token.as_ref().map(|token| token.reveal()), Some("a token"));
    let origins = ["https://chat.example.com", "http://localhost:3000", "app://obsidian.md"]
        .map(str::to_owned);
    assert_eq!(server.cors_origins, Origins::Listed(origins.to_vec()));
    assert_eq!(server.hosts.names(), ["gateway.example.com", "*.example.org"]);
    assert!(server.trusted_proxies.unix && server.trusted_proxies.networks.len() == 2);
    assert!(
        ["10.9.8.7", "::1"]
            .iter()
            .all(|address| server.trusted_proxies.contain(address.parse().unwrap()))
    );
    assert_eq!((server.max_body_bytes, server.max_head_bytes), (1000, 65536));
    assert_eq!((server.max_connections, server.max_connections_per_client), (10, 7));
    assert_eq!((server.max_buffered_bytes, server.max_buffered_bytes_per_client), (5000, 3000));
    assert_eq!(server.header_timeout, Duration::from_secs(1));
    assert_eq!(server.body_timeout, Duration::from_secs(2));
    assert_eq!(server.keep_alive, Duration::from_secs(3));
    assert_eq!(server.write_timeout, Duration::from_secs(4));
    assert_eq!(server.drain, Duration::ZERO);
    assert!(server.drain_queue);
    assert_eq!(
        (server.routing, server.fallback, server.fairness),
        (Routing::Earliest, true, Fairness::Fifo)
    );
    let client = |client: &config::Client| {
        (client.name.clone(), client.token.reveal().to_owned(), client.priority, client.max_queue)
    };
    let clients: Vec<_> = server.clients.iter().map(client).collect();
    let expected = [
        ("聊天".to_owned(), env("CHAT_TOKEN").unwrap(), Priority::High, Some(3)),
        ("script".to_owned(), "an own token".to_owned(), Priority::Normal, None),
        ("batch".to_owned(), "another token".to_owned(), Priority::Low, None),
    ];
    assert_eq!(clients, expected);
    assert_eq!(
        (server.heartbeat_after, server.heartbeat_json),
        (Some(Duration::from_millis(7500)), true)
    );
    assert_eq!(server.state_file, Some(Path::new(FIXTURES).join("valid/state.json")));

    let [first, second] = config.providers.as_slice() else { panic!("{config:?}") };
    assert_eq!(first.name, "月之暗面");
    assert_eq!((first.base_url.host.as_str(), first.base_url.port), ("api.example.com", 443));
    assert_eq!((first.base_url.path.as_str(), first.base_url.tls), ("/api/paas/v4", true));
    assert_eq!(first.api_keys.first().map(|key| key.reveal()), env("ODD_KEY").as_deref());
    let headers: Vec<_> =
        first.headers.iter().map(|(name, value)| (name.as_str(), value.reveal())).collect();
    assert_eq!(headers, [("x-api-key", "${literal} $5"), ("X-Empty", "")]);
    assert_eq!(first.ca_pem, Some(fs::read(format!("{FIXTURES}/valid/ca.pem")).unwrap()));
    let models: Vec<_> =
        first.models.iter().map(|model| (model.id.as_str(), model.upstream.as_str())).collect();
    let expected = [
        ("z-ai/glm-5.1", "z-ai/glm-5.1"),
        ("1.10", "1.10"),
        ("fast", "meta/llama-3.1-8b-instruct"),
        ("same", "same"),
    ];
    assert_eq!(models, expected);
    assert_eq!(first.connect_timeout, Duration::from_millis(250));
    assert_eq!(first.request_timeout, Duration::from_secs(5));
    assert_eq!(first.idle_timeout, Duration::from_secs(6));
    assert_eq!((first.max_queue, first.pool_max_idle), (7, 0));
    assert_eq!(first.pool_idle, Duration::from_secs(8));
    let keys: Vec<_> = second.api_keys.iter().map(|key| key.reveal()).collect();
    assert_eq!(keys, ["literal-1", "sk-secret-of-the-environment"]);

    assert_eq!(second.models[0].id, "llama3.2:3b");
    let budget = Budget {
        window: Some(120),
        window_margin: Duration::from_millis(750),
        day: Some(Day { max: 1000, reset: DayReset::At(Duration::from_secs(8 * 3600)) }),
        tokens_per_minute: Some(60_000),
        max_concurrent: Some(4),
    };
    let pace = Pace {
        mode: Mode::Burst,
        rpm: Some(120.0),
        interval: Duration::from_secs(1),
        capacity: 10,
    };
    let expected = RateLimit {
        pace,
        budget,
        max_wait: Some(Duration::ZERO),
        cooldown: CooldownScope::Model,
        adaptive: true,
    };
    assert_eq!(first.rate_limit, expected);
    assert_eq!(second.rate_limit, expected);
    assert_eq!(
        first.retry,
        Retry { attempts: 1, statuses: vec![429, 529], max_cooldown: Duration::from_millis(1500) }
    );
    assert_eq!(second.retry, Retry { attempts: 5, statuses: vec![], max_cooldown: Duration::ZERO });
}

/// The provider's limits and its models', in the order of the file.
#[test]
fn limits_of_every_kind_arrive() {
    let budget = NO_BUDGET;
    let config = load_valid("limits.yaml");
    let [window, strict, nothing] = config.providers.as_slice() else { panic!("{config:?}") };

    let pace = Pace {
        mode: Mode::Window,
        rpm: Some(40.9),
        interval: Duration::from_nanos(1_466_992_666),
        capacity: 40,
    };
    assert_eq!(window.rate_limit.pace, pace);
    assert_eq!(
        window.rate_limit.budget,
        Budget { window: Some(40), window_margin: Duration::ZERO, ..budget }
    );
    let models: Vec<_> = window.models.iter().map(|model| model.rate_limit).collect();
    let day = |max, minutes: u64| {
        Some(Day { max, reset: DayReset::At(Duration::from_secs(60 * minutes)) })
    };
    let expected = [
        None,
        None,
        Some(ModelLimit {
            pace: Some(Pace {
                mode: Mode::Spaced,
                rpm: Some(20.0),
                interval: Duration::from_secs(3),
                capacity: 1,
            }),
            budget: Budget { window: Some(20), ..budget },
        }),
        Some(ModelLimit {
            pace: Some(Pace {
                mode: Mode::Window,
                rpm: Some(1.0),
                interval: Duration::from_secs(60),
                capacity: 1,
            }),
            budget: Budget { window: Some(1), ..budget },
        }),
        Some(ModelLimit { pace: None, budget: Budget { day: day(50, 120), ..budget } }),
        Some(ModelLimit {
            pace: None,
            budget: Budget { tokens_per_minute: Some(6000), max_concurrent: Some(1), ..budget },
        }),
    ];
    assert_eq!(models, expected);

    assert_eq!(strict.rate_limit.budget.window, Some(60));
    assert_eq!(strict.rate_limit.budget.day, Some(Day { max: 200, reset: DayReset::Rolling }));
    assert_eq!(strict.rate_limit.pace.interval, Duration::from_secs(2));
    assert_eq!(strict.rate_limit.cooldown, CooldownScope::Provider);
    assert_eq!(nothing.rate_limit.budget, Budget { day: day(9, 0), ..budget });
}

#[test]
fn null_means_never_for_heartbeats_and_absent_elsewhere() {
    let server = load_valid("nulls.yaml").server;
    assert_eq!(
        (server.heartbeat_after, server.state_file, server.routing),
        (None, None, Routing::First)
    );
    assert!(server.clients.is_empty());
}

#[test]
fn debug_output_hides_secrets() {
    let debug = format!("{:?}", load_valid("full.yaml"));
    for secret in ["sk:", "secret", "a token", "own token", "another token", "literal"] {
        assert!(!debug.contains(secret), "{debug}");
    }
    assert!(debug.contains("***"), "{debug}");
}

#[test]
fn the_example_works_as_it_stands_and_needs_no_variable() {
    let config = config::load(Path::new("config.example.yaml"), &|_| None)
        .unwrap_or_else(|faults| panic!("{faults}"));
    let [ollama] = config.providers.as_slice() else { panic!("{config:?}") };
    assert_eq!((ollama.base_url.host.as_str(), ollama.base_url.port), ("localhost", 11434));
    assert_eq!(ollama.api_keys, []);
}

/// A `#` switches a setting off unless exactly one space follows; switched on, all of them together are a valid file.
#[test]
fn every_setting_of_the_example_can_be_switched_on() {
    let example = fs::read_to_string("config.example.yaml").unwrap();
    let switched_on = |line: &str| {
        let setting = line.trim_start().strip_prefix('#').unwrap_or("");
        let is_off = setting.starts_with("  ") || setting.starts_with(|first: char| first != ' ');
        if is_off { format!("{}\n", line.replacen('#', "", 1)) } else { format!("{line}\n") }
    };
    let text = example.lines().map(switched_on).collect::<String>().replace("my-ca.pem", "ca.pem");
    // One or the other.
    let text = text.replacen("    api_key: ${OLLAMA_API_KEY}\n", "", 1);
    let file = Path::new(FIXTURES).join("valid/config.yaml");
    let config = config::parse(&text, &file, &env).unwrap_or_else(|faults| panic!("{faults}"));

    let names: Vec<_> = config.providers.iter().map(|provider| provider.name.as_str()).collect();
    assert_eq!(names, ["ollama", "openai", "nvidia-nim", "deepseek", "moonshot", "anthropic"]);
    assert_eq!(config.providers[2].rate_limit.pace.interval, Duration::from_millis(1500));
    let pace = config.providers[1].rate_limit.pace;
    assert_eq!((pace.mode, pace.capacity), (Mode::Burst, 10));
    // The values shown are the defaults.
    let defaults = load_valid("minimal.yaml");
    let without_examples = config::Server {
        socket: None,
        tls: None,
        auth_token: None,
        trusted_proxies: TrustedProxies::default(),
        cors_origins: Origins::Unset,
        hosts: Hosts::default(),
        clients: Vec::new(),
        state_file: None,
        ..config.server.clone()
    };
    assert_eq!(format!("{without_examples:?}"), format!("{:?}", defaults.server));
    let clients: Vec<_> = config.server.clients.iter().map(|client| client.name.as_str()).collect();
    assert_eq!(clients, ["chat", "nightly"]);
    let (shown, default) = (&config.providers[0], &defaults.providers[0]);
    assert_eq!(shown.connect_timeout, default.connect_timeout);
    assert_eq!(shown.request_timeout, default.request_timeout);
    assert_eq!(shown.idle_timeout, default.idle_timeout);
    assert_eq!((shown.max_queue, shown.pool_max_idle), (default.max_queue, default.pool_max_idle));
    assert_eq!(shown.pool_idle, default.pool_idle);
    assert_eq!(shown.retry, default.retry);
    assert_eq!(shown.api_keys.len(), 2);
    assert_eq!(shown.rate_limit.budget.window_margin, default.rate_limit.budget.window_margin);
}

/// The line of a fault in each style of writing; `@` marks the faulty line.
#[test]
fn faults_are_placed_in_every_style() {
    for text in [
        "providers:\n- name: a\n  base_url: http://h\n  models: [m]\n  rate_limit:\n    rpm: 0 # @\n",
        "providers: [{name: a, base_url: http://h,\n models: [m], rate_limit: {mode: burst,\n rpm: 0}}] # @\n",
        "providers:\n- name: &n >-\n    a\n    b\n  # a comment\n  base_url: http://h\n  models: [m]\n  rate_limit: {rpm: 0} # @\n",
        "providers:\n- rate_limit: &r\n    rpm: 0 # @\n  name: a\n  base_url: http://h\n  models: [m]\n",
        "# ä\r\nproviders:\r\n- name: a\r\n  base_url: \"http://\\\r\n    h\"\r\n  models: [m]\r\n  rate_limit: # @\r\n    mode: burst\r\n",
        "providers:\n- base_url: http://h # @\n  models: [m]\n  rate_limit: {rpm: 1}\n",
        "providers:\n- name: a\n  base_url: http://h\n  models: [m]\n  rate_limit:\n    rpm: 1\n    ? rpn # @\n    : 2\n",
    ] {
        let expected = 1 + text.lines().position(|line| line.contains('@')).unwrap();
        let faults = parse(text).expect_err(text).to_string();
        assert!(faults.starts_with(&format!("config.yaml:{expected}:")), "{text}\n{faults}");
        assert_eq!(faults.lines().count(), 3, "{text}\n{faults}");
    }
}

#[test]
fn faults_look_as_the_readmes_show_them() {
    let before = "\n".repeat(8);
    let provider = "  - name: a\n    base_url: http://h\n    models: [m]\n";
    let text = format!(
        "{before}providers:\n{provider}\n    rate_limit:\n      rpm: 40\n      max_wait_second: 60\n"
    );
    let shown = parse(&text).unwrap_err().to_string();
    for name in ["README.md", "docs/README.zh-CN.md"] {
        assert!(
            fs::read_to_string(name).unwrap().contains(&format!("```text\n{shown}\n```")),
            "{name}\n{shown}"
        );
    }
}

/// Pieces that make up a file, so that random texts get past the parser often enough to matter.
fn yaml_like() -> impl Strategy<Value = String> {
    let piece = prop_oneof![
        prop::sample::select(vec![
            "server:",
            "providers:",
            "name:",
            "base_url:",
            "api_key:",
            "api_keys:",
            "clients:",
            "token:",
            "state_file:",
            "headers:",
            "models:",
            "rate_limit:",
            "rpm:",
            "mode:",
            "capacity:",
            "strict_window:",
            "rpd:",
            "day_resets_at:",
            "07:30",
            "retry:",
            "statuses:",
            "port:",
            "http://h",
            "- ",
            "  ",
            "\n",
            "\n  ",
            "\n    ",
            "\n  - ",
            "{",
            "}",
            "[",
            "]",
            ", ",
            ": ",
            "&a ",
            "*a",
            "|\n",
            ">\n",
            "${",
            "}",
            "$$",
            "${KEY}",
            "\"",
            "'",
            "#",
            "~",
            "-1",
            "1e400",
            ".nan",
            "0x7f",
            "true",
            "!t ",
            "!!int ",
            "---\n",
            "\t",
            "<<: ",
        ])
        .prop_map(str::to_owned),
        any::<char>().prop_map(String::from),
    ];
    prop::collection::vec(piece, 0..40).prop_map(|pieces| pieces.concat())
}

proptest! {
    #[test]
    fn no_text_panics(text in any::<String>()) {
        prop_assert!(parse(&text).is_err());
    }

    #[test]
    fn no_yaml_panics(text in yaml_like()) {
        if let Err(faults) = parse(&text) {
            prop_assert!(faults.to_string().starts_with("config.yaml:"));
        }
    }

    /// One piece of a good file replaced: refused with words, or still good; never a panic.
    #[test]
    fn no_damage_panics(at in any::<prop::sample::Index>(), length in 0_usize..20, with in yaml_like()) {
        let mut text: Vec<char> = fs::read_to_string(format!("{FIXTURES}/valid/full.yaml")).unwrap().chars().collect();
        let at = at.index(text.len());
        let end = (at + length).min(text.len());
        text.splice(at..end, with.chars());
        let text: String = text.into_iter().collect();
        if let Err(faults) = config::parse(&text, Path::new("tests/fixtures/config/valid/full.yaml"), &env) {
            prop_assert!(!faults.to_string().is_empty());
        }
    }

    /// No number gets as far as a `Duration` that panics, or comes out as zero.
    #[test]
    fn times_and_rates_of_any_size_are_safe(rpm in any::<f64>(), seconds in any::<f64>()) {
        let text = format!(
            "server: {{header_timeout_seconds: {seconds:e}}}\nproviders:\n  - name: a\n    base_url: http://h\n    models: [m]\n    \
             rate_limit: {{rpm: \"{rpm:e}\", max_wait_seconds: \"{seconds:e}\"}}\n",
        );
        match parse(&text) {
            Ok(config) => {
                prop_assert!(!config.server.header_timeout.is_zero());
                prop_assert!(!config.providers[0].rate_limit.pace.interval.is_zero());
            }
            Err(faults) => prop_assert!(faults.to_string().starts_with("config.yaml:")),
        }
    }
}
