//! A volume that is served over NBD.

use crate::front_end::addresses;
use crate::keeping::NBD;
use crate::to_keeper;
use crate::volume_paths::VolumeName;
use anyhow::{Context, Result, bail};
use libwb::nbd::Uri;
use libwb::reactor::{Address, Handle, Listener};
use libwb::serve::nbd::{Clients, NbdServer, ServerTls, Session, listen};
use libwb::serve::{Options, ServeError, Volume};
use std::io::ErrorKind;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long an address may be in use until that counts.
const IN_USE: Duration = Duration::from_secs(1);

/// An NBD server.
pub(crate) struct OverNbd {
    uri: Uri,
    /// The text of the address.
    shown: PathBuf,
    server: NbdServer,
    runtime: Arc<Handle>,
}

/// The certificates that the server of an address needs, if it needs some.
pub(crate) fn load_tls(uri: &Uri) -> Result<Option<ServerTls>> {
    let folder = uri.tls.as_ref().and_then(|tls| tls.certificates.as_ref());
    Ok(folder.map(|folder| ServerTls::load(folder)).transpose()?)
}

/// Listens at an address, and has the socket kept: clients that connect while no server is there
/// wait for the next one.
pub(crate) fn open(name: &VolumeName, uri: &Uri, insecure: bool) -> Result<OwnedFd> {
    let mut refused = None;
    for address in addresses(uri, insecure)? {
        match listen_patiently(&address) {
            Ok(socket) => {
                // Not before: what is noted is removed at the end, and must be ours.
                if let Address::Unix(path) = &address {
                    let cannot = || format!("cannot note the socket {}", path.display());
                    name.note_nbd_socket(path).with_context(cannot)?;
                }
                let cannot = || format!("cannot hand over the socket of {uri}");
                to_keeper::keep(NBD, socket.as_fd()).with_context(cannot)?;
                return Ok(socket);
            }
            Err(e) => refused = Some(e),
        }
    }
    match refused {
        Some(e) => Err(e.into()),
        None => bail!("{uri}: the host has no address"),
    }
}

/// Listens. The kernel may still have to close the socket of a daemon that was killed.
fn listen_patiently(address: &Address) -> Result<OwnedFd, ServeError> {
    let started = Instant::now();
    loop {
        match listen(address) {
            Err(e) if e.cause.kind() == ErrorKind::AddrInUse && started.elapsed() < IN_USE => {
                std::thread::sleep(IN_USE / 50);
            }
            listening => return listening,
        }
    }
}

impl OverNbd {
    /// Serves the clients of a socket that listens.
    pub(crate) fn serve(
        uri: &Uri,
        listening: OwnedFd,
        volume: impl Volume,
        options: Options,
        runtime: Arc<Handle>,
    ) -> Result<OverNbd> {
        let cannot = || format!("cannot serve at {uri}");
        let listener = Listener::new(&runtime, listening).with_context(cannot)?;
        let (export, tls) = (uri.export.as_str(), load_tls(uri)?);
        let session = Session::new(volume, export, options, tls, runtime.clone())?;
        let server = NbdServer::start(&runtime, listener, session);
        let shown = uri.to_string().into();
        Ok(OverNbd { uri: uri.clone(), shown, server, runtime })
    }

    pub(crate) fn uri(&self) -> &Uri {
        &self.uri
    }

    /// The address, where a block device would have its path.
    pub(crate) fn shown(&self) -> &Path {
        &self.shown
    }

    pub(crate) fn clients(&self) -> &Clients {
        self.server.clients()
    }

    /// Answers the requests that were taken, and ends all connections.
    pub(crate) fn stop(self) {
        let stop = self.server.stop();
        let _ = self.runtime.run_watched(stop, Duration::from_secs(1), || true);
    }
}
