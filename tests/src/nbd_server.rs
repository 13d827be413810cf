//! NBD servers that others wrote, as a test runs them.

use crate::{PATIENCE, wait_for};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

/// A running server. Dropping it kills it.
pub struct NbdServer {
    program: String,
    arguments: Vec<String>,
    listens: Listens,
    child: Child,
}

/// Where a server takes connections.
enum Listens {
    Unix(PathBuf),
    Tcp(u16),
}

impl Listens {
    fn takes_connections(&self) -> bool {
        match self {
            Listens::Unix(socket) => UnixStream::connect(socket).is_ok(),
            Listens::Tcp(port) => TcpStream::connect(("127.0.0.1", *port)).is_ok(),
        }
    }
}

/// A port that was free a moment ago.
///
/// # Panics
/// When there is none.
pub fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").and_then(|it| it.local_addr()).expect("a free port").port()
}

impl NbdServer {
    /// nbdkit on a Unix socket with these arguments: options, filters, a plugin and its parameters.
    ///
    /// # Panics
    /// When it does not start.
    pub fn nbdkit(socket: &Path, arguments: &[&str]) -> NbdServer {
        let listen = ["-f", "-n", "-U", socket.to_str().expect("UTF-8")];
        let listens = Listens::Unix(socket.into());
        NbdServer::start("nbdkit", listens, &[&listen, arguments].concat())
    }

    /// nbdkit with these arguments on a TCP port of this host, with TLS. A client must show a
    /// certificate.
    ///
    /// # Panics
    /// When it does not start.
    pub fn nbdkit_with_tls(port: u16, certificates: &Path, arguments: &[&str]) -> NbdServer {
        let folder = format!("--tls-certificates={}", certificates.display());
        let tls = ["--tls=require", "--tls-verify-peer", &folder];
        let number = port.to_string();
        let listen = ["-f", "-n", "-i", "127.0.0.1", "-p", &number];
        let arguments = [&listen[..], &tls, arguments].concat();
        NbdServer::start("nbdkit", Listens::Tcp(port), &arguments)
    }

    /// qemu-nbd on a Unix socket with these arguments: options and an image.
    ///
    /// # Panics
    /// When it does not start.
    pub fn qemu(socket: &Path, arguments: &[&str]) -> NbdServer {
        let listen = ["-t", "-e", "8", "-k", socket.to_str().expect("UTF-8")];
        let listens = Listens::Unix(socket.into());
        NbdServer::start("qemu-nbd", listens, &[&listen, arguments].concat())
    }

    fn start(program: &str, listens: Listens, arguments: &[&str]) -> NbdServer {
        let arguments: Vec<String> = arguments.iter().map(|it| (*it).into()).collect();
        let child = spawn(program, &arguments, &listens);
        NbdServer { program: program.into(), arguments, listens, child }
    }

    /// The address of an export. A client with TLS must also name its certificates.
    pub fn uri(&self, export: &str) -> String {
        match &self.listens {
            Listens::Unix(socket) => format!("nbd+unix:///{export}?socket={}", socket.display()),
            Listens::Tcp(port) => format!("nbds://127.0.0.1:{port}/{export}"),
        }
    }

    /// Kills it, and waits until it has ended.
    ///
    /// # Panics
    /// When the system does not tell.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        self.child.wait().expect("a child");
    }

    /// Starts it once more, after [`NbdServer::kill`].
    ///
    /// # Panics
    /// When it does not start.
    pub fn start_again(&mut self) {
        self.child = spawn(&self.program, &self.arguments, &self.listens);
    }

    /// Sends it a signal.
    ///
    /// # Panics
    /// When it has ended.
    pub fn signal(&self, signal: Signal) {
        let process = Pid::from_raw(i32::try_from(self.child.id()).expect("a process id"));
        kill(process, signal).expect("a server");
    }
}

fn spawn(program: &str, arguments: &[String], listens: &Listens) -> Child {
    if let Listens::Unix(socket) = listens {
        let _ = std::fs::remove_file(socket);
    }
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::null()).stdout(Stdio::null());
    let mut child = command.spawn().unwrap_or_else(|e| panic!("{program}: {e}"));
    let mut ended = None;
    let is_ready = wait_for(|| {
        ended = child.try_wait().expect("a child");
        ended.is_some() || listens.takes_connections()
    });
    assert!(ended.is_none(), "{command:?}: {ended:?}");
    assert!(is_ready, "{command:?} does not listen after {PATIENCE:?}");
    child
}

impl Drop for NbdServer {
    fn drop(&mut self) {
        let _ = self.child.kill().and_then(|()| self.child.wait());
    }
}
