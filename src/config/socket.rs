//! `port:`, `socket:` and `socket_mode:`: the doors of the gateway.

use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use super::section::Section;
use super::tree::Kind;

/// What a unix socket's address has room for, less the final zero (unix(7)).
const PATH_BYTES: usize = 107;

/// Whoever may read and write the file may connect: the user and its group.
const MODE: u32 = 0o660;

/// A unix socket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Socket {
    /// Its file.
    pub path: PathBuf,
    /// The file's permissions; default 0660.
    pub mode: u32,
}

/// The port, unless it is `null`, and the socket, if any. At least one of them is there.
pub(super) fn doors(keys: &mut Section<'_, '_, '_>) -> (Option<u16>, Option<Socket>) {
    let no_port = keys.find("port").filter(|found| matches!(found.node.kind, Kind::Null));
    let port = keys.integer("port", 8080, 0..=u16::MAX);
    let path = socket_path(keys);
    let mode = socket_mode(keys);
    if let Some(found) = &no_port
        && keys.optional("socket").is_none()
    {
        keys.walk.fault(
            found,
            "is null, and there is no socket to serve on instead; write a number, e.g. port: 8080",
        );
    }
    if keys.optional("socket").is_none() {
        keys.refuse("socket_mode", "is of no use without socket; write socket: PATH, or remove it");
    }
    (no_port.is_none().then_some(port), path.map(|path| Socket { path, mode }))
}

/// From the configuration's folder on.
fn socket_path(keys: &mut Section<'_, '_, '_>) -> Option<PathBuf> {
    let found = keys.optional("socket")?;
    let text = keys.walk.text(&found)?;
    let path = keys.walk.folder.join(&text.value);
    let problem = if text.value.is_empty() || text.value.contains('\0') {
        "is no path; write where the socket shall be, e.g. socket: /run/limitrate/limitrate.sock"
            .to_owned()
    } else if path.as_os_str().as_bytes().len() > PATH_BYTES {
        format!(
            "is longer than the {PATH_BYTES} bytes that a unix socket's path can have; write a shorter one"
        )
    } else {
        return Some(path);
    };
    keys.walk.fault(&found, problem);
    None
}

/// Octal, as chmod takes it.
fn socket_mode(keys: &mut Section<'_, '_, '_>) -> u32 {
    let Some(found) = keys.optional("socket_mode") else { return MODE };
    let Some(text) = keys.walk.text(&found) else { return MODE };
    let octal = (3..=4).contains(&text.value.len())
        && text.value.bytes().all(|byte| (b'0'..=b'7').contains(&byte));
    match u32::from_str_radix(&text.value, 8).ok().filter(|mode| octal && *mode <= 0o777) {
        Some(mode) => mode,
        None => {
            let problem = format!(
                "must be permissions in octal, not {}; write e.g. socket_mode: \"0660\"",
                text.shown
            );
            keys.walk.fault(&found, problem);
            MODE
        }
    }
}
