# Conveniences; nothing needs them. `just` alone lists them.

default:
    @just --list

# Formatting and lints, as CI asks for them
check:
    cargo fmt --check
    cargo clippy --all-targets -- -D warnings

# All tests that need only Rust and a C toolchain
test:
    cargo test

# The SDKs of OpenAI (Python and Node) and Anthropic (Python) and the clients of docs/clients.md against the built binary
sdk:
    tests/sdk/run

# The page at /admin/ in a headless Chromium; needs node and Chromium
browser:
    tests/browser/run

# Each fuzz target for so many seconds, on the stable toolchain; needs cargo-fuzz
fuzz seconds="20":
    fuzz/run {{seconds}}

# What the gateway costs, beside nginx where that is installed and whoever is given as NAME=URL; benches/README.md says more
bench *what:
    cargo build --locked --release
    cargo run --locked --release --manifest-path benches/Cargo.toml -- {{what}}

# Hundreds of unruly callers against unruly providers, for a minute or as many seconds as given; SOAK_SEED replays one
soak seconds="60":
    SOAK_SECONDS={{seconds}} cargo test --release --test soak

# What a request costs in instructions, against the committed figures; needs valgrind
instructions:
    tests/instructions/run

# Serve ./config.yaml
run:
    cargo run --release

# Serve two built-in providers, without a key
demo:
    cargo run --release -- demo

# A static binary for this machine, in target/<host>/release/limitrate
static:
    packaging/static

# The same for another processor, aarch64 or armv7; says what it needs for that
cross arch:
    packaging/cross {{arch}}

# How large the static binary is, and what memory it holds while nobody asks
size:
    packaging/size

# The static binary in an empty chroot: DNS, TLS, its health check; needs root, openssl, dnsmasq
alone:
    packaging/alone "target/$(rustc --print host-tuple)/release/limitrate"

# A Debian package of the static binary for this machine, in target/debian; needs cargo-deb
deb: static
    cargo deb --no-build --no-strip --target "$(rustc --print host-tuple)"

# Advisories, licences, duplicates and sources of what is built in; needs cargo-deny
deny:
    cargo deny check
