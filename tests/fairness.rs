//! Who of several clients goes next, and what `/admin/queue` shows of them.

mod support;

use std::net::Ipv4Addr;
use std::time::{SystemTime, UNIX_EPOCH};

use support::{
    Client, Gateway, Line, PATIENCE, Reply, Upstream, get, post_with, provider_yaml, spaced,
};

const CHAT: &str = "/v1/chat/completions";

const CLIENTS: &str = "clients:
- {name: script, token: script-token}
- {name: chat, token: chat-token}
- {name: boss, token: boss-token, priority: high}
- {name: batch, token: batch-token, priority: low, max_queue: 2}";

const SCRIPT: &str = "Authorization: Bearer script-token\r\n";
const CHAT_WINDOW: &str = "x-api-key: chat-token\r\n";
const BOSS: &str = "Authorization: Bearer boss-token\r\n";
const BATCH: &str = "Authorization: Bearer batch-token\r\n";

fn line(more: &str) -> Line {
    Line::start(&format!("{CLIENTS}\n{more}"), "")
}

fn ask_all(line: &Line, headers: &str, tags: &[&str]) -> Vec<Client> {
    tags.iter().map(|tag| line.ask(headers, tag)).collect()
}

fn priority(headers: &str, priority: &str) -> String {
    format!("{headers}X-Limitrate-Priority: {priority}\r\n")
}

#[test]
fn one_request_goes_next_but_one_however_many_another_client_has_in_line() {
    let line = line("");
    let tags: Vec<String> = (1..=20).map(|n| format!("s{n}")).collect();
    let _script: Vec<Client> = tags.iter().map(|tag| line.ask(SCRIPT, tag)).collect();
    let _chat = line.ask(CHAT_WINDOW, "chat");
    let order = line.order();
    assert!(order.starts_with("s1 chat s2 s3 "), "{order}");
    assert!(order.ends_with(" s19 s20"), "within a client, first come, first served: {order}");
}

#[test]
fn clients_with_several_requests_take_turns() {
    let line = line("");
    let _script = ask_all(&line, SCRIPT, &["s1", "s2", "s3"]);
    let _chat = ask_all(&line, CHAT_WINDOW, &["c1", "c2"]);
    let _anybody = ask_all(&line, "", &["a1", "a2"]);
    assert_eq!(line.order(), "s1 c1 a1 s2 c2 a2 s3");
}

#[test]
fn without_a_token_the_address_tells_clients_apart() {
    let line = line("");
    let from = |host: u8, tag: &str| {
        let address = Ipv4Addr::new(127, 0, 0, host);
        line.join(Client::connect_from(address, line.gateway.addr()), "", tag)
    };
    let _callers = [from(1, "a1"), from(1, "a2"), from(2, "b1"), from(2, "b2"), from(3, "c1")];
    let clients: Vec<_> =
        line.gateway.queue().into_iter().map(|row| row["client"].clone()).collect();
    assert_eq!(clients, ["127.0.0.1", "127.0.0.2", "127.0.0.3", "127.0.0.1", "127.0.0.2"]);
    assert_eq!(line.order(), "a1 b1 c1 a2 b2");
}

#[test]
fn a_token_is_the_same_client_from_every_address() {
    let line = line("");
    let from = |host: u8, tag: &str| {
        let address = Ipv4Addr::new(127, 0, 0, host);
        line.join(Client::connect_from(address, line.gateway.addr()), SCRIPT, tag)
    };
    let _callers = [from(1, "s1"), from(2, "s2"), from(3, "s3"), line.ask(CHAT_WINDOW, "chat")];
    assert_eq!(line.order(), "s1 chat s2 s3");
}

#[test]
fn fifo_knows_no_clients() {
    let line = line("fairness: fifo");
    let _script = ask_all(&line, SCRIPT, &["s1", "s2", "s3"]);
    let _chat = line.ask(CHAT_WINDOW, "chat");
    assert_eq!(line.order(), "s1 s2 s3 chat");
}

