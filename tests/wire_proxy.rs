//! Providers behind an HTTP proxy: who goes by it, what it is told, and what its refusals become.

mod support;

use std::fs;
use std::time::Instant;

use rustix::process::Signal;
use support::{
    ClosedPort, Gateway, Manner, PATIENCE, Process, Proxy, Reply, UNSHAPED, Upstream, get, post,
    provider_at, provider_yaml,
};

const CHAT: &str = "/v1/chat/completions";
const BODY: &str = r#"{"model":"m","messages":[]}"#;
/// `user:pass word` (RFC 7617).
const CREDENTIAL: &str = "Basic dXNlcjpwYXNzIHdvcmQ=";

fn by(proxy: &Proxy, user: &str, upstream: &Upstream) -> Gateway {
    let line = format!("proxy: http://{user}{}", proxy.addr());
    Gateway::start(&provider_yaml("p", upstream.addr(), &["m"], UNSHAPED, &line))
}

#[test]
fn a_provider_is_reached_by_its_proxy_and_the_way_is_used_again() {
    let (proxy, upstream) =
        (Proxy::start(Manner::Tunnels), Upstream::answering(|_, _| Reply::ok()));
    let gateway = by(&proxy, "", &upstream);
    for _ in 0..3 {
        assert_eq!(post(gateway.addr(), CHAT, BODY).status, 200);
    }
    let target = upstream.addr();
    assert_eq!(proxy.heads(), [format!("CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n\r\n")]);
    let requests = upstream.requests();
    assert_eq!(requests.len(), 3);
    assert!(requests.iter().all(|request| request.header("proxy-authorization").is_none()));
}

#[test]
fn a_proxy_that_wants_a_password_gets_it_and_nobody_else_does() {
    let (proxy, upstream) =
        (Proxy::start(Manner::Wants(CREDENTIAL)), Upstream::answering(|_, _| Reply::ok()));
    let gateway = by(&proxy, "user:pass%20word@", &upstream);
    assert_eq!(post(gateway.addr(), CHAT, BODY).status, 200);
    let pages = ["/admin/stats", "/admin/queue", "/admin/requests", "/metrics"]
        .map(|page| get(gateway.addr(), page).text());
    for page in pages {
        assert!(
            !page.contains("pass word")
                && !page.contains("dXNlcj")
                && !page.contains("pass%20word"),
            "{page}"
        );
    }
    for (user, wants) in [
        ("", "wants a user name and password"),
        ("user:wrong@", "wants another user name or password"),
    ] {
        let gateway = by(&proxy, user, &upstream);
        let refused = post(gateway.addr(), CHAT, BODY);
        let message = refused.error()["message"].as_str().expect("a text").to_owned();
        assert_eq!((refused.status, refused.code().as_str()), (502, "upstream_unreachable"));
        assert!(
            message.contains(wants) && message.contains(&proxy.addr().to_string()),
            "{message}"
        );
        assert!(!message.contains("wrong"), "{message}");
    }
    assert_eq!(upstream.requests().len(), 1);
}

#[test]
fn what_a_proxy_refuses_is_told_with_its_name() {
    let upstream = Upstream::start([Reply::ok()]);
    for (manner, words) in [
        (Manner::Says("HTTP/1.1 403 Forbidden\r\nContent-Length: 3\r\n\r\nno!"), "with status 403"),
        (Manner::Says("HTTP/1.1 502 Bad Gateway\r\n\r\n"), "with status 502"),
        (Manner::Says("HTTP/1.1 200 OK\r\n\r\nhello"), "sent something before it was asked"),
        (Manner::Says("SSH-2.0-OpenSSH_9.2\r\n"), "did not answer: not an HTTP/1.x response"),
        (Manner::Says(""), "did not answer: the connection was closed"),
    ] {
        let proxy = Proxy::start(manner);
        let refused = post(by(&proxy, "", &upstream).addr(), CHAT, BODY);
        let message = refused.error()["message"].as_str().expect("a text").to_owned();
        assert_eq!(
            (refused.status, refused.code().as_str()),
            (502, "upstream_unreachable"),
            "{manner:?}"
        );
        assert!(
            message.contains(words) && message.contains(&format!("the proxy {}", proxy.addr())),
            "{message}"
        );
    }
    let nobody = ClosedPort::new();
    let line = format!("proxy: http://{}", nobody.addr());
    let gateway = Gateway::start(&provider_yaml("p", upstream.addr(), &["m"], UNSHAPED, &line));
    let message =
        post(gateway.addr(), CHAT, BODY).error()["message"].as_str().expect("a text").to_owned();
    assert!(
        message.contains(&format!("cannot connect to the proxy {}", nobody.addr())),
        "{message}"
    );
    assert_eq!(upstream.requests().len(), 0, "nobody goes past the proxy");
}

