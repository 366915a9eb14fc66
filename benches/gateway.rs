//! What the gateway costs, measured from outside: the built program between a raw upstream and raw callers of this file,
//! all on this machine. `cargo bench`; see benches/README.md for how to read it. Knows nothing of the gateway's inside.
//!
//! Everything is compared with the same callers talking to the upstream directly and, where it is installed, through nginx,
//! in the same run: absolute figures are the machine's, ratios are the gateway's.

use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Resource, getrlimit, setrlimit};

const PROGRAM: &str = env!("CARGO_BIN_EXE_limitrate");
const CONNECTIONS: usize = 64;
const BODY_BYTES: usize = 1024;
/// How long each contestant is loaded.
const LOAD: Duration = Duration::from_secs(4);
const CADENCE: Duration = Duration::from_millis(100);
const SPACED_SENDS: usize = 100;
const STREAMS: usize = 500;
const QUEUED: usize = 1000;

fn main() -> io::Result<()> {
    raise_file_limit();
    let (sends, arrivals) = channel();
    let upstream = upstream(sends)?;
    let gateway = Proxy::limitrate(upstream)?;
    let idle = gateway.resident();

    println!("throughput: {CONNECTIONS} connections, POST of {BODY_BYTES} bytes, {} s each", LOAD.as_secs());
    let direct = throughput("direct", upstream, None)?;
    match Proxy::nginx(upstream) {
        Ok(nginx) => throughput("nginx", nginx.address, Some((&nginx, direct)))?,
        Err(error) => {
            println!("  nginx       left out: {error}");
            0.0
        }
    };
    throughput("limitrate", gateway.address, Some((&gateway, direct)))?;

    println!("\nshaping: {SPACED_SENDS} requests at once, one send every {} ms", CADENCE.as_millis());
    precision(gateway.address, &arrivals)?;

    println!("\nfirst byte of a stream: {STREAMS} streams, one after the other");
    let direct = first_bytes("direct", upstream)?;
    let through = first_bytes("limitrate", gateway.address)?;
    println!("  added       {:>7.0} us at the median", (through.as_secs_f64() - direct.as_secs_f64()) * 1e6);

    println!("\nsize");
    println!("  program     {:>7.1} MB", fs::metadata(PROGRAM)?.len() as f64 / 1e6);
    println!("  idle        {:>7.1} MB resident", idle as f64 / 1e3);
    println!("  after load  {:>7.1} MB resident", gateway.resident() as f64 / 1e3);
    let fresh = Proxy::limitrate(upstream)?;
    let _waiting = queue(fresh.address)?;
    let queued = fresh.resident();
    println!(
        "  {QUEUED} queued {:>7.1} MB resident, {:.1} KB each",
        queued as f64 / 1e3,
        (queued - idle) as f64 / QUEUED as f64
    );
    Ok(())
}

/// Loads an address with all connections and prints requests a second; for a proxy also its share of `direct` and its CPU time.
fn throughput(name: &str, address: SocketAddr, proxy: Option<(&Proxy, f64)>) -> io::Result<f64> {
    let (stop, count) = (AtomicBool::new(false), AtomicU64::new(0));
    let cpu = || proxy.map(|(proxy, _)| proxy.cpu()).unwrap_or_default();
    let mut callers = (0..CONNECTIONS).map(|_| Caller::connect(address)).collect::<io::Result<Vec<_>>>()?;
    let request = request("fast", false);
    for caller in &mut callers {
        caller.ask(&request)?;
    }
    let (before, start) = (cpu(), Instant::now());
    thread::scope(|scope| {
        for mut caller in callers {
            let (stop, count, request) = (&stop, &count, &request);
            scope.spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    caller.ask(request).expect("every request is answered");
                    count.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        thread::sleep(LOAD);
        stop.store(true, Ordering::Relaxed);
    });
    let (spent, answered) = (cpu() - before, count.into_inner() as f64);
    let rate = answered / start.elapsed().as_secs_f64();
    match proxy {
        None => println!("  {name:<11} {rate:>7.0} a second"),
        Some((_, direct)) => {
            let (share, each) = (100.0 * rate / direct, spent.as_secs_f64() * 1e6 / answered);
            println!(
                "  {name:<11} {rate:>7.0} a second, {share:.0} % of direct, {each:.1} us of its CPU time a request"
            );
        }
    }
    Ok(rate)
}

/// Prints the gaps between the heads as the upstream saw them.
fn precision(gateway: SocketAddr, arrivals: &Receiver<Instant>) -> io::Result<()> {
    let request = request("spaced", false);
    thread::scope(|scope| {
        for _ in 0..SPACED_SENDS {
            scope.spawn(|| Caller::connect(gateway)?.ask(&request).map(drop));
        }
    });
    let seen: Vec<Instant> = arrivals.try_iter().collect();
    let mut gaps: Vec<Duration> = seen.windows(2).map(|pair| pair[1] - pair[0]).collect();
    if seen.len() != SPACED_SENDS {
        return Err(io::Error::other(format!("{} sends instead of {SPACED_SENDS}", seen.len())));
    }
    gaps.sort();
    let mean = gaps.iter().sum::<Duration>() / gaps.len() as u32;
    let [min, mean, max] = [gaps[0], mean, gaps[gaps.len() - 1]].map(|gap| gap.as_secs_f64() * 1e3);
    println!("  gaps        min {min:.2} ms, mean {mean:.2} ms, max {max:.2} ms");
    Ok(())
}

/// Prints the time from the request to the first byte of the stream's first event, and returns its median.
fn first_bytes(name: &str, address: SocketAddr) -> io::Result<Duration> {
    let mut caller = Caller::connect(address)?;
    let request = request("fast", true);
    let mut times = (0..STREAMS).map(|_| caller.first_byte(&request)).collect::<io::Result<Vec<_>>>()?;
    times.sort();
    let [median, high] = [times[STREAMS / 2], times[STREAMS * 99 / 100]];
    println!("  {name:<11} {:>7} us at the median, {} us at the 99th percentile", median.as_micros(), high.as_micros());
    Ok(median)
}

/// Fills a provider's queue behind its first send; the callers keep their places while they live.
fn queue(gateway: SocketAddr) -> io::Result<Vec<Caller>> {
    let mut callers = (0..=QUEUED).map(|_| Caller::connect(gateway)).collect::<io::Result<Vec<_>>>()?;
    let request = request("hourly", false);
    callers[0].ask(&request)?;
    callers[1..].iter_mut().try_for_each(|caller| caller.stream.write_all(&request))?;
    let wanted = format!("\"queued_ahead\":{QUEUED}");
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let stats = callers[0].ask(b"GET /admin/stats HTTP/1.1\r\nHost: bench\r\n\r\n")?;
        let stats = String::from_utf8_lossy(stats).replace(' ', "");
        if stats.contains(&wanted) {
            return Ok(callers);
        }
        if Instant::now() > deadline {
            return Err(io::Error::other(format!("no {wanted} in {stats}")));
        }
    }
}