#[test]
fn a_requests_priority_counts_among_those_of_its_own_client_alone() {
    for fairness in ["client", "fifo"] {
        let line = line(&format!("fairness: {fairness}"));
        let _chat = line.ask(CHAT_WINDOW, "c1");
        let _script = [
            line.ask(&priority(SCRIPT, "low"), "low"),
            line.ask(SCRIPT, "normal"),
            line.ask(&priority(SCRIPT, "High"), "high"),
            line.ask(&priority(SCRIPT, "high"), "high2"),
        ];
        let _again = line.ask(CHAT_WINDOW, "c2");
        let want = match fairness {
            "client" => "c1 high c2 high2 normal low",
            _ => "c1 high high2 normal low c2",
        };
        assert_eq!(line.order(), want, "{fairness}");
    }
}

#[test]
fn a_client_that_is_configured_to_goes_before_all_others_or_after_them() {
    let line = line("");
    let _batch = line.ask(&priority(BATCH, "high"), "batch");
    let _script = ask_all(&line, SCRIPT, &["s1", "s2"]);
    let _chat = line.ask(&priority(CHAT_WINDOW, "high"), "chat");
    let _boss = ask_all(&line, BOSS, &["boss1", "boss2"]);
    assert_eq!(line.order(), "boss1 boss2 s1 chat s2 batch");
}

#[test]
fn who_hangs_up_lets_its_own_client_move_up_and_nobody_else_notices() {
    for (leaver, left) in [(0, "s2 c1 c2"), (1, "s1 c1 c2"), (2, "s1 c2 s2"), (3, "s1 c1 s2")] {
        let line = line("");
        let mut callers = ask_all(&line, SCRIPT, &["s1", "s2"]);
        callers.extend(ask_all(&line, CHAT_WINDOW, &["c1", "c2"]));
        line.leave(callers.remove(leaver));
        assert_eq!(line.order(), left, "number {leaver} left");
        assert_eq!(line.gateway.stats()["providers"][0]["cancelled_in_queue"], 1);
    }
}