#[test]
fn a_proxy_that_never_answers_takes_no_longer_than_a_connection_may() {
    let (proxy, upstream) = (Proxy::start(Manner::Stalls), Upstream::start([Reply::ok()]));
    let lines = format!("proxy: http://{}\nconnect_timeout_seconds: 0.2", proxy.addr());
    let gateway = Gateway::start(&provider_yaml("p", upstream.addr(), &["m"], UNSHAPED, &lines));
    let start = Instant::now();
    let refused = post(gateway.addr(), CHAT, BODY);
    let message = refused.error()["message"].as_str().expect("a text").to_owned();
    assert!(message.contains(&format!("by the proxy {} within 0.2 s", proxy.addr())), "{message}");
    assert!(start.elapsed() < PATIENCE);
}

#[test]
fn the_environment_names_a_proxy_and_the_file_has_the_last_word() {
    let (proxy, upstream) =
        (Proxy::start(Manner::Tunnels), Upstream::answering(|_, _| Reply::ok()));
    // No name resolver knows it: only a proxy could.
    let named = provider_at("p", "https://provider.invalid/v1", &["m"], UNSHAPED, "");
    let url = format!("http://{}", proxy.addr());
    let gateway = Gateway::start_with("", &named, &[("HTTPS_PROXY", &url)]);
    drop(post(gateway.addr(), CHAT, BODY));
    assert!(proxy.heads()[0].starts_with("CONNECT provider.invalid:443 HTTP/1.1\r\n"));

    for (extra, env) in [
        ("", ("NO_PROXY", "provider.invalid")),
        ("proxy: none", ("x", "")),
        ("proxy: null", ("x", "")),
    ] {
        let named = provider_at("p", "https://provider.invalid/v1", &["m"], UNSHAPED, extra);
        let gateway = Gateway::start_with("", &named, &[("HTTPS_PROXY", &url), env]);
        assert_eq!(post(gateway.addr(), CHAT, BODY).status, 502, "{extra} {env:?}");
    }
    let here = Gateway::start_with(
        "",
        &provider_yaml("p", upstream.addr(), &["m"], UNSHAPED, ""),
        &[("HTTPS_PROXY", &url)],
    );
    assert_eq!(post(here.addr(), CHAT, BODY).status, 200);
    assert_eq!(
        proxy.heads(),
        Vec::<String>::new(),
        "neither for those exempt nor for this machine"
    );
}

#[test]
fn a_reload_changes_the_way() {
    let (proxy, upstream) =
        (Proxy::start(Manner::Tunnels), Upstream::answering(|_, _| Reply::ok()));
    let text = |line: &str| {
        let provider = provider_yaml("p", upstream.addr(), &["m"], UNSHAPED, line);
        format!("server: {{host: 127.0.0.1, port: 0}}\nproviders:\n{provider}")
    };
    let file = Process::file("config.yaml", &text(""));
    let process = Process::serve(&file);
    assert_eq!(post(process.addr(), CHAT, BODY).status, 200);
    assert_eq!(proxy.heads().len(), 0);
    fs::write(&file, text(&format!("proxy: http://user:very-secret@{}", proxy.addr())))
        .expect("write");
    process.signal(Signal::HUP);
    let said = process.wait_log("reloaded");
    assert!(said.contains("p is changed") && !said.contains("very-secret"), "{said}");
    assert_eq!(post(process.addr(), CHAT, BODY).status, 200);
    assert_eq!(proxy.heads().len(), 1, "the connection past it is not used any more");
}

#[test]
fn check_tells_the_way_without_the_password() {
    let providers = provider_at("p", "https://api.example.com/v1", &["m"], UNSHAPED, "");
    let file = Process::config("", &providers);
    let check = |variable: &str, url: &str| {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_limitrate"));
        let output = command
            .args(["check", "--config"])
            .arg(&file)
            .env(variable, url)
            .output()
            .expect("it runs");
        (
            output.status.code(),
            String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned(),
        )
    };
    let (code, said) = check("HTTPS_PROXY", "http://user:very-secret@proxy.lan:3128");
    assert_eq!(code, Some(0), "{said}");
    assert!(
        said.contains("proxy      http://proxy.lan:3128, with a user name, as HTTPS_PROXY says"),
        "{said}"
    );
    assert!(!said.contains("very-secret"), "{said}");
    let (code, said) = check("HTTPS_PROXY", "socks5://very-secret@proxy.lan:3128");
    assert_eq!(code, Some(2), "{said}");
    assert!(
        said.contains("HTTPS_PROXY")
            && said.contains("proxy: none")
            && !said.contains("very-secret"),
        "{said}"
    );
}
