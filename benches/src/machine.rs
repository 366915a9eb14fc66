//! The machine: its clock, which core belongs to whom, what `/proc` tells of a process, and its name for the table.

use std::fs;
use std::io;
use std::net::{SocketAddr, TcpListener};

use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::time::{ClockId, clock_getcpuclockid, clock_gettime};
use nix::unistd::Pid;

/// Nanoseconds of CLOCK_MONOTONIC: the same count for every process of the machine.
pub fn now() -> u64 {
    nanos(ClockId::CLOCK_MONOTONIC).expect("every Linux has this clock")
}

fn nanos(clock: ClockId) -> io::Result<u64> {
    let time = clock_gettime(clock)?;
    Ok(time.tv_sec() as u64 * 1_000_000_000 + time.tv_nsec() as u64)
}

/// CPU time in nanoseconds of a process with all its threads, ended ones too, and of its living descendants.
pub fn cpu(pid: u32) -> io::Result<u64> {
    let own = |pid: u32| nanos(clock_getcpuclockid(Pid::from_raw(pid as i32))?);
    let mut sum = own(pid)?;
    for child in descendants(pid) {
        sum += own(child).unwrap_or(0); // one that ended just now
    }
    Ok(sum)
}

/// Resident bytes of a process and its descendants.
pub fn resident(pid: u32) -> io::Result<u64> {
    let mut kib = resident_kib(pid)?;
    for child in descendants(pid) {
        kib += resident_kib(child).unwrap_or(0);
    }
    Ok(kib * 1024)
}

fn resident_kib(pid: u32) -> io::Result<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|line| line.split_whitespace().next()?.parse().ok());
    kib.ok_or_else(|| io::Error::other(format!("process {pid} has no VmRSS")))
}

fn descendants(pid: u32) -> Vec<u32> {
    let mut found = Vec::new();
    let mut next = vec![pid];
    while let Some(pid) = next.pop() {
        for task in fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten() {
            let children = fs::read_to_string(task.path().join("children")).unwrap_or_default();
            next.extend(children.split_whitespace().filter_map(|child| child.parse::<u32>().ok()));
        }
        found.push(pid);
    }
    found.split_off(1)
}

/// Who runs where: the proxy under test has a core for itself, driver and mock have the others.
pub struct Cores {
    count: usize,
    proxy: Option<usize>,
    driver: usize,
    mock: usize,
}

impl Cores {
    /// The first of the cores that this process may use is the proxy's; with one core alone nothing is pinned.
    pub fn of_this_machine() -> io::Result<Cores> {
        let allowed = sched_getaffinity(Pid::from_raw(0))?;
        let cores: Vec<usize> =
            (0..CpuSet::count()).filter(|&core| allowed.is_set(core).unwrap_or(false)).collect();
        let count = cores.len();
        Ok(match cores[..] {
            [] | [_] => Cores { count, proxy: None, driver: 0, mock: 0 },
            [proxy, shared] => Cores { count, proxy: Some(proxy), driver: shared, mock: shared },
            [proxy, driver, mock, ..] => Cores { count, proxy: Some(proxy), driver, mock },
        })
    }

    pub fn told(&self) -> String {
        match self.proxy {
            None => "one core: nothing is pinned, and all figures are worse than they need be"
                .to_owned(),
            Some(proxy) if self.driver == self.mock => {
                format!(
                    "the proxy under test has core {proxy} for itself; driver and mock share core {}",
                    self.mock
                )
            }
            Some(proxy) => {
                format!(
                    "the proxy under test has core {proxy}, the driver {}, the mock {}",
                    self.driver, self.mock
                )
            }
        }
    }

    pub fn pin_driver(&self) -> io::Result<()> {
        self.pin(self.driver)
    }

    pub fn pin_mock(&self) -> io::Result<()> {
        self.pin(self.mock)
    }

    /// Runs `start` on the proxy's core, so that the process which it starts is born there.
    pub fn on_the_proxys<T>(&self, start: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        let Some(proxy) = self.proxy else { return start() };
        self.pin(proxy)?;
        let started = start();
        self.pin_driver()?;
        started
    }

    fn pin(&self, core: usize) -> io::Result<()> {
        if self.proxy.is_none() {
            return Ok(());
        }
        let mut set = CpuSet::new();
        set.set(core)?;
        Ok(sched_setaffinity(Pid::from_raw(0), &set)?)
    }
}

/// Host, processor, cores, kernel and day, as the head of the table.
pub fn told(cores: &Cores) -> io::Result<String> {
    let line = |path: &str, key: &str| -> Option<String> {
        let text = fs::read_to_string(path).ok()?;
        let line = text.lines().find(|line| line.starts_with(key))?;
        Some(line.split([':', '=']).nth(1)?.trim().trim_matches('"').to_owned())
    };
    let name = nix::sys::utsname::uname()?;
    let processor = line("/proc/cpuinfo", "model name").or_else(|| line("/proc/cpuinfo", "Model"));
    let system = line("/etc/os-release", "PRETTY_NAME").unwrap_or_else(|| "Linux".to_owned());
    Ok(format!(
        "{}: {}, {} cores, {} {}, {system}; {}",
        name.nodename().to_string_lossy(),
        processor.unwrap_or_else(|| "processor unknown".to_owned()),
        cores.count,
        name.sysname().to_string_lossy(),
        name.release().to_string_lossy(),
        day(nanos(ClockId::CLOCK_REALTIME)? / 1_000_000_000 / 86_400),
    ))
}

/// `2026-11-27` of days since 1970 (Howard Hinnant's `civil_from_days`).
fn day(days: u64) -> String {
    let shifted = days + 719_468;
    let (era, of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    format!("{year}-{month:02}-{day:02}")
}

/// Lets this process and its children have as many files open as the system allows; returns how many.
pub fn raise_file_limit() -> io::Result<u64> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    Ok(hard)
}

/// An address that was free just now, for a program that can't say which port it took.
pub fn free_address() -> io::Result<SocketAddr> {
    TcpListener::bind("127.0.0.1:0")?.local_addr()
}