/// A program between callers and the upstream; dropping it ends it.
struct Proxy {
    address: SocketAddr,
    child: Child,
    folder: PathBuf,
}

impl Proxy {
    /// The gateway with a provider for each measurement.
    fn limitrate(upstream: SocketAddr) -> io::Result<Proxy> {
        let provider = |model: &str, rate: &str| {
            format!(
                "  - {{name: {model}, base_url: 'http://{upstream}/v1', models: [{model}], rate_limit: {{{rate}}}, \
                 pool_max_idle: {CONNECTIONS}, max_queue: {QUEUED}}}\n"
            )
        };
        let text = format!(
            "server: {{host: 127.0.0.1, port: 0, max_connections: 2048}}\nproviders:\n{}{}{}",
            provider("fast", "mode: burst, rpm: 60000000, capacity: 1000000"),
            provider("spaced", &format!("mode: spaced, interval_seconds: {}", CADENCE.as_secs_f64())),
            provider("hourly", "mode: spaced, interval_seconds: 3600"),
        );
        let folder = folder("limitrate", "config.yaml", &text)?;
        let mut command = Command::new(PROGRAM);
        let mut child = command
            .arg("--config")
            .arg(folder.join("config.yaml"))
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()?;
        let stdout = BufReader::new(child.stdout.take().expect("it is piped"));
        let url = stdout.lines().map_while(Result::ok).find_map(|line| line.split("http://").nth(1).map(str::to_owned));
        let address = url.and_then(|url| url.split('/').next()?.parse().ok());
        Ok(Proxy { address: address.ok_or(io::Error::other("limitrate did not say where it listens"))?, child, folder })
    }

    /// One nginx process with keep-alive on both sides and no log.
    fn nginx(upstream: SocketAddr) -> io::Result<Proxy> {
        let address = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
        let text = format!(
            "daemon off; master_process off; pid nginx.pid; error_log stderr error;\n\
             events {{ worker_connections 1024; }}\n\
             http {{ access_log off; keepalive_requests 100000000;\n\
             upstream up {{ server {upstream}; keepalive {CONNECTIONS}; keepalive_requests 100000000; }}\n\
             server {{ listen {address}; location / {{ proxy_pass http://up; proxy_http_version 1.1;\n\
             proxy_set_header Connection ''; }} }} }}\n"
        );
        let folder = folder("nginx", "nginx.conf", &text)?;
        let child =
            Command::new("nginx").arg("-p").arg(&folder).arg("-c").arg("nginx.conf").stderr(Stdio::null()).spawn()?;
        let proxy = Proxy { address, child, folder };
        let deadline = Instant::now() + Duration::from_secs(5);
        while let Err(error) = TcpStream::connect(address) {
            if Instant::now() > deadline {
                return Err(error);
            }
        }
        Ok(proxy)
    }