#[test]
fn a_clients_max_queue_refuses_its_own_requests_and_nobody_elses() {
    let line = line("");
    let batch = ask_all(&line, BATCH, &["b1", "b2"]);
    let refused = post_with(line.gateway.addr(), CHAT, BATCH, r#"{"model":"m"}"#);
    assert_eq!((refused.status, refused.code().as_str()), (503, "client_queue_full"));
    assert!(refused.header("retry-after").is_some_and(|seconds| seconds != "0"), "{refused:?}");
    let message = refused.error()["message"].as_str().unwrap_or_default().to_owned();
    for part in ["2 requests", "`batch`", "`p`", "max_queue"] {
        assert!(message.contains(part), "no {part:?} in {message:?}");
    }
    let _chat = line.ask(CHAT_WINDOW, "chat");
    assert_eq!(line.gateway.stats()["providers"][0]["rejected_full"], 1);
    // Room again.
    let mut batch = batch.into_iter();
    line.leave(batch.next().expect("two wait"));
    let _third = line.ask(BATCH, "b3");
    assert_eq!(line.order(), "chat b2 b3");
}

#[test]
fn a_header_of_ours_with_a_value_that_it_cant_have_is_refused() {
    let line = line("");
    for (header, values) in [
        ("X-Limitrate-Priority", &["urgent", "", "1"][..]),
        ("X-Limitrate-Deadline-Ms", &["soon", "", "-1", "1.5", "+1", "1s"]),
        ("X-Limitrate-Heartbeat", &["no", "", "0"]),
    ] {
        for value in values {
            let headers = format!("{header}: {value}\r\n");
            let refused = post_with(line.gateway.addr(), CHAT, &headers, r#"{"model":"m"}"#);
            assert_eq!(
                (refused.status, refused.code().as_str()),
                (400, "invalid_header"),
                "{headers}"
            );
            let message = refused.error()["message"].as_str().unwrap_or_default().to_owned();
            assert!(
                message.contains(header) && message.contains(&format!("`{value}`")),
                "{message}"
            );
        }
    }
    assert_eq!(line.queued(), 0);
}

#[test]
fn what_is_said_to_the_gateway_goes_no_further() {
    let line = line("");
    let said = "X-Limitrate-Priority: LOW\r\nx-limitrate-deadline-ms: 600000\r\nX-Limitrate-Heartbeat: Off\r\n";
    let _caller = line.ask(&format!("{SCRIPT}{said}"), "a");
    assert_eq!(line.order(), "a");
    let sent = format!("{:?}", line.upstream.requests()).to_lowercase();
    assert!(!sent.contains("limitrate") && !sent.contains("script-token"), "{sent}");
}

#[test]
fn the_queue_page_shows_who_waits_since_when_and_for_how_long_and_no_body() {
    let upstream = Upstream::start([Reply::ok()]);
    let entries = [
        provider_yaml("p", upstream.addr(), &["m", "n"], &spaced(30_000), ""),
        provider_yaml("q", upstream.addr(), &["x"], &spaced(60_000), ""),
    ];
    let gateway = Gateway::start_with(CLIENTS, &entries.concat(), &[]);
    assert_eq!(gateway.queue(), Vec::<serde_json::Value>::new());
    let now = || SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_secs_f64();
    let before = now();
    let ask = |headers: &str, model: &str| {
        let mut client = Client::connect(gateway.addr());
        client.post_json_with(
            CHAT,
            headers,
            format!(r#"{{"model":"{model}","messages":"a secret"}}"#),
        );
        client
    };
    let mut callers = vec![ask("", "m"), ask("", "x")];
    upstream.wait_requests(2, PATIENCE);
    callers.push(ask(SCRIPT, "m"));
    gateway.wait_queued(1);
    callers.push(ask(&priority(CHAT_WINDOW, "high"), "n"));
    gateway.wait_queued(2);
    callers.push(ask("", "x"));
    gateway.wait_stats_of(1, |stats| stats["queued_ahead"] == 1, PATIENCE);

    let page = get(gateway.addr(), "/admin/queue");
    assert_eq!(page.header("cache-control").as_deref(), Some("no-store"));
    assert!(!page.text().contains("secret") && !page.text().contains("token"), "{page:?}");
    let rows = gateway.queue();
    let fixed = |row: &serde_json::Value| {
        ["provider", "client", "model", "priority"]
            .map(|key| row[key].as_str().unwrap_or_default().to_owned())
    };
    let want = [
        ["p", "script", "m", "normal"],
        ["p", "chat", "n", "high"],
        ["q", "127.0.0.1", "x", "normal"],
    ];
    assert_eq!(rows.iter().map(fixed).collect::<Vec<_>>(), want);
    for (row, (position, slot)) in rows.iter().zip([(1, 30.0), (2, 60.0), (1, 60.0)]) {
        assert_eq!(row["position"], position, "{row}");
        let number = |key: &str| row[key].as_f64().unwrap_or_else(|| panic!("no {key} in {row}"));
        assert!(number("since") >= before - 0.1 && number("since") <= now() + 0.1, "{row}");
        assert!(
            number("waited_seconds") >= 0.0 && number("waited_seconds") <= now() - before,
            "{row}"
        );
        assert!(number("eta_seconds") <= slot && number("eta_seconds") > slot - 20.0, "{row}");
    }
}

#[test]
fn the_queue_page_needs_the_token_where_there_is_one_and_reads_only() {
    let upstream = Upstream::start([Reply::ok()]);
    let provider = provider_yaml("p", upstream.addr(), &["m"], &spaced(30_000), "");
    let gateway =
        Gateway::start_with(&format!("auth_token: gate-token\n{CLIENTS}"), &provider, &[]);
    let ask = |method: &str, headers: &str| {
        let mut client = Client::connect(gateway.addr());
        client.send(format!("{method} /admin/queue HTTP/1.1\r\nHost: gateway\r\n{headers}\r\n"));
        client.read_response()
    };
    for headers in ["", "Authorization: Bearer wrong\r\n"] {
        let refused = ask("GET", headers);
        assert_eq!((refused.status, refused.code().as_str()), (401, "invalid_api_key"));
    }
    let token = "Authorization: Bearer gate-token\r\n";
    assert_eq!(ask("GET", token).text(), r#"{"queue":[]}"#);
    let refused = ask("POST", &format!("{token}Content-Length: 0\r\n"));
    assert_eq!((refused.status, refused.header("allow").as_deref()), (405, Some("GET, HEAD")));
}

#[test]
fn the_stats_show_the_settings_about_clients_and_no_token() {
    let line = line("");
    let stats = line.gateway.stats();
    assert_eq!(stats["server"]["fairness"], "client");
    assert_eq!(
        stats["server"]["clients"][3],
        serde_json::json!({"name": "batch", "priority": "low", "max_queue": 2})
    );
    assert!(!stats.to_string().contains("-token"), "{stats}");
}
