//! NBD servers that others wrote, as a test runs them.

use crate::{PATIENCE, wait_for};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

/// A server on a Unix socket. Dropping it kills it.
pub struct NbdServer {
    program: String,
    arguments: Vec<String>,
    socket: PathBuf,
    child: Child,
}

impl NbdServer {
    /// nbdkit with these arguments: options, filters, a plugin and its parameters.
    ///
    /// # Panics
    /// When it does not start.
    pub fn nbdkit(socket: &Path, arguments: &[&str]) -> NbdServer {
        let listen = ["-f", "-n", "-U", socket.to_str().expect("UTF-8")];
        NbdServer::start("nbdkit", socket, &[&listen, arguments].concat())
    }

    /// qemu-nbd with these arguments: options and an image.
    ///
    /// # Panics
    /// When it does not start.
    pub fn qemu(socket: &Path, arguments: &[&str]) -> NbdServer {
        let listen = ["-t", "-e", "8", "-k", socket.to_str().expect("UTF-8")];
        NbdServer::start("qemu-nbd", socket, &[&listen, arguments].concat())
    }

    fn start(program: &str, socket: &Path, arguments: &[&str]) -> NbdServer {
        let arguments: Vec<String> = arguments.iter().map(|it| (*it).into()).collect();
        let child = spawn(program, &arguments, socket);
        NbdServer { program: program.into(), arguments, socket: socket.into(), child }
    }

    /// The address of an export.
    pub fn uri(&self, export: &str) -> String {
        format!("nbd+unix:///{export}?socket={}", self.socket.display())
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
        self.child = spawn(&self.program, &self.arguments, &self.socket);
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

fn spawn(program: &str, arguments: &[String], socket: &Path) -> Child {
    let _ = std::fs::remove_file(socket);
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::null()).stdout(Stdio::null());
    let mut child = command.spawn().unwrap_or_else(|e| panic!("{program}: {e}"));
    let mut ended = None;
    let listens = wait_for(|| {
        ended = child.try_wait().expect("a child");
        ended.is_some() || UnixStream::connect(socket).is_ok()
    });
    assert!(ended.is_none(), "{command:?}: {ended:?}");
    assert!(listens, "{command:?} does not listen after {PATIENCE:?}");
    child
}

impl Drop for NbdServer {
    fn drop(&mut self) {
        let _ = self.child.kill().and_then(|()| self.child.wait());
    }
}