    /// CPU time up to now, user and system, in ticks of 10 ms (proc(5), fields 14 and 15 of stat).
    fn cpu(&self) -> Duration {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.child.id())).unwrap_or_default();
        let behind_name = stat.rsplit(')').next().unwrap_or_default();
        let ticks: u64 = behind_name.split_whitespace().skip(11).take(2).filter_map(|n| n.parse::<u64>().ok()).sum();
        Duration::from_millis(10 * ticks)
    }

    /// Resident memory in KB.
    fn resident(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap_or_default();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        line.and_then(|line| line.split_whitespace().next()?.parse().ok()).unwrap_or(0)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = fs::remove_dir_all(&self.folder);
    }
}

/// A folder of its own for a program, with its configuration.
fn folder(name: &str, file: &str, text: &str) -> io::Result<PathBuf> {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let (process, next) = (std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
    let folder = std::env::temp_dir().join(format!("bench-{process}-{next}-{name}"));
    fs::create_dir_all(&folder)?;
    fs::write(folder.join(file), text)?;
    Ok(folder)
}

/// A keep-alive connection of a caller.
struct Caller {
    stream: TcpStream,
    buf: Vec<u8>,
}

impl Caller {
    fn connect(address: SocketAddr) -> io::Result<Caller> {
        let stream = TcpStream::connect(address)?;
        stream.set_nodelay(true)?;
        Ok(Caller { stream, buf: Vec::new() })
    }

    /// The body of the answer, which has to be a 200.
    fn ask(&mut self, request: &[u8]) -> io::Result<&[u8]> {
        self.stream.write_all(request)?;
        let body = read_message(&mut self.stream, &mut self.buf)?;
        match self.buf.starts_with(b"HTTP/1.1 200") {
            true => Ok(&self.buf[body..]),
            false => Err(io::Error::other(format!("refused: {}", String::from_utf8_lossy(&self.buf)))),
        }
    }

    /// How long the first event of a stream takes; the stream is read to its end.
    fn first_byte(&mut self, request: &[u8]) -> io::Result<Duration> {
        let start = Instant::now();
        self.stream.write_all(request)?;
        self.buf.clear();
        let mut first = None;
        while !self.buf.ends_with(b"\r\n0\r\n\r\n") {
            read_some(&mut self.stream, &mut self.buf)?;
            if first.is_none() && find(&self.buf, b"data:").is_some() {
                first = Some(start.elapsed());
            }
        }
        first.ok_or(io::Error::other("a stream without an event"))
    }
}

/// A chat request of [`BODY_BYTES`].
fn request(model: &str, stream: bool) -> Vec<u8> {
    let body = format!("{{\"model\":\"{model}\",\"stream\":{stream},\"messages\":\"");
    let text = "x".repeat(BODY_BYTES - body.len() - 2);
    let head = "POST /v1/chat/completions HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\n";
    format!("{head}Content-Length: {BODY_BYTES}\r\n\r\n{body}{text}\"}}").into_bytes()
}

/// Answers every request at once, and reports when those for the shaped model came.
fn upstream(sends: Sender<Instant>) -> io::Result<SocketAddr> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            let sends = sends.clone();
            thread::spawn(move || serve(stream, &sends));
        }
    });
    Ok(address)
}

fn serve(mut stream: TcpStream, sends: &Sender<Instant>) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let content = "x".repeat(BODY_BYTES);
    let plain = format!("HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: {BODY_BYTES}\r\n\r\n{content}");
    let events = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\nA\r\ndata: 1\n\n\n\r\n";
    let mut buf = Vec::new();
    loop {
        let body = read_message(&mut stream, &mut buf)?;
        let came = Instant::now();
        let start = &buf[body..buf.len().min(body + 64)];
        if find(start, b"\"stream\":true").is_some() {
            stream.write_all(events.as_bytes())?;
            stream.write_all(b"E\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")?;
            continue;
        }
        if find(start, b"\"model\":\"spaced\"").is_some() {
            let _ = sends.send(came);
        }
        stream.write_all(plain.as_bytes())?;
    }
}

/// Reads one message into `buf`, nothing behind it since nobody pipelines, and returns where its body begins.
fn read_message(stream: &mut TcpStream, buf: &mut Vec<u8>) -> io::Result<usize> {
    buf.clear();
    let body = loop {
        read_some(stream, buf)?;
        if let Some(end) = find(buf, b"\r\n\r\n") {
            break end + 4;
        }
    };
    let head = String::from_utf8_lossy(&buf[..body]).to_ascii_lowercase();
    let length = head.lines().find_map(|line| line.strip_prefix("content-length:")?.trim().parse().ok()).unwrap_or(0);
    while buf.len() < body + length {
        read_some(stream, buf)?;
    }
    Ok(body)
}

fn read_some(stream: &mut TcpStream, buf: &mut Vec<u8>) -> io::Result<()> {
    let mut chunk = [0; 16 * 1024];
    let n = stream.read(&mut chunk)?;
    buf.extend_from_slice(&chunk[..n]);
    if n == 0 { Err(io::ErrorKind::UnexpectedEof.into()) } else { Ok(()) }
}

fn find(bytes: &[u8], wanted: &[u8]) -> Option<usize> {
    bytes.windows(wanted.len()).position(|window| window == wanted)
}

fn raise_file_limit() {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    let _ = setrlimit(Resource::Nofile, limit);
}
